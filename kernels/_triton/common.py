"""What the Triton kernels share: the move of a logit, the width of loads, the device to launch on."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def moved(logit, update, slope, mean, full_step):
    """The logit after a step; every kernel that trains or replays calls this one, so their logits are equal to the bit."""
    gate = tl.sigmoid(logit)
    gradient = slope * (gate * (1.0 - gate)) * (update - mean)
    return logit - tl.minimum(tl.maximum(gradient, -1.0), 1.0) * full_step


def vector_elements(num_params: int, *tensors: Tensor | None) -> int:
    """The most elements (8, 4, 2, 1) by which P, every row stride and every pointer can be divided."""
    for vec in (8, 4, 2):
        if num_params % vec == 0 and all(
            x is None or (x.stride(0) % vec == 0 and x.data_ptr() % (vec * x.element_size()) == 0) for x in tensors
        ):
            return vec
    return 1


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'; the interpreter takes any."""
    return torch.cuda.device(tensor.device.index) if tensor.device.type == "cuda" else nullcontext()
