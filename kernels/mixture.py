"""Mixtures of two normals, fitted by expectation maximisation (EM): which of the two each row belongs to.

With weights w, means and (co)variances of the two, and p[i, c] the probability that row i is of component c,

    M step:  w[c] = sum_i p[i, c],     mean[c] = sum_i p[i, c] x[i] / w[c],
             cov[c] = sum_i p[i, c] (x[i] - mean[c]) (x[i] - mean[c])^T / w[c]
    E step:  p[i, c] = w[c] N(x[i]; mean[c], cov[c]) / sum_d w[d] N(x[i]; mean[d], cov[d])

(Dempster, Laird & Rubin 1977). All of it in float64. Shapes: R rows, K dimensions.

Devices: CUDA through Triton, all steps to convergence in one launch and without the host; on a CPU plain torch, the twins
``*_reference``. Triton's sums are rounded in another order, so a row that belongs to both
components alike may come out on the other side.
"""

import math
from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels._backends import compiled
from skymask_gpu.kernels._checks import check_number, check_tensor

__all__ = ["gaussian_mixture", "gaussian_mixture_reference", "two_normals", "two_normals_reference"]

# Of the mixture in two dimensions: scikit-learn's defaults (reg_covar, tol, max_iter).
REGULARISATION = 1e-6
TOLERANCE = 1e-3
MOST_STEPS = 100


# --- plain twins --------------------------------------------------------------------------------------------------------


def two_normals_reference(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Plain twin of :func:`two_normals`, on any device."""
    member_R2 = torch.nn.functional.one_hot(best_cut(x_R), 2).to(x_R.dtype)
    floor = variance_floor * x_R.var(correction=0)
    for _ in range(max_steps):
        weight_2 = member_R2.sum(0).clamp_min(torch.finfo(x_R.dtype).tiny)
        mean_2 = (member_R2 * x_R[:, None]).sum(0) / weight_2
        variance_2 = ((member_R2 * (x_R[:, None] - mean_2) ** 2).sum(0) / weight_2).clamp_min(floor)
        log_density_R2 = weight_2.log() - 0.5 * variance_2.log() - 0.5 * (x_R[:, None] - mean_2) ** 2 / variance_2
        before_R2, member_R2 = member_R2, log_density_R2.softmax(1)
        if torch.equal(before_R2, member_R2):
            break
    return member_R2.argmax(1)


def gaussian_mixture_reference(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Plain twin of :func:`gaussian_mixture`, on any device and for any K."""
    num_rows, num_dims = x_RK.shape
    member_R2 = torch.nn.functional.one_hot(labels_R, 2).to(x_RK)
    likelihood, settled = -math.inf, False
    for _ in range(MOST_STEPS + 1):  # the last one's labels are of the parameters it settled on, as scikit-learn's are
        weight_2 = member_R2.sum(0) + 10 * torch.finfo(x_RK.dtype).eps
        mean_2K = member_R2.T @ x_RK / weight_2[:, None]
        offset_2RK = x_RK - mean_2K[:, None]
        covariance_2KK = (offset_2RK * member_R2.T[..., None]).mT @ offset_2RK / weight_2[:, None, None]
        covariance_2KK += REGULARISATION * torch.eye(num_dims, dtype=x_RK.dtype, device=x_RK.device)
        factor_2KK = torch.linalg.cholesky(covariance_2KK)
        white_2KR = torch.linalg.solve_triangular(factor_2KK, offset_2RK.mT, upper=False)
        log_det_2 = factor_2KK.diagonal(dim1=1, dim2=2).log().sum(1)
        log_density_R2 = (
            (weight_2 / num_rows).log() - log_det_2 - 0.5 * num_dims * math.log(2 * math.pi) - 0.5 * (white_2KR**2).sum(1).T
        )
        before, likelihood = likelihood, log_density_R2.logsumexp(1).mean().item()
        member_R2 = log_density_R2.softmax(1)
        if settled:
            break
        settled = abs(likelihood - before) < TOLERANCE
    return member_R2.argmax(1)


def best_cut(x_R: Tensor) -> Tensor:
    """Labels 0 and 1, ``(R,)`` int64: the cut in two that leaves the least squares around the two means. No host."""
    num_rows = len(x_R)
    sorted_R, order = x_R.sort()
    count_R = torch.arange(1, num_rows, dtype=x_R.dtype, device=x_R.device)
    left_sum = sorted_R.cumsum(0)[:-1]
    right_sum = sorted_R.sum() - left_sum
    # least squares within two groups = most squares between them
    cut = (left_sum**2 / count_R + right_sum**2 / (num_rows - count_R)).argmax() + 1
    beyond_R = torch.arange(num_rows, device=x_R.device) >= cut
    return torch.zeros_like(order).scatter_(0, order, beyond_R.long())


# --- public -------------------------------------------------------------------------------------------------------------


def two_normals(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Labels 0 or 1, ``(R,)`` int64, of a one-dimensional mixture of two normals, from the best cut into two means.

    Args:
        x_R: ``(R,)`` float64, R >= 2.
        max_steps: at most so many steps of EM, at least 1; fewer where a step changes nothing.
        variance_floor: of each normal, as a share of the variance of all of ``x_R``.

    Raises:
        ValueError: a shape or a dtype does not fit, ``max_steps`` is less than 1, or no kernel exists for the device.
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
    """Labels 0 or 1, ``(R,)`` int64, of two normals with full covariances, fitted by EM from hard labels.

    The same as scikit-learn's ``GaussianMixture(2)`` with its defaults, from that start: at most 100 steps, until the mean
    log-likelihood rises by less than 1e-3, 1e-6 added to the variances.

    Args:
        x_RK: ``(R, 2)`` float64.
        labels_R: ``(R,)`` int64, 0 or 1; a GPU gives a row with another label to neither.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, on a CPU a label is neither 0 nor 1, or no kernel exists for the
            device.
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


_backend = partial(compiled, "mixture")
