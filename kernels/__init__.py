"""Fused element-wise passes over stacked updates; knows tensors, nothing of federated learning."""

from skymask_gpu.kernels.mask_step import (
    first_step,
    first_step_reference,
    last_step,
    last_step_reference,
    next_step,
    next_step_reference,
    why_not,
)

__all__ = [
    "first_step",
    "first_step_reference",
    "last_step",
    "last_step_reference",
    "next_step",
    "next_step_reference",
    "why_not",
]
