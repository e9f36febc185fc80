"""Mixtures of two normals fitted by EM: in one dimension from the best cut, and with full covariances from given labels.

Shapes: R points, K dimensions.
"""

import math

import torch
from torch import Tensor

__all__ = ["gaussian_mixture", "gaussian_mixture_reference", "two_normals", "two_normals_reference"]


def two_normals_reference(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Plain twin of :func:`two_normals`, on any device."""
    num_rows = x_R.shape[0]
    sorted_R, order = x_R.sort()
    count_R = torch.arange(1, num_rows, dtype=x_R.dtype, device=x_R.device)
    left_sum = sorted_R.cumsum(0)[:-1]
    right_sum = sorted_R.sum() - left_sum
    # least squares within two groups = most squares between them
    cut = int((left_sum**2 / count_R + right_sum**2 / (num_rows - count_R)).argmax()) + 1
    member_R2 = torch.zeros(num_rows, 2, dtype=x_R.dtype, device=x_R.device)
    member_R2[order[:cut], 0] = 1
    member_R2[order[cut:], 1] = 1

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


def two_normals(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Labels 0 or 1, ``(R,)`` int64, of a mixture of two normals fitted by EM from the best cut of the points into two means.

    Args:
        x_R: ``(R,)`` float64, R >= 2.
        max_steps: of EM; it stops earlier where nothing changes any more.
        variance_floor: of either normal, as a share of the variance of all points.
    """
    return two_normals_reference(x_R, max_steps, variance_floor)


def gaussian_mixture_reference(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Plain twin of :func:`gaussian_mixture`, on any device."""
    regularisation, tolerance, max_steps = 1e-6, 1e-3, 100
    num_rows, num_dims = x_RK.shape
    member_R2 = torch.nn.functional.one_hot(labels_R, 2).to(x_RK)
    likelihood, settled = -math.inf, False
    for _ in range(max_steps + 1):  # the last one's labels are of the parameters it settled on
        weight_2 = member_R2.sum(0) + 10 * torch.finfo(x_RK.dtype).eps
        mean_2K = member_R2.T @ x_RK / weight_2[:, None]
        offset_2RK = x_RK - mean_2K[:, None]
        covariance_2KK = (offset_2RK * member_R2.T[..., None]).mT @ offset_2RK / weight_2[:, None, None]
        covariance_2KK += regularisation * torch.eye(num_dims, dtype=x_RK.dtype, device=x_RK.device)
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
        settled = abs(likelihood - before) < tolerance
    return member_R2.argmax(1)


def gaussian_mixture(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Labels, ``(R,)`` int64, of two normals with full covariances, fitted by EM from hard labels; scikit-learn's defaults.

    Args:
        x_RK: ``(R, K)`` float64.
        labels_R: ``(R,)`` int64, 0 or 1.
    """
    return gaussian_mixture_reference(x_RK, labels_R)
