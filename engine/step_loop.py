"""A step of mask training again and again: on a GPU captured once in a CUDA graph and replayed, on a CPU called."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["StepLoop"]

# A process can capture one graph at a time.
_CAPTURING = threading.Lock()


class StepLoop:
    """Repeats ``step()``, which has to read and write the same tensors every time, so that one graph serves every repeat.

    On a GPU the first repeat runs on a side stream: it compiles kernels and makes the libraries' handles, which a capture must
    not do, and shows whether anything in it synchronises. The second is captured; it and all that follow are replays, one
    launch each. A step that cannot be captured is launched operation by operation, and the reason is kept.

    Graphs share one pool of memory, kept as long as the process: a pool of its own for each would stay reserved after it.

    Attributes:
        not_captured: why a step on a GPU is launched operation by operation; None where it is captured, and on a CPU.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.not_captured: str | None = None
        self._step = step
        self._device = device
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, times: int) -> None:
        """``step()``, so many times more."""
        for _ in range(times):
            if self._device.type != "cuda":
                self._step()
            elif not self._is_warm:
                self._warm_up()
            else:
                self._replay()

    def _warm_up(self) -> None:
        here, side = torch.cuda.current_stream(self._device), _side_stream(self._device)
        with _CAPTURING:
            side.wait_stream(here)
            with torch.cuda.stream(side):
                self.not_captured = _synchronisation(self._step)
            here.wait_stream(side)
        self._is_warm = True

    def _replay(self) -> None:
        if self._graph is None and self.not_captured is None:
            self._capture()
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        pool: Any = _pool(here).id  # torch has a type of its own for it
        with _CAPTURING:
            try:
                # torch.cuda.graph would synchronise, empty the cache, and after an error leave another stream current
                with torch.cuda.stream(_side_stream(self._device)):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        self._step()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                # where the step failed, ending the capture fails too, and says less
                self.not_captured = str(error.__context__ or error).splitlines()[0]
                _stop_recording(here)
            else:
                self._graph = graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


@functools.cache
def _pool(stream: torch.cuda.Stream) -> torch.cuda.MemPool:
    """The memory of all graphs that are replayed on this stream: one after the other, so that none is in another's way."""
    with torch.cuda.device(stream.device):
        return torch.cuda.MemPool()


def _stop_recording(stream: torch.cuda.Stream) -> None:
    """What the end of a failed capture leaves undone in torch 2.11 and 2.12, where ``empty_cache`` would then raise ever after:
    the allocator still gives out the pool's memory, on behalf of a graph that must therefore be alive until here.
    """
    index, pool = stream.device.index, _pool(stream)
    # a newer torch has done it, or the capture never began
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool.id)
        torch._C._cuda_releasePool(index, pool.id)


def _synchronisation(step: Callable[[], None]) -> str | None:
    """Run the step; what in it made the host wait for the GPU, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = None
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found = found or f"the loss makes the host wait for the GPU, at {warning.filename}, line {warning.lineno}"
        elif "Synchronization debug mode is a prototype feature" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found
