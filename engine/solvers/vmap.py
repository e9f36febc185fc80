"""The vmap solver is exact; ``torch.func.vmap`` trains all rows at once, without kernels."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from skymask_gpu.engine.bits import pack_bits
from skymask_gpu.engine.memory import SMALLEST_TILE, in_column_tiles
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.progress import step_done
from skymask_gpu.engine.replayed_loss import ReplayedLoss
from skymask_gpu.engine.solvers.solution import Loss, Solution, loss_and_gradient, stops
from skymask_gpu.engine.solvers.solver import solver
from skymask_gpu.engine.training_config import MaskTraining

# The number of elements of a temporary: it fits in the cache of a CPU, and occupies a GPU.
_TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@solver("vmap")
def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    """Train the masks of all rows, tile by tile of columns; arguments as in :class:`Solver`."""
    dtype = torch.float64 if updates_RP.dtype == torch.float64 else torch.float32
    num_rows, num_params = updates_RP.shape
    tile = max(SMALLEST_TILE, _TILE_ELEMENTS.get(updates_RP.device.type, 2**18) // num_rows)
    global_params_P = global_params_P.to(dtype)
    logits_RP = torch.full((num_rows, num_params), config.init, dtype=dtype, device=updates_RP.device)
    gate_sum_P = torch.empty(num_params, dtype=dtype, device=updates_RP.device)
    mean_P = torch.empty_like(gate_sum_P)

    def gather(begin: int, end: int) -> None:
        columns = slice(begin, end)
        gates, weighted = vmap(_gate_and_weighted)(logits_RP[:, columns], updates_RP[:, columns].to(dtype))
        gate_sum_P[columns] = gates.sum(0)
        mean_P[columns] = weighted.sum(0) / gate_sum_P[columns]

    replayed = ReplayedLoss.of(loss)
    values: list[Tensor] = []
    losses: list[float] = []
    looks = set(stops(config))
    for number in range(config.steps):
        with phase("mask steps", updates_RP, logits_RP):
            in_column_tiles(gather, num_params, tile=tile)
        value, grad_P = loss_and_gradient(replayed, global_params_P + mean_P)

        def step(begin: int, end: int, grad_P: Tensor = grad_P) -> None:
            columns = slice(begin, end)
            gradient = vmap(grad(_first_order_loss), in_dims=(0, 0, None, None, None))(
                logits_RP[:, columns],
                updates_RP[:, columns].to(dtype),
                mean_P[columns],
                gate_sum_P[columns],
                grad_P[columns],
            )
            logits_RP[:, columns] -= (gradient / config.grad_clip).clamp(-1, 1) * config.full_step

        with phase("mask steps", updates_RP, logits_RP, logits_RP):
            in_column_tiles(step, num_params, tile=tile)
        values.append(value.to(torch.float64))
        step_done()
        # Each look makes the host wait for the device.
        if number in looks:
            losses = torch.stack(values).tolist()
            if config.is_plateau(losses):
                break

    with phase("bits", logits_RP, logits_RP.numel() // 8):
        bits = pack_bits(logits_RP > config.logit_threshold)
    return Solution(bits, logits_RP if keep_logits else None, losses, not_captured=replayed.not_captured)


def _gate_and_weighted(logits_P: Tensor, update_P: Tensor) -> tuple[Tensor, Tensor]:
    gate_P = torch.sigmoid(logits_P)
    return gate_P, gate_P * update_P


def _first_order_loss(logits_P: Tensor, update_P: Tensor, mean_P: Tensor, gate_sum_P: Tensor, grad_P: Tensor) -> Tensor:
    """A first-order model of what one row's logits add to the loss.

    Its gradient with respect to these logits is that of the loss, by the quotient rule.
    """
    return (grad_P * torch.sigmoid(logits_P) * (update_P - mean_P) / gate_sum_P).sum()
