"""The fused exact mask step: apply the update of step t to every logit and gather the sums of step t + 1, in one pass.

With S = sigmoid(m), one step of mask training is, for row i and parameter k (SkyMask, ECCV 2024, arXiv 2312.12484, section 4.2,
the gradient written out):

    u[i, k] = clamp(slope[k] * S (1 - S) * (updates[i, k] - mean[k]), -1, 1) * full_step,     slope = g / (D * c)
    m[i, k] = m[i, k] - u[i, k]
    gate_sum[k] = sum_i S(m[i, k]),     weighted_sum[k] = sum_i S(m[i, k]) * updates[i, k]

The gradient is measured in units of the clip c before it is clamped, and ``full_step`` is the product lr * c: a logit that
takes one full step moves by exactly ``full_step``, whatever the order of rounding, so ties at the threshold stay ties.

Three variants: ``first_step`` (all logits still equal ``init``: none are read), ``next_step``, ``last_step`` (emits packed
bits). Each has a plain twin, ``*_reference``. Shapes: R rows (clients, then the root model), P parameters.

Devices: CUDA through Triton, CPU through Numba. Updates: float32 or bfloat16 (on the CPU float64 too), any row stride, unit
column stride; sums and logits in float32 (float64 for float64 updates). A GPU loads 16 bytes at a time when the row stride, P
and the pointers are multiples of 8 elements; any other shape is right, and slower.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels._backends import compiled, why_not
from skymask_gpu.kernels._checks import REALS, check_tensor

__all__ = [
    "first_step",
    "first_step_reference",
    "last_step",
    "last_step_reference",
    "next_step",
    "next_step_reference",
]


def compute_dtype(updates_dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float64 for float64 updates, float32 for all others."""
    return torch.float64 if updates_dtype == torch.float64 else torch.float32


# --- plain twins ------------------------------------------------------------------------------------------------------


def _apply_reference(updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, full_step: float) -> Tensor:
    gates_RP = torch.sigmoid(logits_RP)
    gradient_RP = slope_P * (gates_RP * (1 - gates_RP)) * (updates_RP - mean_P)
    return logits_RP - gradient_RP.clamp(-1, 1) * full_step


def _sums_reference(updates_RP: Tensor, logits_RP: Tensor) -> tuple[Tensor, Tensor]:
    gates_RP = torch.sigmoid(logits_RP)
    return gates_RP.sum(0), (gates_RP * updates_RP).sum(0)


def next_step_reference(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`next_step`; computes in the dtype of ``logits_RP``."""
    updates_RP = updates_RP.to(logits_RP.dtype)
    logits_RP.copy_(_apply_reference(updates_RP, logits_RP, slope_P, mean_P, full_step))
    return _sums_reference(updates_RP, logits_RP)


def first_step_reference(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, init: float, full_step: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`first_step`; computes in the dtype of ``logits_RP``."""
    logits_RP.fill_(init)
    return next_step_reference(updates_RP, logits_RP, slope_P, mean_P, full_step=full_step)


def last_step_reference(
    updates_RP: Tensor,
    logits_RP: Tensor | None,
    slope_P: Tensor,
    mean_P: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
    logits_out_RP: Tensor | None = None,
) -> Tensor:
    """Plain twin of :func:`last_step`; computes in the dtype of ``slope_P``."""
    if logits_RP is None:
        logits_RP = torch.full(updates_RP.shape, init, dtype=slope_P.dtype, device=updates_RP.device)
    logits_RP = _apply_reference(updates_RP.to(slope_P.dtype), logits_RP, slope_P, mean_P, full_step)
    if logits_out_RP is not None:
        logits_out_RP.copy_(logits_RP)
    num_rows, num_params = logits_RP.shape
    bits = torch.zeros(num_rows, -(-num_params // 8) * 8, dtype=torch.uint8, device=logits_RP.device)
    bits[:, :num_params] = logits_RP > threshold
    weights_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=logits_RP.device)
    return (bits.view(num_rows, -1, 8) * weights_8).sum(-1, dtype=torch.uint8)


# --- public -----------------------------------------------------------------------------------------------------------


def first_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, init: float, full_step: float
) -> tuple[Tensor, Tensor]:
    """The step from logits that all equal ``init``: reads no logits, writes ``logits_RP``.

    Args:
        updates_RP: ``(R, P)`` float32 or bfloat16 (CPU: float64 too), unit column stride.
        logits_RP: ``(R, P)`` of the compute dtype, written.
        slope_P: ``(P,)`` gradient over gate sum over clip, finite.
        mean_P: ``(P,)`` masked mean of the updates at ``init``.
        init: the logit of every row and parameter before the step.
        full_step: what a clipped gradient moves a logit by (lr * clip).

    Returns:
        ``gate_sum`` and ``weighted_sum``, both ``(P,)``, at the new logits.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no kernel exists for the device.
    """
    _check(updates_RP, slope_P, mean_P, logits=logits_RP)
    return _backend("updates", updates_RP).first_step(updates_RP, logits_RP, slope_P, mean_P, init=init, full_step=full_step)


def next_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """A step from stored logits: reads and overwrites ``logits_RP``. Arguments, result and errors as in :func:`first_step`."""
    _check(updates_RP, slope_P, mean_P, logits=logits_RP)
    return _backend("updates", updates_RP).next_step(updates_RP, logits_RP, slope_P, mean_P, full_step=full_step)


def last_step(
    updates_RP: Tensor,
    logits_RP: Tensor | None,
    slope_P: Tensor,
    mean_P: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
    logits_out_RP: Tensor | None = None,
) -> Tensor:
    """The final step: the bits ``m > threshold`` instead of sums.

    Args:
        logits_RP: ``(R, P)`` stored logits, or ``None`` if they all equal ``init``.
        threshold: a logit, not a probability; a logit equal to it gives bit 0.
        logits_out_RP: where to keep the final logits, or ``None``; may be ``logits_RP`` itself.

    Returns:
        ``(R, ceil(P / 8))`` uint8, bit j of byte b is parameter 8 b + j (little-endian); padding bits are 0.
    """
    stored = {"logits": logits_RP, "logits_out": logits_out_RP}
    _check(updates_RP, slope_P, mean_P, **{name: tensor for name, tensor in stored.items() if tensor is not None})
    return _backend("updates", updates_RP).last_step(
        updates_RP,
        logits_RP,
        slope_P,
        mean_P,
        init=init,
        full_step=full_step,
        threshold=threshold,
        logits_out_RP=logits_out_RP,
    )


_backend = partial(compiled, "mask_step")


def _check(updates_RP: Tensor, slope_P: Tensor, mean_P: Tensor, **logits: Tensor) -> None:
    check_tensor("updates", updates_RP, ("R", "P"), (*REALS, torch.float64), "unit column stride")
    shape, device, dtypes = tuple(updates_RP.shape), updates_RP.device, (compute_dtype(updates_RP.dtype),)
    if device.type != "cpu" and updates_RP.dtype == torch.float64:
        raise ValueError(f"updates: {why_not(device, torch.float64)}")
    check_tensor("slope", slope_P, shape[1:], dtypes, device=device)
    check_tensor("mean", mean_P, shape[1:], dtypes, device=device)
    for name, tensor in logits.items():
        check_tensor(name, tensor, shape, dtypes, "unit column stride and rows that do not overlap", device=device)
