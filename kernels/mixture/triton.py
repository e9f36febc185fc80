"""Mixtures of two normals in Triton: one program fits a whole mixture, to convergence.

It goes over the rows in blocks and keeps only sums and parameters. Each step passes over the rows
twice: first for weights and means, then for variances around the new means. Both passes compute the
probability of a row again from the parameters of the step before. So any number of rows will do,
and only the labels are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.mixture.reference import MOST_STEPS, REGULARISATION, TOLERANCE, best_cut
from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, on_device_of

BLOCK_R = 256
NUM_WARPS = 8

_TINY = tl.constexpr(torch.finfo(torch.float64).tiny)
_TEN_EPS = tl.constexpr(10 * torch.finfo(torch.float64).eps)
_LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _softmax(first, second):
    """The softmax of two numbers, and the logarithm of the sum of their exponentials."""
    highest = tl.maximum(first, second)
    lower = tl.exp(tl.minimum(first, second) - highest)
    total = 1.0 + lower
    nearer, further = 1.0 / total, lower / total
    return tl.where(first >= second, nearer, further), tl.where(first >= second, further, nearer), highest + tl.log(total)


@triton.jit
def _members(x, label, step, scale_0, mean_0, sharpness_0, scale_1, mean_1, sharpness_1):
    """The probabilities of both components: by the label in step 0, computed in later steps."""
    log_0 = scale_0 - sharpness_0 * (x - mean_0) * (x - mean_0)
    log_1 = scale_1 - sharpness_1 * (x - mean_1) * (x - mean_1)
    member_0, member_1, _ = _softmax(log_0, log_1)
    member_0 = tl.where(step == 0, (label == 0).to(tl.float64), member_0)
    member_1 = tl.where(step == 0, (label == 1).to(tl.float64), member_1)
    return member_0, member_1


@kernel
def two_normals_kernel(
    # pointers
    x_ptr,  # (R,) float64
    labels_ptr,  # (R,) int64, overwritten
    floor_ptr,  # (1,) float64, the least variance
    # sizes
    num_rows,
    max_steps,
    # meta-parameters
    BLOCK_R: tl.constexpr,
):
    floor = tl.load(floor_ptr)
    zero = floor * 0
    # The logarithm of a component's density at x is scale - sharpness * (x - mean)^2.
    scale_0, mean_0, sharpness_0 = zero, zero, zero
    scale_1, mean_1, sharpness_1 = zero, zero, zero
    step = 0
    changing = True
    while changing & (step < max_steps):
        sum_0, sum_1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_x0, sum_x1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        for row in range(0, num_rows, BLOCK_R):
            offs_r = row + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_rows
            x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            label = tl.load(labels_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
            member_0, member_1 = _members(x, label, step, scale_0, mean_0, sharpness_0, scale_1, mean_1, sharpness_1)
            sum_0 += tl.where(mask_r, member_0, 0.0)
            sum_1 += tl.where(mask_r, member_1, 0.0)
            sum_x0 += tl.where(mask_r, member_0 * x, 0.0)
            sum_x1 += tl.where(mask_r, member_1 * x, 0.0)
        weight_0, weight_1 = tl.maximum(tl.sum(sum_0), _TINY), tl.maximum(tl.sum(sum_1), _TINY)
        new_mean_0, new_mean_1 = tl.sum(sum_x0) / weight_0, tl.sum(sum_x1) / weight_1

        sum_xx0, sum_xx1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        for row in range(0, num_rows, BLOCK_R):
            offs_r = row + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_rows
            x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            label = tl.load(labels_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
            member_0, member_1 = _members(x, label, step, scale_0, mean_0, sharpness_0, scale_1, mean_1, sharpness_1)
            sum_xx0 += tl.where(mask_r, member_0 * (x - new_mean_0) * (x - new_mean_0), 0.0)
            sum_xx1 += tl.where(mask_r, member_1 * (x - new_mean_1) * (x - new_mean_1), 0.0)
        variance_0 = tl.maximum(tl.sum(sum_xx0) / weight_0, floor)
        variance_1 = tl.maximum(tl.sum(sum_xx1) / weight_1, floor)
        new_scale_0 = tl.log(weight_0) - 0.5 * tl.log(variance_0)
        new_scale_1 = tl.log(weight_1) - 0.5 * tl.log(variance_1)
        new_sharpness_0, new_sharpness_1 = 0.5 / variance_0, 0.5 / variance_1

        # Parameters that did not change give the same probabilities now and in all later steps.
        changing = (new_scale_0 != scale_0) | (new_mean_0 != mean_0) | (new_sharpness_0 != sharpness_0)
        changing = changing | (new_scale_1 != scale_1) | (new_mean_1 != mean_1) | (new_sharpness_1 != sharpness_1)
        scale_0, mean_0, sharpness_0 = new_scale_0, new_mean_0, new_sharpness_0
        scale_1, mean_1, sharpness_1 = new_scale_1, new_mean_1, new_sharpness_1
        step += 1

    for row in range(0, num_rows, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        member_0, member_1 = _members(x, x, 1, scale_0, mean_0, sharpness_0, scale_1, mean_1, sharpness_1)
        tl.store(labels_ptr + offs_r, (member_1 > member_0).to(tl.int64), mask=mask_r)


@triton.jit
def _plane_members(x, y, label, step, scale_0, x_0, y_0, per_x0, slope_0, per_y0, scale_1, x_1, y_1, per_x1, slope_1, per_y1):
    """Like ``_members``, in two dimensions; the log of both densities together is returned, too."""
    white_x0, white_x1 = (x - x_0) * per_x0, (x - x_1) * per_x1
    white_y0, white_y1 = (y - y_0 - slope_0 * white_x0) * per_y0, (y - y_1 - slope_1 * white_x1) * per_y1
    log_0 = scale_0 - 0.5 * (white_x0 * white_x0 + white_y0 * white_y0)
    log_1 = scale_1 - 0.5 * (white_x1 * white_x1 + white_y1 * white_y1)
    member_0, member_1, log_sum = _softmax(log_0, log_1)
    member_0 = tl.where(step == 0, (label == 0).to(tl.float64), member_0)
    member_1 = tl.where(step == 0, (label == 1).to(tl.float64), member_1)
    return member_0, member_1, log_sum


@triton.jit
def _whitening(weight, rows, xx, yx, yy):
    """The log scale of a component's density, and the three numbers that whiten an offset."""
    root_x = tl.sqrt(xx)
    slope = yx / root_x
    root_y = tl.sqrt(yy - slope * slope)
    return tl.log(weight / rows) - tl.log(root_x) - tl.log(root_y) - _LOG_2PI, 1.0 / root_x, slope, 1.0 / root_y


