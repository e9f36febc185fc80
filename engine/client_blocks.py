"""``ClientBlocks``: rows of updates that are read block by block, as often as needed.

Rows that stay on disk are never in memory all at once. The number of clients is then limited by the
disk, not by memory.
"""

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

# The rows of a file are handed out in blocks of about this many bytes (64 MiB).
_BLOCK_BYTES = 2**26


class ClientBlocks:
    """The updates of many clients, in blocks of rows.

    Iterating over it gives one ``(n, P)`` tensor after the other, as often as needed.

    Args:
        blocks: a list of ``(n, P)`` tensors in float32 or bfloat16, of any strides, all with the
            same P, dtype and device. :meth:`from_folder` is for rows that stay on disk.

    Attributes:
        sizes: the number of rows of each block.
        num_params: P.
        dtype: the dtype of the updates.
        device: where the blocks are.
        nbytes: the number of bytes of all rows, in memory or on disk.
        in_memory: whether all blocks are in memory already, so that reading one costs nothing.

    Raises:
        ValueError: there is no row, or the blocks do not fit together. Later, a block that is read
            anew has another shape, dtype or device than was announced; the error names its number
            and its file.

    Example:
        >>> blocks = ClientBlocks([torch.zeros(3, 5), torch.ones(2, 5)])
        >>> len(blocks), [tuple(block.shape) for block in blocks]
        (5, [(3, 5), (2, 5)])
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        if len(blocks) == 0 or not all(_is_dense(block) and block.dim() == 2 and 0 not in block.shape for block in blocks):
            got = [_form(block) for block in blocks]
            raise ValueError(f"blocks must be non-empty, dense (n, P) tensors, got {'; '.join(got) or 'none'}")
        kinds = {(block.shape[1], block.dtype, block.device) for block in blocks}
        if len(kinds) > 1:
            raise ValueError(f"blocks must agree in P, dtype and device, got {sorted(map(str, kinds))}")
        self._read_unchecked: Callable[[int], Tensor] = [_plain_rows(block) for block in blocks].__getitem__
        self._names: Sequence[str] | None = None
        self.sizes: tuple[int, ...] = tuple(len(block) for block in blocks)
        ((self.num_params, self.dtype, self.device),) = kinds
        self.nbytes = len(self) * self.num_params * self.dtype.itemsize
        self.in_memory = True

    @classmethod
    def from_reader(
        cls,
        sizes: Sequence[int],
        num_params: int,
        dtype: torch.dtype,
        read: Callable[[int], Tensor],
        device: torch.device | str = "cpu",
        names: Sequence[str] | None = None,
    ) -> Self:
        """Blocks that a function reads or computes each time they are needed.

        Args:
            sizes: the number of rows of each block.
            num_params: P.
            dtype: the dtype of the blocks.
            read: ``read(b)`` gives block b, ``(sizes[b], num_params)``, the same values every time.
            device: where the blocks are.
            names: what errors call each block, beside its number; for instance its file.

        Raises:
            ValueError: there is no row.

        Example:
            >>> def read(number):
            ...     return torch.full((2, 3), float(number))
            >>> blocks = ClientBlocks.from_reader([2, 2], 3, torch.float32, read)
            >>> [block[0].tolist() for block in blocks]
            [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
        """
        if not sizes or min(sizes) < 1 or num_params < 1:
            raise ValueError(f"sizes and num_params must be at least 1, got {list(sizes)} rows of {num_params} parameters")
        blocks = cls.__new__(cls)
        blocks._read_unchecked, blocks._names, blocks.sizes = read, names, tuple(sizes)
        # "cuda" means the GPU that is current now, but a tensor there says "cuda:0". An empty
        # tensor tells the full name, so that comparing a block's device with this one works.
        blocks.num_params, blocks.dtype, blocks.device = num_params, dtype, torch.empty(0, device=device).device
        blocks.nbytes = len(blocks) * num_params * dtype.itemsize
        blocks.in_memory = False
        return blocks

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """The safetensors files of a folder, memory-mapped, in the order of their names.

        Each file holds one ``(n, P)`` tensor.

        Raises:
            ValueError: the folder has no such file, or a file cannot be read or does not fit the
                others. Later, a file has changed since it was first read.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from safetensors.torch import save_file
            >>> with TemporaryDirectory() as folder:
            ...     save_file({"updates": torch.ones(3, 5)}, f"{folder}/0000.safetensors")
            ...     save_file({"updates": torch.ones(2, 5)}, f"{folder}/0001.safetensors")
            ...     blocks = ClientBlocks.from_folder(folder)
            ...     print(len(blocks), blocks.num_params, blocks.in_memory)
            5 5 False
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"folder: no *.safetensors file in {folder}")
        pieces: list[tuple[Path, int, int]] = []
        kinds = {}
        stamps = {file: _stamp(file) for file in files}
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
            _refuse_changed(file, stamps[file])
            with _stacked(file) as rows:
                block: Tensor = rows[first:end]
            _refuse_changed(file, stamps[file])
            return block

        names = [f"rows {first} to {end} of {file}" for file, first, end in pieces]
        return cls.from_reader(
            [end - first for _, first, end in pieces], num_params, dtypes[dtype_name], read, torch.device("cpu"), names
        )

    def __len__(self) -> int:
        """The number of rows."""
        return sum(self.sizes)

    def _read(self, number: int) -> Tensor:
        """Read a block and check that it has the shape, dtype and device that were announced.

        Compiled code works on it that checks no bounds, so a wrong shape would corrupt memory.
        """
        block = self._read_unchecked(number)
        wanted = (self.sizes[number], self.num_params)
        if not _is_dense(block) or (tuple(block.shape), block.dtype, block.device) != (wanted, self.dtype, self.device):
            name = "" if self._names is None else f" ({self._names[number]})"
            raise ValueError(
                f"updates: block {number}{name} must be a dense {wanted} tensor of {self.dtype} on {self.device} at each "
                f"reading, got {_form(block)}; what is read must not change during a round"
            )
        return _plain_rows(block)

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(len(self.sizes)):
            yield self._read(number)

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(number, row)`` for the rows with these ascending numbers; a row is ``(P,)``.

        Each block that holds one of them is read once.
        """
        ends = list(itertools.accumulate(self.sizes))
        for number, group in itertools.groupby(wanted, key=lambda row: bisect.bisect_right(ends, row)):
            block = self._read(number)
            for row in group:
                yield row, block[row - (ends[number] - self.sizes[number])]

    def select(self, keep_N: Tensor) -> "ClientBlocks":
        """Only the rows where ``keep_N``, ``(N,)`` bool, is True; at least one must be."""
        keeps = keep_N.split(self.sizes)
        numbers = [number for number, keep in enumerate(keeps) if keep.any()]
        if self.in_memory:
            return ClientBlocks([self._read(n) if keeps[n].all() else self._read(n)[keeps[n]] for n in numbers])
        read, sizes = self._read, [int(keeps[n].sum()) for n in numbers]

        def read_kept(number: int) -> Tensor:
            keep = keeps[numbers[number]]
            return read(numbers[number])[keep]

        return self.from_reader(sizes, self.num_params, self.dtype, read_kept, self.device)

    def to(self, device: torch.device | str) -> "ClientBlocks":
        """The same rows on another device; rows on disk are moved when they are read."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if self.in_memory:
            return ClientBlocks([block.to(device) for block in self])
        read = self._read
        return self.from_reader(self.sizes, self.num_params, self.dtype, lambda number: read(number).to(device), device)

    def minus(self, row_P: Tensor) -> "ClientBlocks":
        """Each row minus ``row_P``, in float32; rows on disk are changed when they are read."""
        row_P = row_P.to(self.device, torch.float32)
        if self.in_memory:
            return ClientBlocks([block.float() - row_P for block in self])
        read = self._read
        return self.from_reader(
            self.sizes, self.num_params, torch.float32, lambda number: read(number).float() - row_P, self.device
        )

    def with_last(self, row_P: Tensor) -> "ClientBlocks":
        """These rows, and ``row_P`` as one more at the end."""
        last_1P = row_P[None].to(self.device, self.dtype)
        if self.in_memory:
            return ClientBlocks([*self, last_1P])
        read, count = self._read, len(self.sizes)

        def read_or_last(number: int) -> Tensor:
            return read(number) if number < count else last_1P

        return self.from_reader([*self.sizes, 1], self.num_params, self.dtype, read_or_last, self.device)

    def stack(self) -> Tensor:
        """All rows in one ``(N, P)`` tensor in memory.

        Its row stride is a multiple of 8, so that kernels can load 16 bytes at once.
        """
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


def _is_dense(block: object) -> bool:
    return isinstance(block, Tensor) and block.layout == torch.strided and not block.is_nested


def _form(block: object) -> str:
    """How an error describes something that should have been a block."""
    if not isinstance(block, Tensor):
        return f"a {type(block).__name__}"
    if not _is_dense(block):
        return f"a {'nested' if block.is_nested else block.layout} tensor"
    return f"{tuple(block.shape)} {block.dtype} on {block.device}"


def _plain_rows(block: Tensor) -> Tensor:
    """The block in the form that compiled code reads.

    It has no gradient and no pending negation, and the values of a row lie side by side in memory.
    """
    block = block.detach().resolve_neg()
    return block if block.stride(1) == 1 else block.clone(memory_format=torch.contiguous_format)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Facts about a file that change when it is replaced or written to; None if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _refuse_changed(file: Path, stamp: tuple[int, int, int] | None) -> None:
    if _stamp(file) != stamp:
        raise ValueError(
            f"folder: {file} has changed since it was first read; all passes over the updates must see the same ones, "
            "so write what comes in during a round into another folder"
        )


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
