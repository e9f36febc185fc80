"""Column tiles that shrink when memory runs out, and the error that says how much was needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Elements of a (rows, columns) temporary that keep a CPU busy and stay far below any GPU's memory.
SMALLEST_TILE = 256


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU allocator only has words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def in_column_tiles(run: Callable[[int, int], None], num_columns: int, tile: int | None = None) -> None:
    """Call ``run(begin, end)`` over all columns; a tile that does not fit in memory is halved, down to 256 columns.

    ``run`` must be repeatable: a tile that failed half-way is run again. ``tile`` defaults to all columns.
    """
    tile = min(tile or num_columns, num_columns)
    begin = 0
    while begin < num_columns:
        end = min(begin + tile, num_columns)
        try:
            run(begin, end)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or tile <= SMALLEST_TILE:
                raise
            tile = max(SMALLEST_TILE, tile // 2)
            # keep tiles of packed bits byte-aligned
            tile = -(-tile // 8) * 8
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        begin = end


@contextmanager
def explain_out_of_memory(what: str, num_bytes: int, device: torch.device, remedy: str) -> Iterator[None]:
    """Turn an allocator's failure into one error that says what was being held, how large it is, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or "beyond the updates" in str(error):  # not ours, or explained already
            raise
        free = f", {torch.cuda.mem_get_info(device)[0] / 2**20:,.0f} MiB are free" if device.type == "cuda" else ""
        raise torch.OutOfMemoryError(
            f"{device}: {what} needs at least {num_bytes / 2**20:,.0f} MiB beyond the updates{free}; {remedy}"
        ) from error
