"""Which compiled code runs a kernel on which device, or why none can: the one policy that ``kernels/__init__.py`` describes."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["compiled", "why_not"]

# For each type of device, the compiler that must be installed and the folder whose modules use it.
_COMPILERS = {"cuda": ("triton", "_triton"), "cpu": ("numba", "_cpu")}


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the compiled kernels cannot run on ``device`` (with updates of ``dtype``, if given); ``None`` if they can."""
    compiler, _ = _COMPILERS.get(device.type, (None, None))
    if compiler is None:
        return f"no kernel for device type {device.type!r} (cuda and cpu have one)"
    if importlib.util.find_spec(compiler) is None:
        return f"{compiler} is not installed (pip install {compiler})"
    supported = {torch.float32, torch.bfloat16} | ({torch.float64} if device.type == "cpu" else set())
    if dtype is not None and dtype not in supported:
        return f"no {device.type} kernel for {dtype} updates (wanted one of {sorted(map(str, supported))})"
    return None


def compiled(kernel: str, name: str, tensor: Tensor) -> ModuleType:
    """The module with the compiled version of ``kernels/{kernel}.py`` for the device of the tensor.

    Args:
        kernel: the name of the file.
        name: what the caller's argument is called, for the error.
        tensor: that argument.

    Raises:
        ValueError: there is no such version, or its compiler is not installed.
    """
    reason = why_not(tensor.device)
    if reason is not None:
        raise ValueError(f"{name}: {reason}; the plain twin *_reference runs on any device")
    _, folder = _COMPILERS[tensor.device.type]
    return importlib.import_module(f"skymask_gpu.kernels.{folder}.{kernel}")
