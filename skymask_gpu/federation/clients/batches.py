"""The samples that each client sees in a round, and which clients can be trained together."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.clients.recipe import LocalTraining

__all__ = ["Batches", "alike_clients", "draw_batches"]


@dataclass(frozen=True)
class Batches:
    """The samples that each of C clients sees in a round.

    Attributes:
        index_CSB: ``(C, S, B)`` int64, indices of training samples for S steps with batches of B. A
            client that takes fewer than S steps does not use the rest of its row.
        steps_C: ``(C,)`` int64, the number of steps that each client takes.
    """

    index_CSB: Tensor
    steps_C: Tensor


def draw_batches(parts: list[Tensor], config: LocalTraining, generator: torch.Generator) -> Batches:
    """Draw the batches of one round.

    Args:
        parts: the indices of each client's own samples, one ``(n_i,)`` int64 tensor per client.
        config: steps or epochs, and the size of a batch.
        generator: source of randomness.

    Example:
        >>> own = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
        >>> recipe = LocalTraining(epochs=2, batch_size=2)
        >>> batches = draw_batches(own, recipe, torch.Generator().manual_seed(0))
        >>> batches.steps_C.tolist(), sorted(batches.index_CSB[1, :2].flatten().tolist())
        ([3, 2], [3, 3, 4, 4])
    """
    if config.epochs == 0:
        shape = (config.steps, config.batch_size)
        index_CSB = torch.stack([part[(torch.rand(shape, generator=generator) * len(part)).long()] for part in parts])
        return Batches(index_CSB, torch.full((len(parts),), config.steps))
    steps = [math.ceil(len(part) * config.epochs / config.batch_size) for part in parts]
    index_CSB = torch.zeros(len(parts), max(steps), config.batch_size, dtype=torch.long)
    for client, part in enumerate(parts):
        wanted = steps[client] * config.batch_size
        order = torch.cat([torch.randperm(len(part), generator=generator) for _ in range(math.ceil(wanted / len(part)))])
        index_CSB[client, : steps[client]] = part[order[:wanted]].view(-1, config.batch_size)
    return Batches(index_CSB, torch.tensor(steps))


def alike_clients(steps_C: Tensor, poisoned_C: Tensor) -> list[tuple[bool, list[int]]]:
    """The clients that may share a block: first the honest ones, then those that poison.

    Within each group the clients with the most steps come first, so that those who still train are
    always the first rows of a block.

    Args:
        steps_C: ``(C,)`` int64, the number of steps that each client takes.
        poisoned_C: ``(C,)`` bool, which clients poison their batches.

    Returns:
        For each group that is not empty, whether its clients poison, and their numbers.

    Example:
        >>> alike_clients(torch.tensor([2, 5, 5]), torch.tensor([False, True, False]))
        [(False, [2, 0]), (True, [1])]
    """
    order = (-steps_C).argsort(stable=True)
    groups = [(poisons, order[poisoned_C[order] == poisons].tolist()) for poisons in (False, True)]
    return [(poisons, clients) for poisons, clients in groups if clients]
