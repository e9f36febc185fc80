"""Fused element-wise passes over stacked updates; knows tensors, nothing of federated learning.

Where they run, the same for all kernels: a public function runs compiled code (CUDA: Triton, CPU: Numba; of the trees and
mixtures plain torch is the CPU's version) or raises a ValueError that says why it cannot. It never falls back on its own. Who
prefers a slow answer to none calls the plain twin, ``*_reference``, which runs on any device; ``anywhere.py`` makes that choice
for clustering and averaging.

What they check: shapes, dtypes, devices and strides, before compiled code without bounds checks runs (``_checks.py``). An
error names the argument.
"""

from skymask_gpu.kernels._backends import why_not
from skymask_gpu.kernels.mask_step import (
    first_step,
    first_step_reference,
    last_step,
    last_step_reference,
    next_step,
    next_step_reference,
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
