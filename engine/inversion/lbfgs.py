"""L-BFGS for many independent problems at once: each row has its own curvature, step and stop.

``torch.optim.LBFGS`` sees one problem. Victims stacked in one tensor would share their step length
and curvature there, and none would converge as it does alone. Here every scalar of the algorithm is
a vector over rows. In each turn all rows that still run are evaluated together; rows that are done
are taken out of the batch every few turns.

Shapes: B rows of D values; A rows that still run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.inversion.curvature import Curvature

__all__ = ["Minimised", "Objective", "minimise"]

# the losses (A,) of points (A, D), which belong to the rows of these numbers (A,)
Objective = Callable[[Tensor, Tensor], Tensor]

# torch.optim.LBFGS takes an entry into its history only if y.s is above this.
_CURVATURE = 1e-10
# Armijo's condition, and how often a step is halved before the row starts again along its gradient.
_DESCENT, _HALVINGS = 1e-4, 12
# Rows that are done are taken out of the batch once in this number of turns.
_TURNS = 25


@dataclass(frozen=True)
class Minimised:
    """Where each row ended.

    Attributes:
        points: ``(B, D)``, the point with the smallest loss that was seen.
        losses: ``(B,)``, that loss; inf if no finite one was seen.
        evaluations: ``(B,)`` int64, how often the row's loss was computed.
        reasons: why each row stopped: ``"target"``, ``"gradient"``, ``"change"``, ``"stalled"``,
            ``"diverged"`` or ``"evaluations"``.
    """

    points: Tensor
    losses: Tensor
    evaluations: Tensor
    reasons: list[str]


@dataclass
class _State:
    """All rows that still run.

    ``point`` is the last one that was accepted; the next is ``point + step * direction``.
    """

    rows: Tensor
    point: Tensor
    loss: Tensor
    grad: Tensor
    direction: Tensor
    step: Tensor
    slope: Tensor
    halvings: Tensor
    fresh: Tensor
    curvature: Curvature

    def kept(self, keep_A: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[keep_A])
        self.curvature.keep(keep_A)


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    mode: str = "safe",
    evaluations: int = 900,
    history: int = 100,
    lr: float = 1.0,
    target: float = 0.0,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    progress: Callable[[str], None] = lambda text: None,
) -> Minimised:
    """Minimise each row's loss by L-BFGS.

    Args:
        objective: ``objective(points, rows) -> losses``, differentiable in ``points``; a row's loss
            must depend on its own point only.
        start: ``(B, D)``, where each row begins.
        mode: ``"torch"`` takes the steps of ``torch.optim.LBFGS`` without line search, row by row.
            ``"safe"`` halves a step that does not lower the loss enough, and begins again along the
            gradient where that does not help; a row that meets NaN or Inf goes back.
        evaluations: the largest number per row.
        history: how many turns the curvature is estimated from.
        lr: the step length, as in ``torch.optim.LBFGS``.
        target: a row with a smaller loss is done.
        tolerance_grad, tolerance_change: as in ``torch.optim.LBFGS``.
        progress: is told now and then how many rows still run.

    Returns:
        The best point of each row by its loss, whatever it is compared with later.

    Raises:
        ValueError: ``mode`` is unknown, ``start`` is no matrix, or a number is out of range.

    Example:
        >>> goals = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
        >>> found = minimise(lambda x, rows: (x - goals[rows]).square().sum(1), torch.zeros(2, 2))
        >>> torch.allclose(found.points, goals, atol=1e-4)
        True
    """
    if mode not in ("torch", "safe"):
        raise ValueError(f"mode must be 'torch' or 'safe', got {mode!r}")
    if start.dim() != 2 or not start.is_floating_point():
        raise ValueError(f"start must be a floating tensor (B, D), got {start.dtype} {tuple(start.shape)}")
    if evaluations < 1 or history < 1:
        raise ValueError(f"evaluations and history must be at least 1, got {evaluations} and {history}")
    run = _Run(objective, start, mode == "safe", min(history, evaluations), lr, target, tolerance_grad, tolerance_change)
    for turn in range(evaluations):
        if turn:
            run.turn()
        if turn % _TURNS == _TURNS - 1 or bool(run.done.all()):
            run.compact()
            progress(f"{len(run.state.rows)} of {len(start)} rows still run after {turn + 1} evaluations")
            if not len(run.state.rows):
                break
    return run.result()


class _Run:
    """One call of :func:`minimise`.

    ``done`` says which rows of ``state`` only wait to be taken out.
    """

    def __init__(
        self,
        objective: Objective,
        start: Tensor,
        safe: bool,
        history: int,
        lr: float,
        target: float,
        tolerance_grad: float,
        tolerance_change: float,
    ) -> None:
        self._objective, self._safe, self._lr, self._target = objective, safe, lr, target
        self._tolerance_grad, self._tolerance_change = tolerance_grad, tolerance_change
        rows = torch.arange(len(start), device=start.device)
        point = start.detach().clone()
        loss, grad = self._evaluated(point, rows)
        zeros = torch.zeros_like(loss)
        finite = torch.isfinite(loss)
        self.best = torch.where(finite[:, None], point, start)
        self.best_loss = torch.where(finite, loss, torch.inf)
        self.evaluations = torch.ones_like(rows)
        self.reason: list[str] = ["evaluations"] * len(start)
        self.done = torch.zeros_like(rows, dtype=torch.bool)
        curvature = Curvature(grad, history)
        self.state = _State(rows, point, loss, grad, -grad, zeros, zeros, torch.zeros_like(rows), ~self.done, curvature)
        self._stop(~finite | ~torch.isfinite(grad).all(1), "diverged")
        self._stop(loss < target, "target")
        self._stop(grad.abs().amax(1) <= tolerance_grad, "gradient")
        self._begin(torch.ones_like(self.done))

    def _evaluated(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            losses = self._objective(points, rows)
            (grads,) = torch.autograd.grad(losses.sum(), points)
        return losses.detach(), grads.detach()

    def _stop(self, which_A: Tensor, reason: str) -> None:
        which_A = which_A & ~self.done
        for row in self.state.rows[which_A].tolist():
            self.reason[row] = reason
        self.done = self.done | which_A

    def compact(self) -> None:
        """Take the rows that are done out of the batch."""
        if self.done.any():
            self.state.kept(~self.done)
            self.done = self.done[~self.done]

    def result(self) -> Minimised:
        return Minimised(self.best, self.best_loss, self.evaluations, self.reason)

    def turn(self) -> None:
        """Evaluate every row's next point, and move the rows that accept theirs."""
        s = self.state
        point = torch.where(self.done[:, None], s.point, s.point + s.step[:, None] * s.direction)
        loss, grad = self._evaluated(point, s.rows)
        self.evaluations[s.rows[~self.done]] += 1
        finite = torch.isfinite(loss) & torch.isfinite(grad).all(1)
        self._remember(point, loss, finite)
        if self._safe:
            accepted = finite & (loss <= s.loss + _DESCENT * s.step * s.slope)
        else:
            self._stop(~finite, "diverged")
            accepted = finite
        self._stop(finite & (loss < self._target), "target")
        accepted = accepted & ~self.done
        change, moved = (loss - s.loss).abs(), (s.step[:, None] * s.direction).abs().amax(1)
        self._learn(point, grad, accepted)
        column = accepted[:, None]
        s.point, s.grad = torch.where(column, point, s.point), torch.where(column, grad, s.grad)
        s.loss = torch.where(accepted, loss, s.loss)
        self._stop(accepted & (s.grad.abs().amax(1) <= self._tolerance_grad), "gradient")
        small = (moved <= self._tolerance_change) | (change < self._tolerance_change)
        self._stop(accepted & small, "change")
        if self._safe:
            self._halve(~accepted & ~self.done)
        self._begin(accepted)

    def _remember(self, point: Tensor, loss: Tensor, finite: Tensor) -> None:
        rows = self.state.rows
        better = finite & ~self.done & (loss < self.best_loss[rows])
        self.best[rows[better]] = point[better]
        self.best_loss[rows[better]] = loss[better]

    def _halve(self, refused: Tensor) -> None:
        """A refused step is halved; after too many halvings the row forgets its curvature."""
        s = self.state
        s.step = torch.where(refused, s.step / 2, s.step)
        s.halvings = torch.where(refused, s.halvings + 1, s.halvings)
        stuck = refused & (s.halvings > _HALVINGS)
        # A fresh row steps along its own gradient. If no halving helped there, nothing will.
        self._stop(stuck & s.fresh, "stalled")
        again = stuck & ~s.fresh
        if again.any():
            s.curvature.forget(again)
            s.fresh = s.fresh | again
            self._begin(again)

    def _learn(self, point: Tensor, grad: Tensor, accepted: Tensor) -> None:
        """Enter what the accepted step says about the curvature."""
        s = self.state
        moved, turned = point - s.point, grad - s.grad
        learnt = accepted & ((moved * turned).sum(1) > _CURVATURE)
        s.curvature.learn(moved, turned, grad, accepted, learnt)
        s.fresh = s.fresh & ~accepted

    def _begin(self, which: Tensor) -> None:
        """A new direction and step for these rows."""
        s = self.state
        direction = torch.where(s.fresh[:, None], -s.grad, s.curvature.direction(s.grad))
        first = (1 / s.grad.abs().sum(1)).clamp_max(1.0) * self._lr
        step = torch.where(s.fresh, first, self._lr)
        slope = (s.grad * direction).sum(1)
        if self._safe:
            # Rounding can make a direction point uphill. The negative gradient never does.
            uphill = slope >= 0
            direction = torch.where(uphill[:, None], -s.grad, direction)
            slope = torch.where(uphill, -s.grad.square().sum(1), slope)
        self._stop(which & (slope > -self._tolerance_change), "change")
        s.direction = torch.where(which[:, None], direction, s.direction)
        s.step, s.slope = torch.where(which, step, s.step), torch.where(which, slope, s.slope)
        s.halvings = torch.where(which, 0, s.halvings)
