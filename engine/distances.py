"""``Distances``: the (R, R) matrix of Hamming shares, in the form that clustering reads.

It is stored as whole numbers of 16 or 32 bits, so that a matrix for 20,000 rows still fits in
memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.bits import keep_share
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.kernels.anywhere import count_products, hamming_counts, hamming_counts_between, varying_ones
from skymask_gpu.kernels.product import COUNTS, count_products_reference

__all__ = ["Distances", "mask_distances", "sharded_distances", "sharded_keep_share"]

# Up to this number of rows, counts are exact, in int32. Beyond it they are rounded to uint16, which
# takes 800 MB for 20,000 rows.
_EXACT_ROWS = 4096
# The number of elements of a temporary that is made from rows of the matrix.
_CHUNK_ELEMENTS = 2**22
# Up to this number of vectors, products are computed by a kernel.
_FEW_VECTORS = 8


@dataclass(frozen=True)
class Distances:
    """The symmetric distances between R rows; a few rows at a time are converted to float64.

    Attributes:
        stored: ``(R, R)`` of any real dtype.
        unit: the distance that a stored value of 1 stands for: the distances are ``stored * unit``.

    Example:
        >>> distances = Distances(torch.tensor([[0, 2], [2, 0]]), unit=0.25)
        >>> distances.row(0)
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """

    stored: Tensor
    unit: float = 1.0

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def row(self, number: int) -> Tensor:
        """The distances of one row to all rows, ``(R,)`` float64."""
        return self.stored[number].to(torch.float64) * self.unit

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield all rows in turn, as ``(number of the first row, (n, R) float64)``.

        Each block overwrites the one before it.
        """
        for first, block_TR in self._converted():
            yield first, block_TR.mul_(self.unit)

    def times(self, vectors_RK: Tensor) -> Tensor:
        """The product of the matrix with ``(R, K)`` float64 vectors: ``(R, K)`` float64."""
        if self.stored.dtype == torch.float64:
            return self.stored @ (vectors_RK * self.unit)
        # With many vectors, a product takes longer than the conversion that the kernel saves.
        few_counts = self.stored.dtype in COUNTS and self.stored.is_contiguous() and vectors_RK.shape[1] <= _FEW_VECTORS
        product = count_products if few_counts else count_products_reference
        return product(self.stored, vectors_RK * self.unit)

    def _converted(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the stored rows in float64, a block at a time."""
        num_rows = len(self.stored)
        step = max(1, min(num_rows, _CHUNK_ELEMENTS // num_rows))
        # One buffer serves all blocks. With a large temporary per block and small results in
        # between, the C library could not give the memory back to the system.
        buffer_TR = torch.empty(step, num_rows, dtype=torch.float64, device=self.device)
        for first in range(0, num_rows, step):
            part_TR = self.stored[first : first + step]
            yield first, buffer_TR[: len(part_TR)].copy_(part_TR)


def mask_distances(bits: Tensor, num_params: int) -> Distances:
    """The share of bits in which each two rows of packed bits differ.

    With more than 4,096 rows, the counts are rounded to 1/65,535 of the largest possible one.

    Args:
        bits: ``(R, ceil(P / 8))`` uint8; padding bits are 0.
        num_params: P.

    Example:
        >>> mask_distances(torch.tensor([[0b0111], [0b0001]], dtype=torch.uint8), 4).row(0)
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    with phase("distances", bits, 4 * len(bits) ** 2):
        if len(bits) <= _EXACT_ROWS:
            return Distances(hamming_counts(bits), 1 / num_params)
        unit = -(-num_params // (2**16 - 1))
        return Distances(hamming_counts(bits, unit, torch.uint16), unit / num_params)


def sharded_keep_share(bits: Tensor, shards: ColumnShards) -> Tensor:
    """The keep share of each row, ``(R,)`` float64; see :func:`skymask_gpu.engine.bits.keep_share`.

    Each rank passes the bits of its own columns, and every rank gets the same result.
    """
    with phase("distances", bits, bits):
        return keep_share(shards.sum(varying_ones(bits)))


def sharded_distances(bits: Tensor, shards: ColumnShards) -> Distances:
    """:func:`mask_distances` for sharded columns.

    Each rank passes the bits of its own columns, and every rank gets the same matrix.
    """
    if shards.group is None:
        return mask_distances(bits, shards.num_params)
    with phase("distances", bits, 4 * len(bits) ** 2):
        num_rows = len(bits)
        if num_rows <= _EXACT_ROWS:
            return Distances(shards.sum(hamming_counts(bits)), 1 / shards.num_params)
        # Counts are rounded after they are summed over the ranks, so until then they must be exact.
        # Exact counts of all rows would be too large, so two groups of rows are compared at a time.
        unit = -(-shards.num_params // (2**16 - 1))
        stored_RR = torch.empty(num_rows, num_rows, dtype=torch.uint16, device=bits.device)
        step = _EXACT_ROWS
        groups = [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
        for number, some in enumerate(groups):
            for others in groups[number:]:
                counts_SO = shards.sum(hamming_counts_between(bits[some], bits[others]))
                rounded_SO = ((counts_SO + unit // 2) // unit).to(torch.uint16)
                stored_RR[some, others], stored_RR[others, some] = rounded_SO, rounded_SO.T
        return Distances(stored_RR, unit / shards.num_params)
