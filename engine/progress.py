"""Tells whoever asked how far mask training is, after each of its steps.

A solver says ``step_done()`` after a step. If nobody asked, this costs one ``if``. The calls are
made on the host, between the steps, also where a GPU replays them from a CUDA graph. Nothing waits
for the device, so on a GPU a step counts as done once it is launched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Progress", "check_progress", "reporting", "step_done"]

# Called with the number of steps that are done, and the number of steps in all.
Progress = Callable[[int, int], object]

# What counts a step, per thread and task; None while nobody asks.
_count: "ContextVar[Callable[[], None] | None]" = ContextVar("count", default=None)


def check_progress(progress: object) -> None:
    """Refuse what cannot be called."""
    if progress is not None and not callable(progress):
        raise ValueError(
            f"progress must be a function of two numbers, steps done and steps in all, got {progress!r}; pass None for none"
        )


@contextmanager
def reporting(progress: Progress | None, steps: int) -> Iterator[None]:
    """Call ``progress(done, steps)`` whenever the code inside says :func:`step_done`.

    Args:
        progress: an error that it raises ends the code inside. None: nobody is told.
        steps: the number of steps in all.

    Example:
        >>> with reporting(lambda done, steps: print(f"{done} of {steps}"), 2):
        ...     step_done()
        ...     step_done()
        1 of 2
        2 of 2
        >>> step_done()  # nobody asks any more
    """
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        assert progress is not None, "nobody counts without it"
        progress(done, steps)

    token = _count.set(None if progress is None else count)
    try:
        yield
    finally:
        _count.reset(token)


def step_done() -> None:
    """Say that a step of mask training is done; :func:`reporting` has an example."""
    count = _count.get()
    if count is not None:
        count()