@kernel
def gaussian_mixture_kernel(
    # pointers
    x_ptr,  # (2, R) float64
    labels_ptr,  # (R,) int64, overwritten
    # sizes
    num_rows,
    # meta-parameters
    MOST_STEPS: tl.constexpr,
    REGULARISATION: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.cast(num_rows, tl.float64)
    zero = rows * 0
    scale_0, x_0, y_0, per_x0, slope_0, per_y0 = zero, zero, zero, zero, zero, zero
    scale_1, x_1, y_1, per_x1, slope_1, per_y1 = zero, zero, zero, zero, zero, zero
    likelihood = zero
    step = 0
    rising = True
    while rising:
        sum_0, sum_1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_x0, sum_x1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_y0, sum_y1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_log = tl.zeros([BLOCK_R], dtype=tl.float64)
        for row in range(0, num_rows, BLOCK_R):
            offs_r = row + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_rows
            x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            y = tl.load(x_ptr + num_rows + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            label = tl.load(labels_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
            member_0, member_1, log_sum = _plane_members(
                x, y, label, step, scale_0, x_0, y_0, per_x0, slope_0, per_y0, scale_1, x_1, y_1, per_x1, slope_1, per_y1
            )
            sum_0 += tl.where(mask_r, member_0, 0.0)
            sum_1 += tl.where(mask_r, member_1, 0.0)
            sum_x0 += tl.where(mask_r, member_0 * x, 0.0)
            sum_x1 += tl.where(mask_r, member_1 * x, 0.0)
            sum_y0 += tl.where(mask_r, member_0 * y, 0.0)
            sum_y1 += tl.where(mask_r, member_1 * y, 0.0)
            sum_log += tl.where(mask_r, log_sum, 0.0)
        before = likelihood
        likelihood = tl.sum(sum_log) / rows
        # This is the likelihood of the parameters so far. Steps 0 and 1 have none to compare it
        # with. When it has settled, one step more follows, as in the twin.
        rising = ((step < 2) | (tl.abs(likelihood - before) >= TOLERANCE)) & (step < MOST_STEPS)
        weight_0, weight_1 = tl.sum(sum_0) + _TEN_EPS, tl.sum(sum_1) + _TEN_EPS
        new_x_0, new_y_0 = tl.sum(sum_x0) / weight_0, tl.sum(sum_y0) / weight_0
        new_x_1, new_y_1 = tl.sum(sum_x1) / weight_1, tl.sum(sum_y1) / weight_1
        sum_xx0, sum_xx1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_yx0, sum_yx1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        sum_yy0, sum_yy1 = tl.zeros([BLOCK_R], dtype=tl.float64), tl.zeros([BLOCK_R], dtype=tl.float64)
        for row in range(0, num_rows, BLOCK_R):
            offs_r = row + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_rows
            x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            y = tl.load(x_ptr + num_rows + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            label = tl.load(labels_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
            member_0, member_1, _ = _plane_members(
                x, y, label, step, scale_0, x_0, y_0, per_x0, slope_0, per_y0, scale_1, x_1, y_1, per_x1, slope_1, per_y1
            )
            member_0, member_1 = tl.where(mask_r, member_0, 0.0), tl.where(mask_r, member_1, 0.0)
            sum_xx0 += member_0 * (x - new_x_0) * (x - new_x_0)
            sum_yx0 += member_0 * (x - new_x_0) * (y - new_y_0)
            sum_yy0 += member_0 * (y - new_y_0) * (y - new_y_0)
            sum_xx1 += member_1 * (x - new_x_1) * (x - new_x_1)
            sum_yx1 += member_1 * (x - new_x_1) * (y - new_y_1)
            sum_yy1 += member_1 * (y - new_y_1) * (y - new_y_1)
        xx_0, xx_1 = tl.sum(sum_xx0) / weight_0 + REGULARISATION, tl.sum(sum_xx1) / weight_1 + REGULARISATION
        yx_0, yx_1 = tl.sum(sum_yx0) / weight_0, tl.sum(sum_yx1) / weight_1
        yy_0, yy_1 = tl.sum(sum_yy0) / weight_0 + REGULARISATION, tl.sum(sum_yy1) / weight_1 + REGULARISATION
        scale_0, per_x0, slope_0, per_y0 = _whitening(weight_0, rows, xx_0, yx_0, yy_0)
        scale_1, per_x1, slope_1, per_y1 = _whitening(weight_1, rows, xx_1, yx_1, yy_1)
        x_0, y_0, x_1, y_1 = new_x_0, new_y_0, new_x_1, new_y_1
        step += 1

    for row in range(0, num_rows, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        x = tl.load(x_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        y = tl.load(x_ptr + num_rows + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        member_0, member_1, _ = _plane_members(
            x, y, x, 1, scale_0, x_0, y_0, per_x0, slope_0, per_y0, scale_1, x_1, y_1, per_x1, slope_1, per_y1
        )
        tl.store(labels_ptr + offs_r, (member_1 > member_0).to(tl.int64), mask=mask_r)


# --- called with checked arguments ---


def two_normals(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    labels_R = best_cut(x_R)
    floor_1 = (variance_floor * x_R.var(correction=0)).view(1)
    with on_device_of(x_R):
        two_normals_kernel[(1,)](
            x_R.contiguous(),
            labels_R,
            floor_1,
            len(x_R),
            max_steps,
            BLOCK_R=BLOCK_R,
            **launch_options(NUM_WARPS),
        )
    return labels_R


def gaussian_mixture(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    labels_R = labels_R.clone(memory_format=torch.contiguous_format)
    with on_device_of(x_RK):
        gaussian_mixture_kernel[(1,)](
            x_RK.T.contiguous(),
            labels_R,
            len(x_RK),
            MOST_STEPS=MOST_STEPS,
            REGULARISATION=REGULARISATION,
            TOLERANCE=TOLERANCE,
            BLOCK_R=BLOCK_R,
            **launch_options(NUM_WARPS),
        )
    return labels_R


# The offline compile builds these.
VARIANTS = (
    Variant(
        "two_normals",
        two_normals_kernel,
        NUM_WARPS,
        {"x_ptr": "fp64", "labels_ptr": "i64", "floor_ptr": "fp64"},
        {"BLOCK_R": BLOCK_R},
    ),
    Variant(
        "gaussian_mixture",
        gaussian_mixture_kernel,
        NUM_WARPS,
        {"x_ptr": "fp64", "labels_ptr": "i64"},
        {"MOST_STEPS": MOST_STEPS, "REGULARISATION": REGULARISATION, "TOLERANCE": TOLERANCE, "BLOCK_R": BLOCK_R},
    ),
)
