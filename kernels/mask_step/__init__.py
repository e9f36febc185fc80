"""The exact mask step, fused: one pass applies step t and gathers the sums of step t + 1.

With S = sigmoid(m), one step of mask training is, for row i and parameter k (SkyMask, ECCV 2024,
arXiv 2312.12484, section 4.2, with the gradient written out):

    u[i, k] = clamp(slope[k] * S (1 - S) * (updates[i, k] - mean[k]), -1, 1) * full_step
    m[i, k] = m[i, k] - u[i, k]
    gate_sum[k] = sum_i S(m[i, k]),     weighted_sum[k] = sum_i S(m[i, k]) * updates[i, k]

where slope = g / (D * c): g is the gradient of the loss with respect to the masked mean, D the
gate sum and c the clip. The gradient is measured in units of the clip before it is clamped, and
``full_step`` is the product lr * c. A logit that takes one full step therefore moves by exactly
``full_step``, whatever the order of rounding, so ties at the threshold stay ties.

There are three variants. ``first_step`` starts from logits that all equal ``init``, so it reads
none. ``next_step`` reads and overwrites the logits. ``last_step`` returns packed bits instead of
sums. Shapes: R rows (clients, then the root model), P parameters.

Devices: CUDA through Triton, CPU through Numba. Updates are float32 or bfloat16 (on the CPU float64
too), with any row stride and unit column stride; sums and logits are float32 (float64 for float64
updates). A GPU loads 16 bytes at a time where the row stride, P and the pointers are multiples of 8
elements. Any other shape gives the same result more slowly.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled, why_not
from skymask_gpu.kernels.mask_step.reference import first_step_reference, last_step_reference, next_step_reference
from skymask_gpu.kernels.shared.checks import REALS, check_tensor

__all__ = [
    "first_step",
    "first_step_reference",
    "last_step",
    "last_step_reference",
    "next_step",
    "next_step_reference",
]


def first_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, init: float, full_step: float
) -> tuple[Tensor, Tensor]:
    """Take the first step: all logits equal ``init``, so none are read; ``logits_RP`` is written.

    Args:
        updates_RP: ``(R, P)`` float32 or bfloat16 (on a CPU float64 too), unit column stride.
        logits_RP: ``(R, P)`` float32 (float64 for float64 updates), overwritten.
        slope_P: ``(P,)`` gradient over gate sum over clip, finite; dtype of the logits.
        mean_P: ``(P,)`` masked mean of the updates at ``init``; dtype of the logits.
        init: the logit of every row and parameter before the step.
        full_step: by how much a clipped gradient moves a logit (lr * clip).

    Returns:
        ``gate_sum`` and ``weighted_sum``, both ``(P,)``, at the new logits.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or no kernel exists for the
            device.

    Example:
        >>> updates_RP, logits_RP = torch.tensor([[-1.0], [1.0]]), torch.empty(2, 1)
        >>> slope_P, mean_P = torch.tensor([1e30]), torch.zeros(1)
        >>> _ = first_step(updates_RP, logits_RP, slope_P, mean_P, init=1.0, full_step=1.0)
        >>> logits_RP.flatten().tolist()
        [2.0, 0.0]
    """
    _check(updates_RP, slope_P, mean_P, logits=logits_RP)
    return _backend("updates", updates_RP).first_step(updates_RP, logits_RP, slope_P, mean_P, init=init, full_step=full_step)


def next_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """Take a step from stored logits, which it reads and overwrites in ``logits_RP``.

    Arguments, result and errors are those of :func:`first_step`.

    Example:
        >>> updates_RP, logits_RP = torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1)
        >>> slope_P, mean_P = torch.zeros(1), torch.zeros(1)
        >>> gate_sum_P, _ = next_step(updates_RP, logits_RP, slope_P, mean_P, full_step=1.0)
        >>> gate_sum_P.tolist()
        [1.0]
    """
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
    """The final step: it returns the bits ``m > threshold`` instead of sums.

    All other arguments and the errors are those of :func:`first_step`.

    Args:
        logits_RP: ``(R, P)`` stored logits, or ``None`` if they all equal ``init``.
        threshold: a logit, not a probability; a logit equal to it gives bit 0.
        logits_out_RP: where to keep the final logits, or ``None``; may be ``logits_RP`` itself.

    Returns:
        ``(R, ceil(P / 8))`` uint8. Bit j of byte b is that of parameter 8 b + j (little-endian);
        padding bits are 0.

    Example:
        >>> updates_RP = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> slope_P, mean_P = torch.full((2,), 1e30), torch.zeros(2)
        >>> training = {"init": 1.0, "full_step": 1.0, "threshold": 0.0}
        >>> last_step(updates_RP, None, slope_P, mean_P, **training).flatten().tolist()
        [3, 2]
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


_backend = partial(compiled, __name__)


def compute_dtype(updates_dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float64 for float64 updates, float32 for all others."""
    return torch.float64 if updates_dtype == torch.float64 else torch.float32


def _check(updates_RP: Tensor, slope_P: Tensor, mean_P: Tensor, **logits: Tensor) -> None:
    check_tensor("updates", updates_RP, ("R", "P"), (*REALS, torch.float64), "unit column stride")
    shape, device, dtypes = tuple(updates_RP.shape), updates_RP.device, (compute_dtype(updates_RP.dtype),)
    if device.type != "cpu" and updates_RP.dtype == torch.float64:
        raise ValueError(f"updates: {why_not(device, torch.float64)}")
    check_tensor("slope", slope_P, shape[1:], dtypes, device=device)
    check_tensor("mean", mean_P, shape[1:], dtypes, device=device)
    for name, tensor in logits.items():
        check_tensor(name, tensor, shape, dtypes, "unit column stride and rows that do not overlap", device=device)
