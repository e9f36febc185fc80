"""Columns (parameters) sharded over the ranks of ``torch.distributed``: who holds which, and what the ranks do together.

Every rank holds all rows of its own columns. Mask training treats each column alone but for the loss, which sees all of them:
``ShardedLoss`` gathers the P parameters, evaluates them on the first rank and hands every rank its slice of the gradient, so
that a solver runs unchanged on the columns of a rank. Every function here that sends anything must be called on all ranks.

Shapes: P columns in all, L of them this rank's own.
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

    Columns are divided as ``torch.distributed.tensor.Shard(1)`` divides them: ceil(P / ranks) each, the last rank the rest.

    Args:
        num_params: P.
        mesh: one-dimensional; None: one process that holds all columns and sends nothing.

    Attributes:
        num_params: P.
        columns: this rank's own.
        group: of the ranks; None for one process.

    Raises:
        ValueError: a rank would hold no column.
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

    def own(self, vector_P: Tensor) -> Tensor:
        """This rank's part, ``(L,)``, of a vector that every rank holds."""
        return vector_P[self.columns]

    def own_sizes(self, layer_sizes: Sequence[int]) -> tuple[int, ...]:
        """How many columns of each layer, the layers lying side by side, are this rank's own."""
        begin, end = self.columns.start, self.columns.stop
        layers = zip(accumulate(layer_sizes), layer_sizes, strict=True)
        return tuple(max(0, min(last, end) - max(last - size, begin)) for last, size in layers)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; overwrites ``tensor``, which is contiguous."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def norms(self, own_norms_K: Tensor) -> Tensor:
        """Euclidean norms of whole rows, ``(K,)`` float32, from those of each rank's columns; Inf where a square overflows."""
        if self.group is None:
            return own_norms_K
        return self.sum(own_norms_K.double().square()).float().sqrt()

    def gather(self, own_L: Tensor) -> Tensor:
        """The whole vector, ``(P,)``, on every rank, from each rank's part."""
        if self.group is None:
            return own_L
        # all parts of one length, as the collective wants them: only the last can be shorter, so the padding comes last
        padded = torch.nn.functional.pad(own_L, (0, self._width - len(own_L)))
        parts = own_L.new_empty(self._num_ranks, self._width)
        dist.all_gather(list(parts), padded, group=self.group)
        return parts.view(-1)[: self.num_params]

    def from_first(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What ``compute`` gives on the first rank, a vector like ``like``, on every rank; the others do not call it.

        Raises:
            RuntimeError: ``compute`` failed, and this is not the first rank; there its own error is raised.
        """
        if self.group is None:
            return compute()
        message = like.new_zeros(len(like) + 1)  # the vector, and whether it is one: no rank must wait for what never comes
        error: Exception | None = None
        if self._rank == 0:
            try:
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


class _Loss(Protocol):
    layer_sizes: tuple[int, ...]

    def __call__(self, params_P: Tensor) -> Tensor: ...


class ShardedLoss:
    """A loss of all P parameters as a function of this rank's own, ``(L,)``; differentiable once, called on all ranks at once.

    A call is one all-gather of P values and one broadcast of the value and the gradient; only the first rank evaluates
    ``loss``. A gradient that is not finite somewhere is NaN everywhere, so that all ranks notice.

    Attributes:
        layer_sizes: how many parameters of each layer are this rank's own.
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
    """How the columns of ``updates`` are sharded, and this rank's own, ``(N, L)``.

    Whatever is no ``DTensor`` is not sharded, has ``num_params`` columns, and is returned as it is.

    Raises:
        ValueError: a ``DTensor`` is not sharded by columns over a one-dimensional mesh, or the ranks' parts do not fit.
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
    """Every rank sees the parts of all: none is left waiting for one that gave up."""
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
