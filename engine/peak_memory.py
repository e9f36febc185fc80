"""Memory held and its peak: of PyTorch's allocator on a GPU, of the process's resident memory on Linux."""

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["give_back_freed", "peak_bytes", "proc_field", "resident", "restart_peak", "start_peak"]

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_peak(device: torch.device) -> int | None:
    """Give back what was freed, start counting the peak anew, and return the bytes held now; None: the system does not tell."""
    given_back = give_back_freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not given_back:
        # the peak would be measured from memory that is not in use
        return None
    try:
        restart_peak(device)
    except OSError:
        return None
    return resident("VmRSS")


def give_back_freed() -> bool:
    """Have the process give back to the system what it freed; glibc keeps much of it. False: this C library cannot be asked."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def restart_peak(device: torch.device) -> None:
    """Count the peak from what is held now; a few microseconds, and nothing is synchronised.

    Raises:
        OSError: the system cannot; where :func:`start_peak` returned bytes, it can.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with _CLEAR_REFS.open("wb", buffering=0) as file:
            file.write(b"5")  # Linux: the peak of resident memory starts from the present


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since the last start, where :func:`start_peak` returned bytes; tens of microseconds."""
    if device.type == "cuda":
        # max_memory_allocated() flattens a hundred statistics first
        return int(torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"])
    # not getrusage: what a process was before exec counts there
    peak = resident("VmHWM")
    assert peak is not None
    return peak


def resident(field: str) -> int | None:
    """A line of ``/proc/self/status`` in bytes, as ``VmRSS`` or ``VmHWM``."""
    return proc_field(_STATUS, field)


def proc_field(path: Path, field: str) -> int | None:
    """A line ``field: number kB`` of a file of ``/proc`` in bytes; None if there is none."""
    if not path.exists():  # no Linux
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
