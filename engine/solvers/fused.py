"""Exact: one pass over updates and logits per step.

The pass is a Triton kernel on a GPU and a compiled loop on a CPU. The loss depends on the masks
only through the masked mean, so the pass that applies step t can also gather the two sums that step
t + 1 needs.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.solvers.solution import Loss, MaskedModel, Solution, stops
from skymask_gpu.engine.solvers.solver import solver
from skymask_gpu.engine.step_loop import StepLoop
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import first_step, last_step, next_step, why_not

# What a step costs per row and parameter, see COST_SOURCES. On a CPU it is measured by ``python -m
# skymask_gpu.bench.costs``. On a GPU, float32 logits are read and written and updates read.
_ROW_STEP = {"cpu": 0.68, "cuda": 12.0}


def _cost(device_type: str, num_rows: int, config: MaskTraining) -> float:
    return _ROW_STEP[device_type] * num_rows * config.steps


@solver("fused", why_not=why_not, cost=_cost)
def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    """Train the masks of all rows; see :meth:`Solver.run` for the arguments."""
    dtype = torch.float64 if updates_RP.dtype == torch.float64 else torch.float32
    num_rows, device = updates_RP.shape[0], updates_RP.device
    with phase("mask steps", updates_RP):
        mean_P = updates_RP.sum(0, dtype=dtype) / num_rows
    masked = MaskedModel(loss, global_params_P.to(dtype), mean_P, num_rows, config, keep_history=False)

    masked.evaluate()
    logits_RP, step, not_captured = None, 0, None
    if config.steps > 1:
        logits_RP = torch.empty(updates_RP.shape, dtype=dtype, device=device)
        # This pass reads no logits: they all equal ``config.init``.
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
    """Train from step 1 to the forward and backward pass of the last step.

    Returns:
        The number of that step, and why the steps were not captured, if so.
    """

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
