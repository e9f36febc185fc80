"""Columns (parameters) that are sharded over the ranks of ``torch.distributed``.

Every rank holds all rows of its own columns. Mask training treats each column by itself, except for
the loss, which depends on all columns. ``ShardedLoss`` gathers the P parameters, evaluates the loss
on the first rank, and hands every rank its slice of the gradient. A solver therefore runs unchanged
on the columns of one rank. Every function here that sends anything must be called on all ranks.

Shapes: there are P columns in all, and L of them are this rank's own.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ColumnShards", "ShardedLoss", "own_columns"]


class ColumnShards:
    """Which of P columns are this rank's own, and sums and gathers over the ranks.

    Columns are divided as ``torch.distributed.tensor.Shard(1)`` divides them: each rank holds
    ceil(P / ranks) columns, and the last rank holds the rest.

    Args:
        num_params: P.
        mesh: the one-dimensional mesh of the ranks. None means one process, which holds all columns
            and sends nothing.

    Attributes:
        num_params: P.
        columns: the slice of columns that are this rank's own.
        group: the process group of the ranks; None for one process.

    Raises:
        ValueError: a rank would hold no column.

    Example:
        >>> shards = ColumnShards(5)
        >>> shards.columns, shards.own_sizes([2, 3])
        (slice(0, 5, None), (2, 3))
    """

    def __init__(self, num_params: int, mesh: "DeviceMesh | None" = None) -> None:
        self.num_params = num_params
        self.group = None if mesh is None else mesh.get_group()
        self._rank, num_ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        self._num_ranks, self._width = num_ranks, -(-num_params // num_ranks)
        if self._width * (num_ranks - 1) >= num_params:
            raise ValueError(f"updates: {num_params} columns over {num_ranks} ranks leave one without any; use fewer ranks")
        first = self._rank * self._width
        self.columns = slice(first, min(first + self._width, num_params))
        # What holding_errors() keeps for from_first().
        self._held: Exception | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all of them."""
        return self._rank == 0

    def own(self, vector_P: Tensor) -> Tensor:
        """This rank's part, ``(L,)``, of a ``(P,)`` vector that every rank holds."""
        return vector_P[self.columns]

    def own_sizes(self, layer_sizes: Sequence[int]) -> tuple[int, ...]:
        """For each layer, the number of its columns that are this rank's own.

        Args:
            layer_sizes: the number of columns of each layer; the layers lie side by side.
        """
        begin, end = self.columns.start, self.columns.stop
        layers = zip(accumulate(layer_sizes), layer_sizes, strict=True)
        return tuple(max(0, min(last, end) - max(last - size, begin)) for last, size in layers)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; it overwrites ``tensor``, which is contiguous."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, own_L: Tensor) -> Tensor:
        """The whole vector, ``(P,)``, on every rank, from each rank's own part, ``(L,)``."""
        if self.group is None:
            return own_L
        # The collective wants parts of one length. Only the last rank's part can be shorter, so
        # that all padding is at the end of the result, where it is cut off.
        padded = torch.nn.functional.pad(own_L, (0, self._width - len(own_L)))
        parts = own_L.new_empty(self._num_ranks, self._width)
        dist.all_gather(list(parts), padded, group=self.group)
        return parts.view(-1)[: self.num_params]

    def from_first(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Compute a vector on the first rank only, and hand it to every rank.

        Args:
            compute: called on the first rank; it returns a vector of the form of ``like``.
            like: a vector of the same length, dtype and device.

        Raises:
            RuntimeError: ``compute`` failed, or the first rank holds an error, and this is not the
                first rank. The first rank raises the error itself.
        """
        if self.group is None:
            return compute()
        # The message is the vector, and one number that says whether there is one. If compute()
        # fails, it is sent all the same, so that no rank waits for something that never comes.
        message = like.new_zeros(len(like) + 1)
        error: Exception | None = None
        if self.is_first:
            try:
                if self._held is not None:
                    raise self._held
                message[:-1] = compute()
                message[-1] = 1
            except Exception as failure:
                error = failure
        dist.broadcast(message, group=self.group, group_src=0)
        if error is not None:
            raise error
        if message[-1] == 0:
            raise RuntimeError("the first rank of the mesh failed; its own error says why")
        return message[:-1]

    def holding_errors(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function, for the first rank to call alone between two collectives.

        If it failed at once, the other ranks would wait for the first one for ever. Its error is
        therefore held until the next :meth:`from_first` or :meth:`raise_held`, which ends the work
        on every rank. It is not called again after an error. One process gets the function
        itself.
        """
        if self.group is None:
            return function

        def held(*arguments: object) -> None:
            if self._held is None:
                try:
                    function(*arguments)
                except Exception as error:
                    self._held = error

        return held

    def raise_held(self, device: torch.device) -> None:
        """Raise the error that the first rank holds, if any, as :meth:`from_first` does."""
        if self.group is not None:
            nothing = torch.empty(0, device=device)
            self.from_first(lambda: nothing, like=nothing)


class _Loss(Protocol):
    layer_sizes: tuple[int, ...]

    def __call__(self, params_P: Tensor) -> Tensor: ...


class ShardedLoss:
    """A loss of all P parameters as a function of this rank's own parameters, ``(L,)``.

    It can be differentiated once, and must be called on all ranks at the same time. A call takes
    one all-gather of P values and one broadcast of the value and the gradient. Only the first rank
    evaluates ``loss``. If the gradient is not finite in one place, it becomes NaN everywhere, so
    that all ranks notice.

    Args:
        loss: the loss of all P parameters.
        shards: which columns are this rank's own.

    Attributes:
        layer_sizes: for each layer, the number of its parameters that are this rank's own.
    """

    def __init__(self, loss: _Loss, shards: ColumnShards) -> None:
        self._loss, self._shards = loss, shards
        self.layer_sizes = shards.own_sizes(loss.layer_sizes)

    def __call__(self, params_L: Tensor) -> Tensor:
        value: Tensor = _OnFirstRank.apply(params_L, self._loss, self._shards)
        return value


class _OnFirstRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, params_L: Tensor, loss: _Loss, shards: ColumnShards) -> Tensor:
        params_P = shards.gather(params_L.detach())

        def gradient_and_value() -> Tensor:
            with torch.enable_grad():
                value = loss(params_P.requires_grad_())
                (grad_P,) = torch.autograd.grad(value, params_P)
            grad_P = torch.where(grad_P.isfinite().all(), grad_P, torch.nan)
            return torch.cat([grad_P, value.detach().to(grad_P.dtype).reshape(1)])

        result = shards.from_first(gradient_and_value, like=params_P.new_empty(shards.num_params + 1))
        ctx.save_for_backward(shards.own(result))
        return result[-1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad_L,) = ctx.saved_tensors
        return upstream[0] * grad_L, None, None


