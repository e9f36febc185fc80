"""Exact, one pass over updates and logits a step: Triton on a GPU, a compiled loop on a CPU.

The loss sees only the masked mean, so the pass that applies step t also gathers the two sums that step t + 1 needs.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.solvers.solution import Loss, MaskedModel, Solution, stops
from skymask_gpu.engine.step_loop import StepLoop
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import first_step, last_step, next_step


def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    dtype = torch.float64 if updates_RP.dtype == torch.float64 else torch.float32
    num_rows, device = updates_RP.shape[0], updates_RP.device
    with phase("mask steps", updates_RP):
        mean_P = updates_RP.sum(0, dtype=dtype) / num_rows
    masked = MaskedModel(loss, global_params_P.to(dtype), mean_P, num_rows, config, keep_history=False)

    masked.evaluate()
    logits_RP, step, not_captured = None, 0, None
    if config.steps > 1:
        logits_RP = torch.empty(updates_RP.shape, dtype=dtype, device=device)
        # there are no logits to read yet
        with phase("mask steps", updates_RP, logits_RP):
            masked.move(
                first_step(updates_RP, logits_RP, masked.slope_P, masked.mean_P, init=config.init, full_step=config.full_step)
            )
        step, not_captured = _until_the_last_step(updates_RP, logits_RP, masked, config)

    kept_RP = None
    if keep_logits:
        kept_RP = torch.empty(updates_RP.shape, dtype=dtype, device=device) if logits_RP is None else logits_RP
    with phase("bits", updates_RP, logits_RP, kept_RP, updates_RP.numel() // 8):
        bits = last_step(
            updates_RP,
            logits_RP,
            masked.slope_P,
            masked.mean_P,
            init=config.init,
            full_step=config.full_step,
            threshold=config.logit_threshold,
            logits_out_RP=kept_RP,
        )
    return Solution(bits, kept_RP, masked.losses(step + 1), not_captured=not_captured)


def _until_the_last_step(
    updates_RP: Tensor, logits_RP: Tensor, masked: MaskedModel, config: MaskTraining
) -> tuple[int, str | None]:
    """From step 1 to the model's pass of the last step: that step's number, and why the steps were not captured."""

    def move() -> None:
        with phase("mask steps", updates_RP, logits_RP, logits_RP):
            masked.move(next_step(updates_RP, logits_RP, masked.slope_P, masked.mean_P, full_step=config.full_step))

    def whole_step() -> None:
        masked.evaluate()
        move()

    loop = StepLoop(whole_step, updates_RP.device)
    step = 1
    for stop in stops(config):
        loop.run(stop - step)
        masked.evaluate()
        if stop == config.steps - 1 or config.is_plateau(masked.losses(stop + 1)):
            break
        move()
        step = stop + 1
    return stop, loop.not_captured
