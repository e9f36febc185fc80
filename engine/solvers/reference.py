"""The reference solver defines what the masks are, in plain PyTorch with autograd.

It works on one client and one layer at a time, without kernels or shortcuts, because it is written
to be read. Every other solver is
checked against it, and it is the baseline of the benchmark.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.bits import pack_bits
from skymask_gpu.engine.progress import step_done
from skymask_gpu.engine.solvers.solution import Loss, Solution
from skymask_gpu.engine.solvers.solver import solver
from skymask_gpu.engine.training_config import MaskTraining


@solver("reference")
def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    """Train the masks as the paper defines them (SkyMask, ECCV 2024, section 4.2).

    Args:
        updates_RP: ``(R, P)`` updates, the root model's row last.
        global_params_P: ``(P,)`` parameters of the global model.
        loss: ``loss(params (P,)) -> ()``; its ``layer_sizes``, if it has them, say where layers
            end.
        config: steps, learning rate, clip and threshold.
        keep_logits: return the final logits, too.
    """
    dtype = torch.float64 if updates_RP.dtype == torch.float64 else torch.float32
    layer_sizes = getattr(loss, "layer_sizes", None) or (updates_RP.shape[1],)
    if updates_RP.is_inference():
        # Autograd cannot keep a tensor that was made in inference mode.
        updates_RP = updates_RP.clone()
    updates = [[layer.to(dtype) for layer in row.split(layer_sizes)] for row in updates_RP]  # [client][layer]
    logits = [[torch.full_like(layer, config.init).requires_grad_() for layer in client] for client in updates]
    all_logits = [layer_logits for client in logits for layer_logits in client]
    global_params_P = global_params_P.to(dtype)

    losses: list[float] = []
    for _ in range(config.steps):
        mean_update = []
        for layer in range(len(layer_sizes)):
            gates = [torch.sigmoid(client[layer]) for client in logits]
            weighted = [gate * client[layer] for gate, client in zip(gates, updates, strict=True)]
            mean_update.append(_sum(weighted) / _sum(gates))
        value = loss(global_params_P + torch.cat(mean_update))
        gradients = torch.autograd.grad(value, all_logits)
        with torch.no_grad():
            for layer_logits, gradient in zip(all_logits, gradients, strict=True):
                # The gradient is measured in units of the clip, so that a full step is exactly lr *
                # clip.
                layer_logits -= (gradient / config.grad_clip).clamp(-1, 1) * config.full_step
        losses.append(value.item())
        step_done()
        if config.is_plateau(losses):
            break

    logits_RP = torch.stack([torch.cat(client) for client in logits]).detach()
    return Solution(pack_bits(logits_RP > config.logit_threshold), logits_RP if keep_logits else None, losses)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
