"""What all Triton kernels share: the training step, the width of loads, listing, launching."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton compiles a kernel again for integers that are 1 or a multiple of 16, to make use of that.
# The numbers of columns and their strides profit, and stay the same from round to round. These
# change whenever a client drops out, and no load depends on them.
VARYING = ("num_rows", "num_others", "rows_per_split", "num_sampled", "num_values", "num_steps", "stored_stride")
# Triton also compiles a kernel again for pointers to multiples of 16 bytes. These pointers point
# into the middle of a tensor, after the rows of earlier blocks, so their alignment varies.
VARYING_POINTERS = ("bits_ptr", "ones_ptr")

# The decorator of every kernel that is launched.
kernel = triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING_POINTERS)

# The last column that 32-bit offsets reach, with room for the largest block beyond it.
MOST_COLUMNS = 2**31 - 2**16


def launch_options(num_warps: int) -> dict[str, int | bool]:
    """Options of every launch and of the offline compile, so that both make the same code."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Variant:
    """A kernel as a round launches it, for the offline compile; listed beside the kernel.

    Attributes:
        name: the public function, and in brackets the dtype of what streams through the kernel.
        pointers: what the pointers point to, as Triton spells it; float32 where not named.
        constants: the meta-parameters but ``VEC``, which follows from the number of columns.
    """

    name: str
    kernel: object
    num_warps: int
    pointers: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)


@triton.jit
def moved(logit, update, slope, mean, full_step):
    """The logit after a step. All kernels that train or replay use it, so their logits agree."""
    gate = tl.sigmoid(logit)
    gradient = slope * (gate * (1.0 - gate)) * (update - mean)
    return logit - tl.minimum(tl.maximum(gradient, -1.0), 1.0) * full_step


@triton.jit
def count_ones(word):
    """The number of ones in each uint32, as int32."""
    # LLVM turns this into one POPC. Triton has no such function that its interpreter knows.
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


def vector_elements(num_params: int, *tensors: Tensor | None) -> int:
    """The most elements (8, 4, 2, 1) by which P, every row stride and every pointer can be divided.

    Raises:
        ValueError: there are more columns than 32-bit offsets reach.
    """
    if num_params > MOST_COLUMNS:
        raise ValueError(f"P must be at most {MOST_COLUMNS:,} on a GPU, got {num_params:,}; divide the columns among processes")
    for vec in (8, 4, 2):
        if num_params % vec == 0 and all(
            x is None or (x.stride(0) % vec == 0 and x.data_ptr() % (vec * x.element_size()) == 0) for x in tensors
        ):
            return vec
    return 1


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device.index) if tensor.device.type == "cuda" else nullcontext()
