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

import importlib.util

import torch
from torch import Tensor

__all__ = [
    "first_step",
    "first_step_reference",
    "last_step",
    "last_step_reference",
    "next_step",
    "next_step_reference",
    "why_not",
]

_REQUIRED_MODULE = {"cuda": "triton", "cpu": "numba"}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on ``device`` with updates of ``dtype``; ``None`` if they can."""
    module = _REQUIRED_MODULE.get(device.type)
    if module is None:
        return f"no kernel for device type {device.type!r} (cuda and cpu have one)"
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed (pip install {module})"
    supported = {torch.float32, torch.bfloat16} | ({torch.float64} if device.type == "cpu" else set())
    if dtype not in supported:
        return f"no {device.type} kernel for {dtype} updates (wanted one of {sorted(map(str, supported))})"
    return None


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
    _check(updates_RP, slope_P, mean_P, logits_RP)
    return _backend(updates_RP).first_step(updates_RP, logits_RP, slope_P, mean_P, init=init, full_step=full_step)


def next_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """A step from stored logits: reads and overwrites ``logits_RP``. Arguments, result and errors as in :func:`first_step`."""
    _check(updates_RP, slope_P, mean_P, logits_RP)
    return _backend(updates_RP).next_step(updates_RP, logits_RP, slope_P, mean_P, full_step=full_step)


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
    _check(updates_RP, slope_P, mean_P, *(x for x in (logits_RP, logits_out_RP) if x is not None))
    return _backend(updates_RP).last_step(
        updates_RP,
        logits_RP,
        slope_P,
        mean_P,
        init=init,
        full_step=full_step,
        threshold=threshold,
        logits_out_RP=logits_out_RP,
    )


def _backend(updates_RP: Tensor):  # type: ignore[no-untyped-def]  # a module: either implementation
    reason = why_not(updates_RP.device, updates_RP.dtype)
    if reason is not None:
        raise ValueError(f"updates: {reason}")
    if updates_RP.is_cuda:
        from skymask_gpu.kernels._triton import mask_step

        return mask_step
    from skymask_gpu.kernels._cpu import mask_step as cpu_mask_step

    return cpu_mask_step


def _check(updates_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *logits: Tensor) -> None:
    if updates_RP.dim() != 2 or 0 in updates_RP.shape:
        raise ValueError(f"updates must be a non-empty (R, P) tensor, got shape {tuple(updates_RP.shape)}")
    dtype = compute_dtype(updates_RP.dtype)
    num_params = updates_RP.shape[1]
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [("slope", slope_P, (num_params,)), ("mean", mean_P, (num_params,))]
    wanted += [("logits", x, tuple(updates_RP.shape)) for x in logits]
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != updates_RP.device:
            raise ValueError(
                f"{name} must have shape {shape}, dtype {dtype} and device {updates_RP.device}, "
                f"got {tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
            )
    for name, tensor in (
        ("updates", updates_RP),
        ("slope", slope_P),
        ("mean", mean_P),
        *(("logits", x) for x in logits),
    ):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must have unit column stride, got strides {tensor.stride()}; call .contiguous()")
