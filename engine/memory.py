"""Blocks that shrink when memory runs out, and the error that says how much memory was needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# The number of elements of a (rows, columns) temporary. It keeps a CPU busy, and is far below the
# memory of any GPU.
SMALLEST_TILE = 256


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA's error has a class, the CPU's is known by its words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def in_blocks(run: Callable[[int, int], None], count: int, block: int, *, least: int = 1, multiple_of: int = 1) -> int:
    """Call ``run(begin, end)`` block after block; halve the block when memory runs out.

    Args:
        run: must be repeatable, because a block that failed half-way is run again, smaller.
        count: the number of things.
        block: how many of them to try at once.
        least: the smallest block that is tried.
        multiple_of: a halved block is rounded up to a multiple of this.

    Returns:
        The size of the blocks at the end, which the next call may start with.

    Raises:
        torch.OutOfMemoryError: the smallest block does not fit. On a CPU it is a RuntimeError or a
            MemoryError, see :func:`is_out_of_memory`.

    Example:
        >>> def run(begin, end):
        ...     if end - begin > 3:
        ...         raise MemoryError
        ...     print(begin, end)
        >>> in_blocks(run, 5, 4)
        0 2
        2 4
        4 5
        2
    """
    begin = 0
    while begin < count:
        end = min(begin + block, count)
        try:
            run(begin, end)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or block <= least:
                raise
            block = max(least, block // 2)
            block = -(-block // multiple_of) * multiple_of
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        begin = end
    return block


def in_column_tiles(run: Callable[[int, int], None], num_columns: int, tile: int | None = None) -> None:
    """Call ``run(begin, end)`` over all columns, in tiles that shrink when memory runs out.

    A tile that does not fit is halved, down to 256 columns.

    Args:
        run: must be repeatable, see :func:`in_blocks`.
        num_columns: the number of columns.
        tile: how many columns to try at once; all of them by default.
    """
    # A tile of whole bytes: eight columns of bits are packed into one.
    in_blocks(run, num_columns, min(tile or num_columns, num_columns), least=SMALLEST_TILE, multiple_of=8)


@contextmanager
def explain_out_of_memory(what: str, num_bytes: int, device: torch.device, remedy: str) -> Iterator[None]:
    """Turn an allocator's failure into an error that tells how much was needed, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # An inner use of this function may have explained the failure already.
        if not is_out_of_memory(error) or "beyond the updates" in str(error):
            raise
        free = f", {torch.cuda.mem_get_info(device)[0] / 2**20:,.0f} MiB are free" if device.type == "cuda" else ""
        raise torch.OutOfMemoryError(
            f"{device}: {what} needs at least {num_bytes / 2**20:,.0f} MiB beyond the updates{free}; {remedy}"
        ) from error
