"""Compiled kernels over stacked updates and mask bits. They know tensors, nothing else.

Every kernel has a folder of its own, which holds all of its files:

| file | what |
| --- | --- |
| ``__init__.py`` | the formula, the checks of the arguments, and the public functions |
| ``reference.py`` | the constants, and a plain twin ``*_reference`` per function, in PyTorch |
| ``triton.py`` | the Triton kernels, their launchers, and ``VARIANTS`` for the offline compile |
| ``cuda.py`` | in ``bins/``, which has kernels in CUDA C++ too: their launchers |
| ``cpu.py`` | the Numba kernels, where the CPU has any (its mixtures and trees are plain PyTorch) |

| folder | what it computes |
| --- | --- |
| ``mask_step/`` | one exact step of mask training on all rows: ``fused`` runs on it |
| ``bins/`` | edges, contents, weights and training steps of bins of rows: ``collapsed`` trains on them |
| ``cuts/`` | the bits of all rows, from what the training of the bins left behind |
| ``hamming/`` | in how many bits each two masks differ |
| ``ones/`` | how many ones each mask has, in the columns in which the masks differ |
| ``mean/`` | the mean of the benign updates |
| ``sums/`` | norms, inner products and cosines of rows, per group of columns |
| ``product/`` | a matrix of counts times a few vectors, for principal components; on a GPU plain PyTorch |
| ``mixture/``, ``tree/`` | mixtures of two normals, minimum spanning trees: clustering |

| file or folder | what it is for |
| --- | --- |
| ``dispatch.py`` | which compiled code runs on which device, or why none can |
| ``anywhere.py`` | the kernels that measure, compare and average, on any device, as twins if need be |
| ``shared/`` | what the kernels share: checks, the training step, threads, vectors |
| ``offline.py`` | compiles all GPU kernels without a GPU, and counts their code |

Where kernels run: a public function runs compiled code (CUDA: Triton or CUDA C++, CPU: Numba) or
raises a ValueError that says why it cannot. It never falls back to a twin on its own. Callers that
prefer a slow answer to none call the twin, which runs on any device; ``anywhere.py`` does so for
measuring, clustering and averaging.

What they check: shapes, dtypes, devices and strides, because compiled code has no bounds checks. An
error names the argument.
"""

from skymask_gpu.kernels.bins import (
    bin_edges,
    bin_edges_reference,
    bin_rows,
    bin_rows_reference,
    bin_step,
    bin_step_reference,
    bin_weights,
    bin_weights_reference,
)
from skymask_gpu.kernels.cuts import (
    cut_bits,
    cut_bits_reference,
    find_cuts,
    find_cuts_reference,
    replay,
    replay_bits,
    replay_bits_reference,
    replay_reference,
)
from skymask_gpu.kernels.dispatch import why_not
from skymask_gpu.kernels.hamming import (
    hamming_counts,
    hamming_counts_between,
    hamming_counts_between_reference,
    hamming_counts_reference,
)
from skymask_gpu.kernels.mask_step import (
    first_step,
    first_step_reference,
    last_step,
    last_step_reference,
    next_step,
    next_step_reference,
)
from skymask_gpu.kernels.mean import chosen_mean, chosen_mean_reference
from skymask_gpu.kernels.mixture import (
    gaussian_mixture,
    gaussian_mixture_reference,
    two_normals,
    two_normals_reference,
)
from skymask_gpu.kernels.ones import varying_ones, varying_ones_reference
from skymask_gpu.kernels.product import count_products, count_products_reference
from skymask_gpu.kernels.sums import group_sums, group_sums_reference
from skymask_gpu.kernels.tree import path_maxima, path_maxima_reference

__all__ = [
    "bin_edges",
    "bin_edges_reference",
    "bin_rows",
    "bin_rows_reference",
    "bin_step",
    "bin_step_reference",
    "bin_weights",
    "bin_weights_reference",
    "chosen_mean",
    "chosen_mean_reference",
    "count_products",
    "count_products_reference",
    "cut_bits",
    "cut_bits_reference",
    "find_cuts",
    "find_cuts_reference",
    "first_step",
    "first_step_reference",
    "gaussian_mixture",
    "gaussian_mixture_reference",
    "group_sums",
    "group_sums_reference",
    "hamming_counts",
    "hamming_counts_between",
    "hamming_counts_between_reference",
    "hamming_counts_reference",
    "last_step",
    "last_step_reference",
    "next_step",
    "next_step_reference",
    "path_maxima",
    "path_maxima_reference",
    "replay",
    "replay_bits",
    "replay_bits_reference",
    "replay_reference",
    "two_normals",
    "two_normals_reference",
    "varying_ones",
    "varying_ones_reference",
    "why_not",
]
