"""Checks of tensors before compiled code, which knows no bounds, reads and writes their memory.

They look only at shapes, dtypes, devices and strides, never at values on a GPU. They therefore
cost microseconds, and the host never waits for the device.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["REALS", "check_bins", "check_number", "check_tensor"]

# The dtypes that rows of updates may have.
REALS = (torch.float32, torch.bfloat16)

# The dtypes that the counts of bins may have.
COUNTS = (torch.uint16, torch.int32)

# How the elements of a tensor may lie in memory.
Layout = Literal["any strides", "unit column stride", "unit column stride and rows that do not overlap", "contiguous"]


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    layout: Layout = "contiguous",
    *,
    device: torch.device | None = None,
) -> None:
    """Raise a ValueError that names the argument unless it is a tensor of this kind.

    Args:
        name: what the argument is called.
        tensor: what the caller passed.
        shape: the size of each dimension, or a letter for any size of at least 1.
        dtypes: any of these.
        layout: how the elements must lie in memory. Written rows must not overlap.
        device: where it must be; None allows any device.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}; use torch.as_tensor")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}; use .to_dense()")
    if not _fits(tensor, shape) or tensor.dtype not in dtypes:
        remedy = f"; use .to({dtypes[0]})" if _fits(tensor, shape) else ""
        sizes = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        kind = "non-empty " if any(isinstance(size, str) for size in shape) else ""
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {kind}{sizes} {wanted}, got {tuple(tensor.shape)} {tensor.dtype}{remedy}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}; use .to({str(device)!r})")
    if not _lies_in(tensor, layout):
        verb = "be" if layout == "contiguous" else "have"
        raise ValueError(f"{name} must {verb} {layout}, got strides {tensor.stride()}; call .contiguous()")


def check_number(name: str, value: object, least: int) -> None:
    """Raise a ValueError that names the argument unless it is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_bins(num_params: int, device: torch.device, **bins: Tensor) -> int:
    """Check the tensors ``(B, P)`` of bins, and return B. Counts are whole numbers.

    Raises:
        ValueError: a tensor does not fit, or there are fewer than 2 bins.
    """
    num_bins = 0
    for name, tensor in bins.items():
        dtypes = COUNTS if name == "counts" else (torch.float32,)
        check_tensor(name, tensor, (num_bins or "B", num_params), dtypes, device=device)
        num_bins = len(tensor)
    if num_bins < 2:
        raise ValueError(f"{next(iter(bins))} must be of at least 2 bins, got {num_bins}")
    return num_bins


def _fits(tensor: Tensor, shape: tuple[int | str, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def _lies_in(tensor: Tensor, layout: Layout) -> bool:
    if layout == "any strides":
        return True
    if layout == "contiguous":
        return tensor.is_contiguous()
    num_rows, num_columns = tensor.shape
    apart = layout == "unit column stride" or num_rows == 1 or tensor.stride(0) >= num_columns
    return apart and (tensor.stride(1) == 1 or num_columns == 1)
