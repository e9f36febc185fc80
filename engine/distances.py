"""``Distances``: the (R, R) matrix of Hamming shares as clustering reads it, small enough to hold for 20,000 rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.bits import keep_share
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.kernels.anywhere import hamming_counts, varying_ones

__all__ = ["Distances", "mask_distances", "sharded_distances", "sharded_keep_share"]

# Up to so many rows counts are held exactly, in int32; beyond, in uint16: 800 MB for 20,000 rows.
_EXACT_ROWS = 4096
# Elements of a temporary made from rows of the matrix.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Distances:
    """Symmetric distances of R rows, as float64 a few rows at a time.

    Attributes:
        stored: ``(R, R)`` of any real dtype.
        unit: what one of ``stored`` is worth.
    """

    stored: Tensor
    unit: float = 1.0

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def row(self, number: int) -> Tensor:
        """``(R,)`` float64."""
        return self.stored[number].to(torch.float64) * self.unit

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows in turn, ``(n, R)`` float64, each with its first row's number; the next overwrites the one before."""
        num_rows = len(self.stored)
        step = max(1, min(num_rows, _CHUNK_ELEMENTS // num_rows))
        # one buffer: the C library would not give back what many large temporaries and small results between them took
        buffer_TR = torch.empty(step, num_rows, dtype=torch.float64, device=self.device)
        for first in range(0, num_rows, step):
            part_TR = self.stored[first : first + step]
            yield first, buffer_TR[: len(part_TR)].copy_(part_TR).mul_(self.unit)

    def times(self, vectors_RK: Tensor) -> Tensor:
        """The product of the matrix with ``(R, K)`` float64 vectors."""
        product_RK = torch.empty_like(vectors_RK)
        for first, block_TR in self.blocks():
            product_RK[first : first + len(block_TR)] = block_TR @ vectors_RK
        return product_RK


def mask_distances(bits: Tensor, num_params: int) -> Distances:
    """The share of bits in which two rows of packed bits differ; of many rows rounded to 1/65,535 of the largest possible."""
    with phase("distances", bits, 4 * len(bits) ** 2):
        if len(bits) <= _EXACT_ROWS:
            return Distances(hamming_counts(bits), 1 / num_params)
        unit = -(-num_params // (2**16 - 1))
        return Distances(hamming_counts(bits, unit, torch.uint16), unit / num_params)


def sharded_keep_share(bits: Tensor, shards: ColumnShards) -> Tensor:
    """The keep share, ``(R,)`` float64, of bits of which each rank holds those of its own columns; the same on every rank."""
    with phase("distances", bits, bits):
        return keep_share(shards.sum(varying_ones(bits)))


def sharded_distances(bits: Tensor, shards: ColumnShards) -> Distances:
    """:func:`mask_distances` of bits of which each rank holds those of its own columns; the same matrix on every rank."""
    if shards.group is None:
        return mask_distances(bits, shards.num_params)
    with phase("distances", bits, 4 * len(bits) ** 2):
        num_rows = len(bits)
        if num_rows <= _EXACT_ROWS:
            return Distances(shards.sum(hamming_counts(bits)), 1 / shards.num_params)
        # counts are rounded once they are summed, so they are held exactly: for two groups of rows at a time
        unit = -(-shards.num_params // (2**16 - 1))
        stored_RR = torch.empty(num_rows, num_rows, dtype=torch.uint16, device=bits.device)
        step = _EXACT_ROWS // 2
        groups = [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
        for number, some in enumerate(groups):
            for others in groups[number:]:
                pairs_TT = hamming_counts(torch.cat([bits[some], bits[others]]))
                counts_SO = shards.sum(pairs_TT[: some.stop - some.start, some.stop - some.start :].contiguous())
                rounded_SO = ((counts_SO + unit // 2) // unit).to(torch.uint16)
                stored_RR[some, others], stored_RR[others, some] = rounded_SO, rounded_SO.T
        return Distances(stored_RR, unit / shards.num_params)
