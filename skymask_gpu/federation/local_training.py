"""Local SGD of many clients at once: one ``vmap(grad)`` over blocks of clients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from skymask_gpu.engine import FlatModel

__all__ = ["LocalTraining", "draw_batches", "train_clients"]

# Input values in a block of clients: on a CPU what keeps activations in the cache, on a GPU what fills it.
_BLOCK_VALUES = {"cpu": 2**17, "cuda": 2**24}


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """A client's local recipe: ``steps`` of SGD on batches of its own samples, gradients clipped element by element."""

    steps: int = 10
    batch_size: int = 32
    lr: float = 0.1
    grad_clip: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"local.{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        for name in ("lr", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"local.{name} must be finite and above 0, got {getattr(self, name)!r}")


def draw_batches(parts: list[Tensor], config: LocalTraining, generator: torch.Generator) -> Tensor:
    """Sample indices ``(clients, steps, batch)``, drawn with replacement from each client's own samples."""
    shape = (config.steps, config.batch_size)
    return torch.stack([part[(torch.rand(shape, generator=generator) * len(part)).long()] for part in parts])


def train_clients(
    module: nn.Module,
    global_params: Tensor,
    inputs: Tensor,
    labels: Tensor,
    batches_CSB: Tensor,
    config: LocalTraining,
) -> Tensor:
    """The updates, local minus global, ``(C, P)`` float32, of C clients that all start from the global model.

    Args:
        module: the model; its own parameters are not used.
        global_params: ``(P,)``.
        inputs: ``(n, ...)`` all training inputs, on the device to train on.
        labels: ``(n,)``.
        batches_CSB: ``(C, steps, batch)`` indices of the samples that each client sees at each step.
        config: learning rate and clip.
    """
    device = inputs.device
    module = module.to(device)
    flat = FlatModel(module, inputs[:1], labels[:1])
    global_params_P = global_params.to(device)
    batches_CSB = batches_CSB.to(device)

    def loss(params_P: Tensor, batch_inputs: Tensor, batch_labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, flat.unflatten(params_P), (batch_inputs,)), batch_labels)

    gradients = vmap(grad(loss))
    values_a_client = batches_CSB.shape[2] * inputs[0].numel()
    block = max(1, _BLOCK_VALUES.get(device.type, 2**17) // values_a_client)
    updates_CP = torch.empty(len(batches_CSB), flat.num_params, device=device)
    for begin in range(0, len(batches_CSB), block):
        clients = batches_CSB[begin : begin + block]
        params_CP = global_params_P.expand(len(clients), -1).clone()
        for step in range(clients.shape[1]):
            index_CB = clients[:, step]
            gradient_CP = gradients(params_CP, inputs[index_CB], labels[index_CB])
            params_CP -= config.lr * gradient_CP.clamp_(-config.grad_clip, config.grad_clip)
        updates_CP[begin : begin + block] = params_CP - global_params_P
    return updates_CP
