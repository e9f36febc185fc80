"""Settings of PyTorch that decide which numbers a GPU computes, set for a while and then put back as they were.

They are settings of the whole process, and threads may overlap: the first that enters sets them, the last that leaves puts them
back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["deterministic_convolutions", "with_tf32", "without_tf32"]

_Restore = Callable[[], None]
_T = TypeVar("_T")


class _Setting:
    """``with setting():`` or ``@setting()``; ``change()`` sets it and returns what puts it back."""

    def __init__(self, change: Callable[[], _Restore]) -> None:
        self._change = change
        self._lock, self._users = threading.Lock(), 0
        self._restore: _Restore = lambda: None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._restore = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()


def _set_float32(precision: str) -> _Restore:
    """``"ieee"``: all 24 bits of float32; ``"tf32"``: tensor cores, which round what they multiply to 11 bits.

    PyTorch has this setting twice, and raises where the older form is read while it contradicts the newer one; so both are set.
    What PyTorch computes with is the newer one; an older one that cannot be read, nor be put back therefore, is left alone.
    """
    backends: Any = torch.backends  # the newer form is not typed
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    newer = [(owner, owner.fp32_precision) for owner in (matmul, cudnn.conv, cudnn.rnn)]
    older_matmul, older_cudnn = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)

    def put(matmul_name: str, cudnn_allowed: bool, values: list[str]) -> None:
        if older_matmul is not None:
            torch.set_float32_matmul_precision(matmul_name)
        if older_cudnn is not None:
            cudnn.allow_tf32 = cudnn_allowed
        # last, for setting the older form overwrites the newer
        for (owner, _), value in zip(newer, values, strict=True):
            owner.fp32_precision = value

    put("highest" if precision == "ieee" else "high", precision == "tf32", [precision] * len(newer))
    return lambda: put(older_matmul or "", bool(older_cudnn), [value for _, value in newer])


def _readable(older: Callable[[], _T]) -> _T | None:
    """None where PyTorch refuses, since the newer form was set to something that the older one cannot say."""
    try:
        return older()
    except RuntimeError:
        return None


def _set_deterministic_convolutions() -> _Restore:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    # timing the algorithms anew in each process would choose others
    cudnn.deterministic, cudnn.benchmark = True, False

    def put_back() -> None:
        cudnn.deterministic, cudnn.benchmark = before

    return put_back


# Masks are trained and judged without TF32. It is PyTorch's default for convolutions, and moves the gradient of a ResNet by 5
# to 9% where float32 moves it by 0.5%, so that masks would differ from those of a CPU.
without_tf32 = _Setting(lambda: _set_float32("ieee"))
# What the same passes cost in TF32; the benchmark's.
with_tf32 = _Setting(lambda: _set_float32("tf32"))
# The same algorithms in every process, and none that adds in an order of its own.
deterministic_convolutions = _Setting(_set_deterministic_convolutions)
