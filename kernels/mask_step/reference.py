"""Plain twins of the exact mask step, in PyTorch: what the compiled versions are compared with."""

import torch
from torch import Tensor

__all__ = ["first_step_reference", "last_step_reference", "next_step_reference"]


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
