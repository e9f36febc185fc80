"""``train_clients``: train all clients of a round block by block, and return what they send."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skymask_gpu.engine.memory import in_blocks
from skymask_gpu.federation.clients.batches import Batches, alike_clients
from skymask_gpu.federation.clients.recipe import LocalTraining
from skymask_gpu.federation.clients.trainer import AfterStep, Poison, Trainer, for_each_client

__all__ = ["LocalUpdates", "train_clients"]


@dataclass(frozen=True)
class LocalUpdates:
    """What C clients send.

    Attributes:
        updates: ``(C, P)``, each client's local parameters minus the global ones.
        buffers: the buffers of the clients' models by name, each ``(C, ...)``.
    """

    updates: Tensor
    buffers: dict[str, Tensor]


def train_clients(
    module: nn.Module,
    global_params: Tensor,
    inputs: Tensor,
    labels: Tensor,
    batches: Batches,
    config: LocalTraining,
    *,
    buffers: dict[str, Tensor] | None = None,
    poison: Poison | None = None,
    poisoned: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    after_step: AfterStep | None = None,
) -> LocalUpdates:
    """Train C clients that all start from the global model.

    Args:
        module: the model; its own parameters are not used.
        global_params: ``(P,)`` float32, or float64 like the module and the inputs; the updates have
            the same dtype.
        inputs: ``(n, ...)`` all training inputs, on the device to train on.
        labels: ``(n,)`` int64 their labels.
        batches: the samples that each client sees.
        config: the recipe.
        buffers: the buffers of the global model by name (batch norm's running statistics); None:
            the module's own.
        poison: ``poison(inputs (c, B, ...), labels (c, B), clients (c,))`` returns what c malicious
            clients, whose numbers are from 0 to C - 1, train on instead of their batches.
        poisoned: ``(C,)`` bool, which clients poison their batches; None: no client does.
        progress: called after each block with the number of clients that are trained so far.
        after_step: ``after_step(params (c, P), step, clients (c,))``, called after each step of a
            block of c clients, whose numbers are from 0 to C - 1. It returns the ``(c, P)``
            parameters from which training continues, or None to leave them unchanged. The momentum
            is not changed.

    Returns:
        The updates and buffers, in the order of the clients in ``batches``.

    Raises:
        ValueError: the model does not run under ``vmap``.
        torch.OutOfMemoryError: not even one client fits into memory.

    Example:
        >>> from skymask_gpu.federation.clients import draw_batches
        >>> module, samples = nn.Linear(3, 2), torch.randn(12, 3)
        >>> recipe = LocalTraining(steps=2, batch_size=4)
        >>> own = [torch.arange(5), torch.arange(5, 12)]
        >>> batches = draw_batches(own, recipe, torch.Generator())
        >>> start_P = nn.utils.parameters_to_vector(module.parameters())
        >>> labels = torch.arange(12) % 2
        >>> train_clients(module, start_P, samples, labels, batches, recipe).updates.shape
        torch.Size([2, 8])
    """
    trainer, device = Trainer(module, inputs, labels, config, poison, after_step), inputs.device
    start_P = global_params.detach().to(device)
    start_buffers = {name: value.detach().to(device) for name, value in (buffers or dict(module.named_buffers())).items()}
    if poisoned is None:
        poisoned = torch.zeros(len(batches.steps_C), dtype=torch.bool)
    return _in_blocks(trainer, start_P, start_buffers, batches, poisoned.cpu(), progress)


def _in_blocks(
    trainer: Trainer,
    start_P: Tensor,
    start_buffers: dict[str, Tensor],
    batches: Batches,
    poisoned_C: Tensor,
    progress: Callable[[int], None] | None,
) -> LocalUpdates:
    """Train blocks of clients that can share one, and store each client's update in its own row."""
    index_CSB, steps_C = batches.index_CSB.to(start_P.device), batches.steps_C
    num_clients, first_batch = len(index_CSB), index_CSB[0, 0]
    updates_CP = start_P.new_empty(num_clients, trainer.flat.num_params)
    buffers_C = for_each_client(start_buffers, num_clients)
    train = trainer.in_a_loop if trainer.way(first_batch) == "loop" else trainer.at_once
    block = min(trainer.block_size(start_P, start_buffers, first_batch), num_clients)
    done = 0
    for poisons, group in alike_clients(steps_C, poisoned_C):

        def train_block(begin: int, end: int, poisons: bool = poisons, group: list[int] = group) -> None:
            nonlocal done
            clients = group[begin:end]
            params_CP, trained = train(
                start_P, start_buffers, index_CSB[clients], steps_C[clients], poisons, torch.tensor(clients)
            )
            updates_CP[clients] = params_CP.sub_(start_P)
            for name, value in trained.items():
                buffers_C[name][clients] = value
            done += len(clients)
            if progress is not None:
                progress(done)

        block = in_blocks(train_block, len(group), block)
    return LocalUpdates(updates_CP, buffers_C)
