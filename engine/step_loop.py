"""A step of mask training again and again: on a GPU captured once in a CUDA graph and replayed, on a CPU called."""

import functools
import threading
import warnings
from collections.abc import Callable

import torch

__all__ = ["StepLoop"]

# A process can capture one graph at a time.
_CAPTURING = threading.Lock()


class StepLoop:
    """Repeats ``step()``, which has to read and write the same tensors every time, so that one graph serves every repeat.

    On a GPU the first repeat runs on a side stream: it compiles kernels and makes the libraries' handles, which a capture must
    not do, and shows whether anything in it synchronises. The second is captured; it and all that follow are replays, one
    launch each. A step that cannot be captured is launched operation by operation, and the reason is kept.

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
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.graph would synchronise, empty the cache, and after an error leave another stream current
            with _CAPTURING, torch.cuda.stream(_side_stream(self._device)):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # where the step failed, ending the capture fails too, and says less
            self.not_captured = str(error.__context__ or error).splitlines()[0]
        else:
            self._graph = graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _synchronisation(step: Callable[[], None]) -> str | None:
    """Run the step; what in it made the host wait for the GPU, or None."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found = None
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found = found or f"the loss makes the host wait for the GPU, at {warning.filename}, line {warning.lineno}"
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found
