"""The ranks of a run under torchrun: whose clients are whose, and what they send each other.

Every rank plays every round. It trains its own block of clients only; then the ranks exchange what
came out. The first rank alone writes files and tests the model.

R ranks, C rows of a round (its clients, and the root model as the last row), P parameters.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.io.torchrun import column_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks"]

Result = TypeVar("Result")


class Ranks:
    """The processes that play one run together.

    Everything that sends must be called on all ranks, in the same order.

    Args:
        mesh: the one-dimensional mesh of the ranks; None for one process, which sends nothing.

    Attributes:
        mesh: the mesh.
        number: which rank this process is.
        count: R.

    Example:
        >>> alone = Ranks()
        >>> alone.is_first, alone.own_rows(5), Ranks.blocks(5, 2)
        (True, slice(0, 5, None), [slice(0, 3, None), slice(3, 5, None)])
    """

    def __init__(self, mesh: "DeviceMesh | None" = None) -> None:
        self.mesh = mesh
        self.number, self.count = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, tests and writes."""
        return self.number == 0

    @staticmethod
    def blocks(num_rows: int, count: int) -> list[slice]:
        """Each rank's block of rows; their sizes differ by at most one."""
        least, longer = divmod(num_rows, count)
        ends = [least * rank + min(rank, longer) for rank in range(count + 1)]
        return [slice(begin, end) for begin, end in pairwise(ends)]

    def own_rows(self, num_rows: int) -> slice:
        """The rows that this rank trains."""
        return self.blocks(num_rows, self.count)[self.number]

    def check(self, num_clients: int, num_params: int) -> None:
        """Refuse ranks that would have nothing to do.

        Args:
            num_clients: the number of clients of a round.
            num_params: P.

        Raises:
            ValueError: there are more ranks than clients, or a rank would hold no parameter.
        """
        if self.count > num_clients:
            raise ValueError(
                f"torchrun: the number of processes must be at most {num_clients}, the clients of a round, got {self.count}; "
                "start fewer, or raise data.clients or clients_per_round"
            )
        ColumnShards(num_params, self.mesh)

    def together(self, work: Callable[[], Result]) -> Result:
        """Do work that sends nothing; if it fails on one rank, all ranks end.

        Otherwise the others would wait for the failed one for ever.

        Raises:
            ValueError: it failed on another rank. A rank on which it failed raises its own error.
        """
        if self.mesh is None:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as failure:
            error = failure
        failed = torch.tensor([float(error is not None)], device=self._device())
        dist.all_reduce(failed, group=self.mesh.get_group())
        if error is not None:
            raise error
        if failed.item():
            raise ValueError("the run ended because another rank failed; its own error says why")
        return result

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Do work that sends nothing on the first rank, while the others wait; see ``together``.

        The others get None.
        """
        return self.together(lambda: work() if self.is_first else None)

    def agree(self, value: int, what: str) -> None:
        """Raise a ValueError on every rank unless all have the same value."""
        if self.mesh is None:
            return
        values = self.gathered(torch.tensor([value], device=self._device()), self.count).tolist()
        if len(set(values)) > 1:
            raise ValueError(f"{what} differs between the ranks: {values}; --out must be one folder that every machine sees")

    def gathered(self, own: Tensor, num_rows: int) -> Tensor:
        """All rows, ``(C, ...)``, on every rank, from each rank's own block, ``(c, ...)``."""
        if self.mesh is None:
            return own
        blocks = self.blocks(num_rows, self.count)
        # The collective wants parts of one length, so shorter blocks are padded by a row.
        longest = blocks[0].stop
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in blocks]
        dist.all_gather(parts, padded, group=self.mesh.get_group())
        return torch.cat([part[: rows.stop - rows.start] for part, rows in zip(parts, blocks, strict=True)])

    def in_columns(self, own_cP: Tensor, num_rows: int) -> Tensor:
        """Rows become columns: ``(C, L)``, all rows of this rank's own columns, by one all-to-all.

        Args:
            own_cP: ``(c, P)``, this rank's block of rows.
            num_rows: C.
        """
        assert self.mesh is not None, "one process has all columns"
        num_params = own_cP.shape[1]
        width = -(-num_params // self.count)
        own = ColumnShards(num_params, self.mesh).columns
        sent = own_cP.split(width, dim=1)
        sizes = [rows.stop - rows.start for rows in self.blocks(num_rows, self.count)]
        got_CL = own_cP.new_empty(num_rows, own.stop - own.start)
        dist.all_to_all_single(
            got_CL.view(-1),
            torch.cat([part.reshape(-1) for part in sent]),
            [size * got_CL.shape[1] for size in sizes],
            [part.numel() for part in sent],
            group=self.mesh.get_group(),
        )
        return got_CL

    def sharded(self, own_ML: Tensor, num_params: int) -> Tensor:
        """The ``DTensor`` ``(M, P)``, sharded by columns; ``own_ML`` is this part of it."""
        assert self.mesh is not None, "one process has all columns"
        return column_sharded(own_ML, num_params, self.mesh)

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank: rounding must not let the ranks drift apart."""
        if self.mesh is None:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.mesh.get_group(), group_src=0)
        return tensor

    def _device(self) -> torch.device:
        assert self.mesh is not None, "one process sends nothing"
        return torch.device("cuda", torch.cuda.current_device()) if self.mesh.device_type == "cuda" else torch.device("cpu")
