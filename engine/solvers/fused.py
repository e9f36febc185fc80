"""Exact, one pass over updates and logits a step: Triton on a GPU, a compiled loop on a CPU.

The loss sees only the masked mean, so the pass that applies step t also gathers the two sums that step t + 1 needs.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.solvers.solution import Loss, Solution, loss_and_gradient
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import first_step, last_step, next_step


def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    dtype = torch.float64 if updates_RP.dtype == torch.float64 else torch.float32
    num_rows = updates_RP.shape[0]
    global_params_P = global_params_P.to(dtype)
    largest = torch.finfo(dtype).max

    # at the start all gates are equal: the masked mean is the plain mean
    gate = torch.sigmoid(torch.tensor(config.init, dtype=dtype)).item()
    with phase("mask steps", updates_RP):
        mean_P = updates_RP.sum(0, dtype=dtype) / num_rows
    gate_sum_P = torch.full_like(mean_P, num_rows * gate)
    logits_RP: Tensor | None = None

    values: list[Tensor] = []
    while True:
        value, grad_P = loss_and_gradient(loss, global_params_P + mean_P)
        values.append(value)
        # finite, so that a client with no deviation from the mean gets 0 and not NaN
        slope_P = (grad_P / gate_sum_P / config.grad_clip).clamp_(-largest, largest)
        step = len(values) - 1
        if step + 1 == config.steps or (config.is_check(step) and config.is_plateau([v.item() for v in values])):
            break
        if logits_RP is None:
            logits_RP = torch.empty(updates_RP.shape, dtype=dtype, device=updates_RP.device)
            with phase("mask steps", updates_RP, logits_RP):
                gate_sum_P, weighted_sum_P = first_step(
                    updates_RP, logits_RP, slope_P, mean_P, init=config.init, full_step=config.full_step
                )
        else:
            with phase("mask steps", updates_RP, logits_RP, logits_RP):
                gate_sum_P, weighted_sum_P = next_step(updates_RP, logits_RP, slope_P, mean_P, full_step=config.full_step)
        mean_P = weighted_sum_P / gate_sum_P

    kept_RP = None
    if keep_logits:
        kept_RP = torch.empty(updates_RP.shape, dtype=dtype, device=updates_RP.device) if logits_RP is None else logits_RP
    with phase("bits", updates_RP, logits_RP, kept_RP, updates_RP.numel() // 8):
        bits = last_step(
            updates_RP,
            logits_RP,
            slope_P,
            mean_P,
            init=config.init,
            full_step=config.full_step,
            threshold=config.logit_threshold,
            logits_out_RP=kept_RP,
        )
    return Solution(bits, kept_RP, torch.stack(values).tolist())
