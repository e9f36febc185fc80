"""Updates of clients that trained the paper's CNN on MNIST, and what attackers make of them.

The studies ``accuracy`` and ``many_clients`` and the tests of the solvers measure on them.
"""

from pathlib import Path

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.federation.clients import LocalTraining, draw_batches, train_clients
from skymask_gpu.federation.datasets import load_dataset, split_root
from skymask_gpu.federation.datasets.partition import partition
from skymask_gpu.federation.models import build_model

__all__ = ["CASES", "attacked", "mnist_updates"]

CASES = ("none", "min-max", "min-sum", "sign-flip", "lie", "scaling", "trim", "noise")


def mnist_updates(num_clients: int, data_dir: Path | None) -> tuple[Tensor, FlatModel]:
    """Updates ``(N + 1, P)`` after one round with bias 0.5, and the loss on 100 root samples.

    The root's row is the last one.
    """
    generator = torch.Generator().manual_seed(0)
    dataset = load_dataset("mnist", data_dir)
    root, rest = split_root(dataset.train_labels, 100, generator)
    parts = [
        rest[part]
        for part in partition(
            "bias", dataset.train_labels[rest], num_clients, bias=0.5, alpha=0.0, subjects=None, generator=generator
        )
    ]
    module = build_model("cnn", (1, 28, 28), 10, seed=0)
    loss = FlatModel(module, dataset.train_inputs[root], dataset.train_labels[root])
    recipe = LocalTraining(batching="vmap")
    batches = draw_batches([*parts, root], recipe, generator)
    sent = train_clients(module, loss.initial_params, dataset.train_inputs, dataset.train_labels, batches, recipe)
    return sent.updates, loss


def attacked(updates_RP: Tensor, case: str) -> Tensor:
    """A copy in which the first fifth of the clients attack by the attack called ``case``."""
    updates_RP = updates_RP.clone()
    if case != "none":
        malicious_N = torch.arange(len(updates_RP) - 1) < (len(updates_RP) - 1) // 5
        updates_RP[:-1] = attack(updates_RP[:-1], malicious_N, Threat(AttackConfig(name=case, share=0.2)))
    return updates_RP
