"""The fused solver is exact, and passes over updates and logits once per step.

The pass is a Triton kernel on a GPU and a compiled loop on a CPU. The loss depends on the masks
only through the masked mean, so the pass that applies step t can also gather the two sums that step
t + 1 needs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.progress import step_done
from skymask_gpu.engine.solvers.solution import Loss, MaskedModel, Solution, stops
from skymask_gpu.engine.solvers.solver import solver
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import first_step, last_step, next_step, why_not

# What a step costs per row and parameter, see COST_SOURCES. On a CPU it is measured by ``python -m
# skymask_gpu.bench.studies.costs``. On a GPU it is the number of bytes: float32 logits are read and
# written, and updates are read.
_ROW_STEP = {"cpu": 0.62, "cuda": 12.0}


def _cost(device_type: str, num_rows: int, config: MaskTraining) -> float:
    return _ROW_STEP[device_type] * num_rows * config.steps


@solver("fused", takes_blocks=True, why_not=why_not, cost=_cost)
def train(updates: ClientBlocks, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    """Train the masks of all rows; see :class:`Solver` for the arguments.

    The blocks, which are the clients' rows and the root's, are never copied into one tensor.
    """
    rows = _Rows.of(updates, keep_logits=keep_logits, has_steps=config.steps > 1)
    with phase("mask steps", updates):
        mean_P = functools.reduce(torch.add, [block.sum(0, dtype=rows.dtype) for block in rows.blocks]) / len(updates)
    masked = MaskedModel(loss, global_params_P.to(rows.dtype), mean_P, len(updates), config, keep_history=False)

    masked.evaluate()
    step = 0
    if config.steps > 1:
        # This pass reads no logits: they all equal ``config.init``.
        with phase("mask steps", updates, rows.logits_RP):
            masked.move(rows.sums(first_step, masked, init=config.init, full_step=config.full_step))
        step_done()
        step = _until_the_last_step(rows, masked, config)

    stored_RP = rows.logits_RP if config.steps > 1 else None
    with phase("bits", updates, stored_RP, rows.kept, len(updates) * updates.num_params // 8):
        bits = rows.bits(masked, config)
    # The last step moves the logits only on their way to the bits.
    step_done()
    return Solution(bits, rows.kept, masked.losses(step + 1), not_captured=masked.not_captured)


@dataclass(frozen=True)
class _Rows:
    """All rows block by block, and the logits of each block, which are parts of one tensor.

    Attributes:
        blocks: ``(n, P)`` each.
        dtype: of logits and sums.
        logits_RP: R rows of logits; None if they are neither stored nor kept.
        keeps_logits: whether the last step stores logits, too.
        has_steps: whether there is a step before the last, which stores logits.
    """

    blocks: list[Tensor]
    dtype: torch.dtype
    logits_RP: Tensor | None
    keeps_logits: bool
    has_steps: bool

    @classmethod
    def of(cls, updates: ClientBlocks, *, keep_logits: bool, has_steps: bool) -> "_Rows":
        dtype = torch.float64 if updates.dtype == torch.float64 else torch.float32
        logits_RP = None
        if keep_logits or has_steps:
            logits_RP = torch.empty(len(updates), updates.num_params, dtype=dtype, device=updates.device)
        return cls(list(updates), dtype, logits_RP, keep_logits, has_steps)

    @property
    def kept(self) -> Tensor | None:
        """The logits, if they are wanted after the last step."""
        return self.logits_RP if self.keeps_logits else None

    def sums(self, step: Callable[..., tuple[Tensor, Tensor]], masked: MaskedModel, **settings: float) -> tuple[Tensor, Tensor]:
        """Take a step with every block: the gate sum and the weighted sum of all rows."""
        assert self.logits_RP is not None
        parts = self.logits_RP.split([len(block) for block in self.blocks])
        found = [
            step(block, logits, masked.slope_P, masked.mean_P, **settings)
            for block, logits in zip(self.blocks, parts, strict=True)
        ]
        gate_sum_P, weighted_sum_P = found[0]
        for gates_P, weighted_P in found[1:]:
            gate_sum_P += gates_P
            weighted_sum_P += weighted_P
        return gate_sum_P, weighted_sum_P

    def bits(self, masked: MaskedModel, config: MaskTraining) -> Tensor:
        """The packed bits of all rows after the last step."""
        sizes = [len(block) for block in self.blocks]
        parts: Sequence[Tensor | None] = [None] * len(sizes) if self.logits_RP is None else self.logits_RP.split(sizes)
        found = [
            last_step(
                block,
                logits if self.has_steps else None,
                masked.slope_P,
                masked.mean_P,
                init=config.init,
                full_step=config.full_step,
                threshold=config.logit_threshold,
                logits_out_RP=logits if self.keeps_logits else None,
            )
            for block, logits in zip(self.blocks, parts, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def _until_the_last_step(rows: _Rows, masked: MaskedModel, config: MaskTraining) -> int:
    """Train from step 1 to the forward and backward pass of the last step; return its number."""
    # The newest step whose pass is done. The first one has also moved the logits.
    step = 0
    for stop in stops(config):
        while step < stop:
            if step > 0:
                with phase("mask steps", *rows.blocks, rows.logits_RP, rows.logits_RP):
                    masked.move(rows.sums(next_step, masked, full_step=config.full_step))
                step_done()
            masked.evaluate()
            step += 1
        if stop == config.steps - 1 or config.is_plateau(masked.losses(stop + 1)):
            break
    return step
