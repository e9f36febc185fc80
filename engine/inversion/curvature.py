"""What the last steps of L-BFGS taught each row about its curvature, in compact form.

The two loops of L-BFGS visit their pairs one after another. Byrd, Nocedal and Schnabel
(*Representations of quasi-Newton matrices and their use in limited memory methods*, Mathematical
Programming 63, 1994) write the same inverse Hessian with the small matrices of the pairs' products,
so that a direction of all rows needs four products with the pairs, whatever their number.

Shapes: A rows of D values; M slots of a row's history, of which the oldest is overwritten.
"""

import torch
from torch import Tensor

__all__ = ["Curvature"]


class Curvature:
    """The last M pairs of each row: a step s, and how far it turned the gradient, y.

    Empty slots hold zeros, which take part in no sum.

    Args:
        grad: ``(A, D)``, the gradients that the rows begin with.
        history: M.
    """

    def __init__(self, grad: Tensor, history: int) -> None:
        rows, values = grad.shape
        self._steps_AMD, self._turns_AMD = grad.new_zeros(2, rows, history, values)
        # R holds s_i.y_j where step i is not younger than j. Empty slots have rows and columns of
        # zeros in its inverse, so the order of the slots does not matter.
        self._inverse_AMM, self._turned_AMM = grad.new_zeros(2, rows, history, history)
        self._products_AM, self._along_steps_AM, self._along_turns_AM = grad.new_zeros(3, rows, history)
        self._scale_A = grad.new_ones(rows)
        self._count_A = torch.zeros(rows, dtype=torch.int64, device=grad.device)
        self._used = 0

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only, by their numbers or as a mask."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])

    def forget(self, rows_A: Tensor) -> None:
        """The rows of this mask begin anew; the scale of their last pair stays."""
        self._inverse_AMM[rows_A] = 0
        self._products_AM[rows_A] = 0

    def learn(self, step: Tensor, turn: Tensor, grad: Tensor, accepted_A: Tensor, learnt_A: Tensor) -> None:
        """Enter one pair per row.

        Args:
            step: ``(A, D)``, from the last accepted point to this one.
            turn: ``(A, D)``, how much the gradient changed on the way.
            grad: ``(A, D)``, the gradient at this point.
            accepted_A: the rows that went there.
            learnt_A: those of them whose pair is entered.
        """
        steps_AM, turns_AM = self._along(grad)
        used = self._used
        across_AM, turned_AM = steps_AM - self._along_steps_AM[:, :used], turns_AM - self._along_turns_AM[:, :used]
        column = accepted_A[:, None]
        self._along_steps_AM[:, :used] = torch.where(column, steps_AM, self._along_steps_AM[:, :used])
        self._along_turns_AM[:, :used] = torch.where(column, turns_AM, self._along_turns_AM[:, :used])
        rows = learnt_A.nonzero()[:, 0]
        if not len(rows):
            return
        slots = self._count_A[rows] % self._steps_AMD.shape[1]
        self._count_A[rows] += 1
        self._used = max(used, int(slots.max()) + 1)
        step, turn, grad = step[rows], turn[rows], grad[rows]
        product, square = (step * turn).sum(1), turn.square().sum(1)
        self._steps_AMD[rows, slots], self._turns_AMD[rows, slots] = step, turn
        self._along_steps_AM[rows, slots], self._along_turns_AM[rows, slots] = (step * grad).sum(1), (turn * grad).sum(1)
        self._products_AM[rows, slots], self._scale_A[rows] = product, product / square
        # The new pair takes the place of the oldest. The matrix is triangular, so without its first
        # row and column its inverse is that of the other pairs, and this column is free.
        self._inverse_AMM[rows, slots] = 0
        if used:
            entered = _product(across_AM, self._inverse_AMM[:, :used, :used].transpose(1, 2))[rows]
            self._inverse_AMM[rows, :used, slots] = -entered / product[:, None]
            self._turned_AMM[rows, :used, slots] = turned_AM[rows]
            self._turned_AMM[rows, slots, :used] = turned_AM[rows]
        self._inverse_AMM[rows, slots, slots] = 1 / product
        self._turned_AMM[rows, slots, slots] = square

    def direction(self, grad: Tensor) -> Tensor:
        """The inverse Hessian's estimate times the negative gradient, ``(A, D)``.

        Args:
            grad: ``(A, D)``, the gradients that :meth:`learn` was told last.
        """
        used, scale = self._used, self._scale_A[:, None]
        result = -scale * grad
        if not used:
            return result
        inverse_AMM = self._inverse_AMM[:, :used, :used]
        u_AM = _product(self._along_steps_AM[:, :used], inverse_AMM.transpose(1, 2))
        inner_AM = _product(u_AM, self._turned_AMM[:, :used, :used]) - self._along_turns_AM[:, :used]
        v_AM = _product(self._products_AM[:, :used] * u_AM + scale * inner_AM, inverse_AMM)
        result = torch.baddbmm(result[:, None], (scale * u_AM)[:, None], self._turns_AMD[:, :used])
        return torch.baddbmm(result, -v_AM[:, None], self._steps_AMD[:, :used])[:, 0]

    def _along(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The products of all pairs' parts with a gradient, ``(A, M)`` each."""
        steps_AMD, turns_AMD = self._steps_AMD[:, : self._used], self._turns_AMD[:, : self._used]
        return _product(grad, steps_AMD.transpose(1, 2)), _product(grad, turns_AMD.transpose(1, 2))


def _product(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Each row's vector times its matrix; MKL takes far longer for a matrix times a vector."""
    return torch.bmm(vectors[:, None], matrices)[:, 0]
