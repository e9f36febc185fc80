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
        blocks: a list of ``(n, P)`` tensors, float32 or bfloat16, all of one dtype and device, of any strides; see
            :meth:`from_folder` for rows that stay on disk.

    Attributes:
        sizes: the number of rows of each block.
        num_params: P.
        dtype: of the updates.
        device: where the blocks are.
        in_memory: whether reading a block costs nothing.

    Raises:
        ValueError: there is no row, or the blocks do not fit together; later, where a block that is read anew is not what it
            was announced as, by its number and file.

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
        """Blocks that ``read(b)`` makes, ``(sizes[b], num_params)`` each, anew whenever they are needed.

        Args:
            names: what errors call each block, beside its number: its file, say.

        Raises:
            ValueError: there is no row.
        """
        if not sizes or min(sizes) < 1 or num_params < 1:
            raise ValueError(f"sizes and num_params must be at least 1, got {list(sizes)} rows of {num_params} parameters")
        blocks = cls.__new__(cls)
        blocks._read_unchecked, blocks._names, blocks.sizes = read, names, tuple(sizes)
        # "cuda" is the device that is current now, as tensors there say it: "cuda:0"
        blocks.num_params, blocks.dtype, blocks.device = num_params, dtype, torch.empty(0, device=device).device
        blocks.in_memory = False
        return blocks

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """The safetensors files of a folder in the order of their names, each with one ``(n, P)`` tensor, memory-mapped.

        Raises:
            ValueError: no such file, or one that is not readable, or that does not fit the others; later, one that changed.
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

    @property
    def nbytes(self) -> int:
        """The bytes of all rows, wherever they are."""
        return len(self) * self.num_params * self.dtype.itemsize

    def _read(self, number: int) -> Tensor:
        """A block, once it is known to be what was announced: compiled code that checks no bounds works on it."""
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

    def to(self, device: torch.device | str) -> "ClientBlocks":
        """The same rows on another device; those on disk are moved when they are read."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if self.in_memory:
            return ClientBlocks([block.to(device) for block in self])
        read = self._read
        return self.from_reader(self.sizes, self.num_params, self.dtype, lambda number: read(number).to(device), device)

    def minus(self, row_P: Tensor) -> "ClientBlocks":
        """Every row less this one, float32; those on disk are subtracted from when they are read."""
        row_P = row_P.to(self.device, torch.float32)
        if self.in_memory:
            return ClientBlocks([block.float() - row_P for block in self])
        read = self._read
        return self.from_reader(
            self.sizes, self.num_params, torch.float32, lambda number: read(number).float() - row_P, self.device
        )

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


def _is_dense(block: object) -> bool:
    return isinstance(block, Tensor) and block.layout == torch.strided and not block.is_nested


def _form(block: object) -> str:
    """What errors say of something that was to be a block."""
    if not isinstance(block, Tensor):
        return f"a {type(block).__name__}"
    if not _is_dense(block):
        return f"a {'nested' if block.is_nested else block.layout} tensor"
    return f"{tuple(block.shape)} {block.dtype} on {block.device}"


def _plain_rows(block: Tensor) -> Tensor:
    """As compiled code reads memory: no gradient, no sign that is still to be applied, a row's values side by side."""
    block = block.detach().resolve_neg()
    return block if block.stride(1) == 1 else block.clone(memory_format=torch.contiguous_format)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What differs once a file is replaced or written to; None where it is gone."""
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
