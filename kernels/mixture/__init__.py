"""Mixtures of two normals, fitted by expectation maximisation (EM).

They say to which of the two normals each row belongs. With weights w, means and (co)variances of
the two components, and p[i, c] the probability that row i belongs to component c,

    M step:  w[c] = sum_i p[i, c],     mean[c] = sum_i p[i, c] x[i] / w[c],
             cov[c] = sum_i p[i, c] (x[i] - mean[c]) (x[i] - mean[c])^T / w[c]
    E step:  p[i, c] = w[c] N(x[i]; mean[c], cov[c]) / sum_d w[d] N(x[i]; mean[d], cov[d])

(Dempster, Laird & Rubin 1977). All of it is computed in float64. Shapes: R rows, K dimensions.

Devices: on CUDA one Triton launch takes all steps to convergence, without the host. On a CPU the
plain twins run. Triton adds up its sums in another order, so a row that is equally likely in both
components may get the other label.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.mixture.reference import (
    MOST_STEPS,
    best_cut,
    gaussian_mixture_reference,
    two_normals_reference,
)
from skymask_gpu.kernels.shared.checks import check_number, check_tensor

__all__ = [
    "MOST_STEPS",
    "best_cut",
    "gaussian_mixture",
    "gaussian_mixture_reference",
    "two_normals",
    "two_normals_reference",
]


def two_normals(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Label each number with the normal that it belongs to, 0 or 1: ``(R,)`` int64.

    EM starts from a cut that divides the numbers in two: the one with the smallest sum of squared
    distances to the two means.

    Args:
        x_R: ``(R,)`` float64, R >= 2.
        max_steps: the most steps of EM, at least 1. It ends earlier if a step changes nothing.
        variance_floor: the least variance of each normal, as a share of the variance of ``x_R``.

    Raises:
        ValueError: a shape or a dtype does not fit, ``max_steps`` is less than 1, or no kernel
            exists for the device.

    Example:
        >>> x_R = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1], dtype=torch.float64)
        >>> two_normals(x_R, 10, 1e-3).tolist()
        [0, 0, 0, 1, 1]
    """
    check_tensor("x", x_R, ("R",), (torch.float64,), "any strides")
    if len(x_R) < 2:
        raise ValueError("x must have at least 2 rows, got 1")
    check_number("max_steps", max_steps, 1)
    if x_R.device.type == "cpu":
        return two_normals_reference(x_R, max_steps, variance_floor)
    labels_R: Tensor = _backend("x", x_R).two_normals(x_R, max_steps, variance_floor)
    return labels_R


def gaussian_mixture(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Label each row with one of two normals with full covariances, 0 or 1: ``(R,)`` int64.

    From the given labels it computes the same as scikit-learn's ``GaussianMixture(2)`` with its
    defaults: at most 100 steps, until the mean log-likelihood rises by less than 1e-3, with 1e-6
    added to the variances.

    Args:
        x_RK: ``(R, 2)`` float64.
        labels_R: ``(R,)`` int64, 0 or 1, where EM starts. A GPU does not check them; it gives a row
            with another label to neither normal.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, a label on a CPU is neither 0 nor 1,
            or no kernel exists for the device.

    Example:
        >>> x_RK = torch.tensor([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8]], dtype=torch.float64)
        >>> gaussian_mixture(x_RK, torch.tensor([0, 0, 0, 1, 1])).tolist()
        [0, 0, 0, 1, 1]
    """
    check_tensor("x", x_RK, ("R", 2), (torch.float64,), "any strides")
    check_tensor("labels", labels_R, (len(x_RK),), (torch.int64,), "any strides", device=x_RK.device)
    if x_RK.device.type == "cpu":
        lowest, highest = (int(label) for label in labels_R.aminmax())
        if lowest < 0 or highest > 1:
            raise ValueError(f"labels must be 0 or 1, got {lowest} to {highest}")
        return gaussian_mixture_reference(x_RK, labels_R)
    fitted_R: Tensor = _backend("x", x_RK).gaussian_mixture(x_RK, labels_R)
    return fitted_R


_backend = partial(compiled, __name__)
