"""The kernels that measure, compare and average, on any device, as twins if need be.

Masks may be trained in plain PyTorch on any device (``mps``, CUDA without Triton), and must be
compared and averaged there too. This is the only place where a plain twin stands in for a compiled
kernel. Mask training has no such choice: the solvers ``fused`` and ``collapsed`` say why they
cannot run, and the user can choose ``reference``.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from torch import Tensor

from skymask_gpu.kernels import hamming, mean, mixture, ones, product, sums, tree
from skymask_gpu.kernels.dispatch import why_not

__all__ = [
    "chosen_mean",
    "count_products",
    "gaussian_mixture",
    "group_sums",
    "hamming_counts",
    "hamming_counts_between",
    "path_maxima",
    "two_normals",
    "varying_ones",
]

P = ParamSpec("P")
Kernel = Callable[Concatenate[Tensor, P], Tensor]


def _or_twin(kernel: Kernel[P], twin: Kernel[P]) -> Kernel[P]:
    """A function that runs the kernel if the first argument's device has one, and else its twin."""

    @wraps(kernel)
    def run(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return (kernel if why_not(tensor.device) is None else twin)(tensor, *args, **kwargs)

    return run


chosen_mean = _or_twin(mean.chosen_mean, mean.chosen_mean_reference)
count_products = _or_twin(product.count_products, product.count_products_reference)
gaussian_mixture = _or_twin(mixture.gaussian_mixture, mixture.gaussian_mixture_reference)
group_sums = _or_twin(sums.group_sums, sums.group_sums_reference)
hamming_counts = _or_twin(hamming.hamming_counts, hamming.hamming_counts_reference)
hamming_counts_between = _or_twin(hamming.hamming_counts_between, hamming.hamming_counts_between_reference)
path_maxima = _or_twin(tree.path_maxima, tree.path_maxima_reference)
two_normals = _or_twin(mixture.two_normals, mixture.two_normals_reference)
varying_ones = _or_twin(ones.varying_ones, ones.varying_ones_reference)
