"""``ClientBlocks``: rows of updates that come in blocks and are read as often as needed, so that disk limits N, not memory."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skymask_gpu.engine.profiling import phase

__all__ = ["ClientBlocks"]

# A file's rows are handed out so many bytes at a time.
_BLOCK_BYTES = 2**26


class ClientBlocks:
    """Updates of many clients, block by block: iterate over it for ``(n, P)`` tensors, as often as needed.

    Args:
        blocks: a list of ``(n, P)`` tensors, float32 or bfloat16, all of one dtype and device; see :meth:`from_folder` for
            rows that stay on disk.

    Attributes:
        sizes: the number of rows of each block.
        num_params: P.
        dtype: of the updates.
        device: where the blocks are.
        in_memory: whether reading a block costs nothing.

    Raises:
        ValueError: there is no row, or the blocks do not fit together.

    Example:
        >>> blocks = ClientBlocks([torch.zeros(3, 5), torch.ones(2, 5)])
        >>> len(blocks), [tuple(block.shape) for block in blocks]
        (5, [(3, 5), (2, 5)])
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        if not blocks or not all(isinstance(block, Tensor) and block.dim() == 2 and 0 not in block.shape for block in blocks):
            got = [tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__ for b in blocks]
            raise ValueError(f"blocks must be non-empty (n, P) tensors, got {got or 'none'}")
        kinds = {(block.shape[1], block.dtype, block.device) for block in blocks}
        if len(kinds) > 1:
            raise ValueError(f"blocks must agree in P, dtype and device, got {sorted(map(str, kinds))}")
        self._read: Callable[[int], Tensor] = blocks.__getitem__
        self.sizes: tuple[int, ...] = tuple(len(block) for block in blocks)
        ((self.num_params, self.dtype, self.device),) = kinds
        self.in_memory = True

    @classmethod
    def from_reader(
        cls,
        sizes: Sequence[int],
        num_params: int,
        dtype: torch.dtype,
        read: Callable[[int], Tensor],
        device: torch.device = torch.device("cpu"),
    ) -> Self:
        """Blocks that ``read(b)`` makes, ``(sizes[b], num_params)`` each, anew whenever they are needed."""
        blocks = cls.__new__(cls)
        blocks._read, blocks.sizes = read, tuple(sizes)
        blocks.num_params, blocks.dtype, blocks.device = num_params, dtype, device
        blocks.in_memory = False
        return blocks

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """The safetensors files of a folder in the order of their names, each with one ``(n, P)`` tensor, memory-mapped.

        Raises:
            ValueError: no such file, or one that is not readable, or that does not fit the others.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"folder: no *.safetensors file in {folder}")
        pieces: list[tuple[Path, int, int]] = []
        kinds = {}
        for file in files:
            with _stacked(file) as rows:
                num_rows, num_params = rows.get_shape()
                kinds[num_params, rows.get_dtype()] = file
                step = max(1, _BLOCK_BYTES // (4 * num_params))
                pieces += [(file, first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
        if len(kinds) > 1:
            found = "; ".join(f"{file.name}: {num_params} parameters in {dtype}" for (num_params, dtype), file in kinds.items())
            raise ValueError(f"folder: the files of {folder} must agree in P and dtype, got {found}")
        ((num_params, dtype_name),) = kinds
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
        if dtype_name not in dtypes:
            raise ValueError(f"folder: the updates of {folder} must be float32 or bfloat16, got {dtype_name}")

        def read(number: int) -> Tensor:
            file, first, end = pieces[number]
            with _stacked(file) as rows:
                block: Tensor = rows[first:end]
            return block

        return cls.from_reader([end - first for _, first, end in pieces], num_params, dtypes[dtype_name], read)

    def __len__(self) -> int:
        """The number of rows."""
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows, wherever they are."""
        return len(self) * self.num_params * self.dtype.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(len(self.sizes)):
            yield self._read(number)

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The rows with these ascending numbers, ``(P,)`` each, with their numbers; a block is read once."""
        ends = list(itertools.accumulate(self.sizes))
        for number, group in itertools.groupby(wanted, key=lambda row: bisect.bisect_right(ends, row)):
            block = self._read(number)
            for row in group:
                yield row, block[row - (ends[number] - self.sizes[number])]

    def select(self, keep_N: Tensor) -> "ClientBlocks":
        """Only the rows where ``keep_N``, ``(N,)`` bool, of which at least one is set."""
        keeps = keep_N.split(self.sizes)
        numbers = [number for number, keep in enumerate(keeps) if keep.any()]
        if self.in_memory:
            return ClientBlocks([self._read(n) if keeps[n].all() else self._read(n)[keeps[n]] for n in numbers])
        read, sizes = self._read, [int(keeps[n].sum()) for n in numbers]

        def read_kept(number: int) -> Tensor:
            keep = keeps[numbers[number]]
            return read(numbers[number])[keep]

        return self.from_reader(sizes, self.num_params, self.dtype, read_kept, self.device)

    def to(self, device: torch.device) -> "ClientBlocks":
        """The same rows on another device; those on disk are moved when they are read."""
        if device == self.device:
            return self
        if self.in_memory:
            return ClientBlocks([block.to(device) for block in self])
        read = self._read
        return self.from_reader(self.sizes, self.num_params, self.dtype, lambda number: read(number).to(device), device)

    def with_last(self, row_P: Tensor) -> "ClientBlocks":
        """These rows and one more."""
        last_1P = row_P[None].to(self.device, self.dtype)
        if self.in_memory:
            return ClientBlocks([*self, last_1P])
        read, count = self._read, len(self.sizes)

        def read_or_last(number: int) -> Tensor:
            return read(number) if number < count else last_1P

        return self.from_reader([*self.sizes, 1], self.num_params, self.dtype, read_or_last, self.device)

    def stack(self) -> Tensor:
        """All rows in one ``(N, P)`` tensor in memory, its row stride a multiple of 8 so that kernels can load 16 bytes."""
        if self.in_memory and len(self.sizes) == 1:
            return self._read(0)
        with phase("collect", 2 * self.nbytes):
            storage = torch.empty(len(self), -(-self.num_params // 8) * 8, dtype=self.dtype, device=self.device)
            stacked_NP = storage[:, : self.num_params]
            first = 0
            for block in self:
                stacked_NP[first : first + len(block)] = block
                first += len(block)
        return stacked_NP


@contextmanager
def _stacked(path: Path) -> Iterator[Any]:
    """The only tensor of a safetensors file, as a slice that is read when it is indexed."""
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"folder: {path} is no safetensors file: {error}") from error
    with file:
        names = list(file.keys())
        rows = file.get_slice(names[0]) if len(names) == 1 else None
        if rows is None or len(rows.get_shape()) != 2 or 0 in rows.get_shape():
            raise ValueError(f"folder: {path} must hold one non-empty (n, P) tensor, it holds {', '.join(names) or 'none'}")
        yield rows
