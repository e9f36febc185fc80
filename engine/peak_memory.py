"""How much memory is held, and its peak.

On a GPU these are the bytes that PyTorch's allocator has handed out. On a CPU they are the resident
memory of the process, which only Linux tells.
"""

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["give_back_freed", "peak_bytes", "proc_field", "resident", "restart_peak", "start_peak"]

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_peak(device: torch.device) -> int | None:
    """Start measuring a peak: return the bytes held now, and count the peak from there.

    Memory that was freed is first given back to the system.

    Returns:
        The bytes held now; None if the system does not tell.
    """
    given_back = give_back_freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not given_back:
        # Freed memory is still held, so the peak would be measured from memory that is not in use.
        return None
    try:
        restart_peak(device)
    except OSError:
        return None
    return resident("VmRSS")


def give_back_freed() -> bool:
    """Give memory that the process has freed back to the system; glibc keeps much of it otherwise.

    Returns:
        False if this C library cannot be asked to do so.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def restart_peak(device: torch.device) -> None:
    """Count the peak from what is held now. It takes a few microseconds and synchronises nothing.

    Raises:
        OSError: the system cannot do so. If :func:`start_peak` returned a number, it can.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with _CLEAR_REFS.open("wb", buffering=0) as file:
            # To Linux, "5" means: set the peak of resident memory to what is resident now.
            file.write(b"5")


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since the peak was last started; it takes tens of microseconds.

    Only to be called if :func:`start_peak` returned a number.
    """
    if device.type == "cuda":
        # Only this value is read: max_memory_allocated() would first flatten a hundred statistics.
        return int(torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"])
    # getrusage would also count what this process held before it called exec.
    peak = resident("VmHWM")
    assert peak is not None
    return peak


def resident(field: str) -> int | None:
    """A field of ``/proc/self/status``, such as ``VmRSS``, in bytes; None if there is none."""
    return proc_field(_STATUS, field)


def proc_field(path: Path, field: str) -> int | None:
    """The line ``field: number kB`` of a file in ``/proc``, in bytes; None if there is none."""
    # Only Linux has these files.
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