def own_columns(updates: Any, num_params: int) -> tuple[ColumnShards, Any]:
    """Tell how the columns of ``updates`` are sharded, and return this rank's own, ``(N, L)``.

    Anything but a ``DTensor`` is not sharded, has ``num_params`` columns, and is returned as it is.

    Raises:
        ValueError: a ``DTensor`` is not sharded by columns over a one-dimensional mesh, or the
            parts of the ranks do not fit together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ColumnShards(num_params), updates
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(updates, DTensor):
        return ColumnShards(num_params), updates
    mesh, placements = updates.device_mesh, tuple(updates.placements)
    if updates.dim() != 2 or placements != (Shard(1),):
        raise ValueError(
            "updates as a DTensor must be (N, P) with placements [Shard(1)] over a 1-D DeviceMesh, all rows of a rank's "
            f"columns on each, got {tuple(updates.shape)} with {list(placements)} over a mesh of shape {tuple(mesh.shape)}; "
            "use torch.distributed.tensor.distribute_tensor(updates, mesh, [Shard(1)]), or updates.redistribute()"
        )
    own_NL: Tensor = updates.to_local().detach()
    shards = ColumnShards(updates.shape[1], mesh)
    _check_parts(updates, own_NL, shards, mesh.size())
    return shards, own_NL


def _check_parts(updates: Tensor, own_NL: Tensor, shards: ColumnShards, num_ranks: int) -> None:
    """Check the form of all ranks' parts on every rank.

    All ranks then raise the same error, and none is left waiting for a rank that gave up.
    """
    num_clients, num_params = updates.shape
    width = shards.columns.stop - shards.columns.start
    fits = tuple(own_NL.shape) == (num_clients, width)
    form = torch.tensor([num_clients, num_params, *own_NL.shape, fits], device=own_NL.device)
    forms = form.new_empty(num_ranks, len(form))
    dist.all_gather(list(forms), form, group=shards.group)
    ranks = forms.tolist()
    if not all(rank[-1] and rank[:2] == ranks[0][:2] for rank in ranks):
        parts = ", ".join(f"({rows}, {columns}) of ({n}, {p})" for n, p, rows, columns, _ in ranks)
        raise ValueError(
            "updates: the ranks' parts must be the columns of one (N, P) tensor, ceil(P / ranks) each and the last rank's the "
            f"rest, got {parts}; pass shape=(N, P) and stride=(P, 1) to DTensor.from_local, and the same clients on every rank"
        )
