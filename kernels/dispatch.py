"""Chooses the compiled code for a device, or says why there is none; all kernels do so alike.

A public function never falls back on its own: it runs compiled code, or raises a ValueError with
the reason. ``anywhere.py`` is the one place that takes a plain twin instead.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["compiled", "why_not"]

# For each type of device, the compiler that must be installed, and the file of a kernel's folder
# that is written for it.
_COMPILERS = {"cuda": ("triton", "triton"), "cpu": ("numba", "cpu")}


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the compiled kernels cannot run on a device; ``None`` if they can.

    Args:
        device: where the updates are.
        dtype: of the updates; ``None`` asks about the device alone.

    Example:
        >>> why_not(torch.device("meta"))
        "no kernel for device type 'meta' (cuda and cpu have one)"
        >>> why_not(torch.device("cpu"), torch.float32) is None
        True
    """
    compiler, _ = _COMPILERS.get(device.type, (None, None))
    if compiler is None:
        return f"no kernel for device type {device.type!r} (cuda and cpu have one)"
    if importlib.util.find_spec(compiler) is None:
        return f"{compiler} is not installed (pip install {compiler})"
    supported = {torch.float32, torch.bfloat16} | ({torch.float64} if device.type == "cpu" else set())
    if dtype is not None and dtype not in supported:
        return f"no {device.type} kernel for {dtype} updates (wanted one of {sorted(map(str, supported))})"
    return None


def compiled(package: str, name: str, tensor: Tensor, *, on_cuda: str = "triton") -> ModuleType:
    """The module with the compiled version of a kernel for the device of a tensor.

    It is imported here, on the first call, because Triton and Numba take a second to import and are
    not always installed.

    Args:
        package: the kernel's folder, as its ``__name__`` says.
        name: what the caller's argument is called, for the error.
        tensor: that argument.
        on_cuda: the file of the kernel's folder for CUDA, if it is another one.

    Raises:
        ValueError: there is no such version, or its compiler is not installed.
    """
    reason = why_not(tensor.device)
    if reason is not None:
        raise ValueError(f"{name}: {reason}; the plain twin *_reference runs on any device")
    file = on_cuda if tensor.device.type == "cuda" else _COMPILERS[tensor.device.type][1]
    return importlib.import_module(f"{package}.{file}")
