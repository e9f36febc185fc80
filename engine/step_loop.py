"""``StepLoop``: repeats a step, such as the forward and backward pass of a model.

On a GPU the step is captured once in a CUDA graph and then replayed; on a CPU it is called.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["StepLoop"]

# A process can capture only one graph at a time.
_CAPTURING = threading.Lock()


class StepLoop:
    """Repeats ``step()``, which must read and write the same tensors every time.

    One CUDA graph then serves every repeat. On a GPU, the first repeat runs on a side stream. It
    compiles kernels and makes the handles of the libraries, which a capture must not do, and it
    shows whether anything in the step makes the host wait. The second repeat is captured. It and
    all later ones are replays, with one launch each. A step that cannot be captured is launched
    operation by operation, and the reason is kept.

    All graphs share one pool of memory, which is kept as long as the process. If each had its own,
    the pool would stay reserved after the graph is gone.

    Attributes:
        not_captured: why a step on a GPU is launched operation by operation; None if it is
            captured, and on a CPU.

    Example:
        >>> total = torch.zeros(())
        >>> def step():
        ...     total.add_(2)
        >>> StepLoop(step, total.device).run(3)
        >>> total
        tensor(6.)
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.not_captured: str | None = None
        self._step = step
        self._device = device
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, times: int) -> None:
        """Repeat the step ``times`` times more."""
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
        # Any, because torch has a type of its own for the id.
        pool: Any = _pool(here).id
        with _CAPTURING:
            try:
                # torch.cuda.graph is not used: it would synchronise, empty the cache, and leave
                # another stream current after an error.
                with torch.cuda.stream(_side_stream(self._device)):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        self._step()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                # If the step failed, ending the capture fails too. The first error, which is the
                # context of the second, says more.
                self.not_captured = str(error.__context__ or error).splitlines()[0]
                _stop_recording(here)
            else:
                self._graph = graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for warm-ups and captures; always the same one per device.

    Libraries keep a workspace for every stream that they have seen.
    """
    return torch.cuda.Stream(device)


@functools.cache
def _pool(stream: torch.cuda.Stream) -> torch.cuda.MemPool:
    """The memory of all graphs that are replayed on this stream.

    The graphs run one after the other, so that they can share it.
    """
    with torch.cuda.device(stream.device):
        return torch.cuda.MemPool()


def _stop_recording(stream: torch.cuda.Stream) -> None:
    """End the allocator's part of a failed capture, which torch 2.11 and 2.12 do not do.

    Without this, the allocator goes on to give out the pool's memory, and ``empty_cache`` raises an
    error from then on. The allocator knows the pool by its graph, so the graph must still be alive.
    """
    index, pool = stream.device.index, _pool(stream)
    # An error means that a newer torch has done it already, or that the capture never began.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool.id)
        torch._C._cuda_releasePool(index, pool.id)


def _synchronisation(step: Callable[[], None]) -> str | None:
    """Run the step, and return what in it made the host wait for the GPU; None if nothing did."""
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
