"""Plain twins of the mixtures, in PyTorch. On a CPU they are what the public functions run."""

import math

import torch
from torch import Tensor

__all__ = [
    "MOST_STEPS",
    "REGULARISATION",
    "TOLERANCE",
    "best_cut",
    "gaussian_mixture_reference",
    "two_normals_reference",
]

# scikit-learn's defaults for the mixture in two dimensions: reg_covar, tol, max_iter.
REGULARISATION = 1e-6
TOLERANCE = 1e-3
MOST_STEPS = 100


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
    # One more step: the labels follow from the last parameters, as scikit-learn's do.
    for _ in range(MOST_STEPS + 1):
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
    """Labels, ``(R,)`` int64, of the cut with the least sum of squares around the two means.

    The host does not wait for it.
    """
    num_rows = len(x_R)
    sorted_R, order = x_R.sort()
    count_R = torch.arange(1, num_rows, dtype=x_R.dtype, device=x_R.device)
    left_sum = sorted_R.cumsum(0)[:-1]
    right_sum = sorted_R.sum() - left_sum
    # The sum of squares within the two groups is least where the one between the groups is
    # greatest.
    cut = (left_sum**2 / count_R + right_sum**2 / (num_rows - count_R)).argmax() + 1
    beyond_R = torch.arange(num_rows, device=x_R.device) >= cut
    return torch.zeros_like(order).scatter_(0, order, beyond_R.long())
