"""Updates of clients that trained the paper's CNN on MNIST, and what attackers make of them: what accuracy is measured on."""

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

CASES = ("none", "min-max", "min-sum", "sign-flip", "lie", "boosted", "trim", "noise")


def mnist_updates(num_clients: int, data_dir: Path | None) -> tuple[Tensor, FlatModel]:
    """Updates ``(N + 1, P)``, root row last, after one round with bias 0.5, and the loss on 100 root samples."""
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
    """A copy in which the first fifth of the clients attack; ``"scaled"``: only the first one, by 1,000."""
    num_malicious = (len(updates_RP) - 1) // 5
    malicious_N = torch.arange(len(updates_RP) - 1) < num_malicious
    updates_RP = updates_RP.clone()
    malicious_RP = updates_RP[:num_malicious]
    if case in ("min-max", "sign-flip"):
        updates_RP[:-1] = attack(updates_RP[:-1], malicious_N, Threat(AttackConfig(name=case, share=0.2)))
    elif case == "noise":
        malicious_RP += 0.05 * torch.randn(malicious_RP.shape, generator=torch.Generator().manual_seed(0))
    elif case == "scaled":
        updates_RP[0] *= 1000
    elif case == "boosted":
        malicious_RP *= 5  # N / f
    elif case in ("min-sum", "lie", "trim"):
        malicious_RP.copy_(_crafted(updates_RP[num_malicious:-1], case, num_malicious))
    elif case != "none":
        raise ValueError(f"case must be one of {', '.join(CASES)} or scaled, got {case!r}")
    return updates_RP


def _crafted(honest_HP: Tensor, case: str, num_malicious: int) -> Tensor:
    """What attackers send: stand-ins for Min-Sum, A Little Is Enough and Fang-Trim."""
    mean_P, std_P = honest_HP.mean(0), honest_HP.std(0)
    if case == "lie":
        return (mean_P - 1.5 * std_P).expand(num_malicious, -1)
    if case == "trim":  # beyond the honest extremes, against the mean's direction
        lowest_P, highest_P = honest_HP.min(0).values, honest_HP.max(0).values
        stretch_FP = torch.rand(num_malicious, len(mean_P), generator=torch.Generator().manual_seed(0))
        return torch.where(mean_P > 0, lowest_P - stretch_FP * std_P, highest_P + stretch_FP * std_P)
    # as far along the negative mean as the sum of squared distances allows
    offset_HP = mean_P - honest_HP
    widest = torch.cdist(offset_HP, offset_HP).double().square().sum(1).max()
    direction_P = -mean_P / mean_P.norm()
    b, c = 2 * (offset_HP @ direction_P).double().sum(), offset_HP.double().square().sum() - widest
    reach = (-b + (b * b - 4 * len(honest_HP) * c).sqrt()) / (2 * len(honest_HP))
    return (mean_P + reach.float() * direction_P).expand(num_malicious, -1)
