"""Settings of PyTorch that decide how a GPU rounds; they are set for a while, then restored.

They belong to the whole process, and several threads may need one at the same time. The first
thread that enters therefore sets it, and the last one that leaves restores it.
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
    """Used as ``with setting():`` or ``@setting()``.

    ``change()`` changes the setting and returns a function that restores it.
    """

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
    """Set how matrix products, convolutions and recurrent layers multiply float32 numbers.

    ``"ieee"`` keeps all 24 bits. ``"tf32"`` uses tensor cores, which round each factor to 11 bits.

    PyTorch has this setting in two forms. It computes with the newer one, and raises an error if
    the older one is read while the two contradict each other, so both are set here. An older one
    that cannot be read could not be restored either, and is left alone.
    """
    # The newer form has no type annotations.
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    newer = [(owner, owner.fp32_precision) for owner in (matmul, cudnn.conv, cudnn.rnn)]
    older_matmul, older_cudnn = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)

    def put(matmul_name: str, cudnn_allowed: bool, values: list[str]) -> None:
        if older_matmul is not None:
            torch.set_float32_matmul_precision(matmul_name)
        if older_cudnn is not None:
            cudnn.allow_tf32 = cudnn_allowed
        # The newer form comes last, because setting the older one overwrites it.
        for (owner, _), value in zip(newer, values, strict=True):
            owner.fp32_precision = value

    put("highest" if precision == "ieee" else "high", precision == "tf32", [precision] * len(newer))
    return lambda: put(older_matmul or "", bool(older_cudnn), [value for _, value in newer])


def _readable(older: Callable[[], _T]) -> _T | None:
    """The value of the older form, or None if PyTorch refuses to read it.

    It refuses if the newer form has a value that the older one cannot express.
    """
    try:
        return older()
    except RuntimeError:
        return None


def _set_deterministic_convolutions() -> _Restore:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    # In its benchmark mode cuDNN times its algorithms and takes the fastest, which may be another
    # one in each process, and with it other numbers.
    cudnn.deterministic, cudnn.benchmark = True, False

    def put_back() -> None:
        cudnn.deterministic, cudnn.benchmark = before

    return put_back


# Masks are trained and judged without TF32. It is PyTorch's default for convolutions, and its
# rounding changes the gradient of a ResNet by 5 to 9%, where that of float32 changes it by 0.5%.
# With TF32, masks would therefore differ from those of a CPU.
without_tf32 = _Setting(lambda: _set_float32("ieee"))
# The benchmark alone uses this, to show what the same forward and backward passes cost in TF32.
with_tf32 = _Setting(lambda: _set_float32("tf32"))
# Every process uses the same convolution algorithms, and none that adds in an order of its own, so
# that a repeated run gives the same numbers.
deterministic_convolutions = _Setting(_set_deterministic_convolutions)
