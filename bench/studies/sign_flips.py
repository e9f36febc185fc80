"""One round of clients of whom a fifth flip the sign of their update: who is judged exactly right.

``python -m skymask_gpu.bench.studies.sign_flips`` judges 144 federations by each clustering rule:
MLPs of three widths with three seeds, 10 to 100 clients, classification and regression, with
clipped gradients and without. The data are scikit-learn's digits, IID; the target of the regression
is the digit as a number. Clients and root are trained alike, from a fresh model, and nothing is
remembered. A federation is judged exactly if all attackers and nobody else are rejected.
"""

import argparse
import math
import sys
from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine import Clustering, FlatModel
from skymask_gpu.federation.datasets import load_dataset

TASKS = ("classification", "regression (MSE)")
CLIPS = (0.01, math.inf)
SIZES = (10, 20, 50, 100)
WIDTHS = (16, 64, 256)
RULES = ("signed", "two-stage", "published")
SEEDS = 3
STEPS, BATCH_SIZE, LR, ROOT_SAMPLES = 10, 32, 0.1, 100


def judged_exactly(task: str, clip: float, num_clients: int, width: int, seed: int) -> dict[str, bool]:
    """For each rule, whether it rejects all attackers and nobody else."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    digits = load_dataset("digits")
    order = torch.randperm(len(digits.train_labels), generator=generator)
    inputs, labels = digits.train_inputs[order].flatten(1), digits.train_labels[order]
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    num_outputs = 10
    if task != "classification":
        numbers = labels.float()
        labels, loss_fn, num_outputs = ((numbers - numbers.mean()) / numbers.std())[:, None], F.mse_loss, 1
    module = nn.Sequential(nn.Linear(inputs.shape[1], width), nn.ReLU(), nn.Linear(width, num_outputs))
    root_inputs, root_labels = inputs[:ROOT_SAMPLES], labels[:ROOT_SAMPLES]

    def trained(own_inputs: Tensor, own_labels: Tensor) -> Tensor:
        """The update, ``(P,)``, of somebody with these samples."""
        loss = FlatModel(module, own_inputs, own_labels, loss_fn=loss_fn)
        params_P = loss.initial_params.clone()
        for _ in range(STEPS):
            batch = torch.randperm(len(own_labels), generator=generator)[:BATCH_SIZE]
            step = params_P.detach().requires_grad_()
            (gradient_P,) = torch.autograd.grad(loss.part(batch)(step), step)
            params_P = params_P - LR * gradient_P.clamp(-clip, clip)
        return params_P - loss.initial_params

    parts = torch.arange(ROOT_SAMPLES, len(labels)).tensor_split(num_clients)
    updates_NP = torch.stack([trained(inputs[part], labels[part]) for part in parts])
    malicious_N = torch.arange(num_clients) < num_clients // 5
    updates_NP[malicious_N] *= -1
    root_update = trained(root_inputs, root_labels)
    exact = {}
    for rule in RULES:
        defence = SkyMask(
            module,
            root_inputs,
            root_labels,
            loss_fn=loss_fn,
            clustering=Clustering(rule=rule),  # type: ignore[arg-type]  # the names above
            root_training=RootTraining(lr=LR, grad_clip=clip),
        )
        exact[rule] = torch.equal(defence.aggregate(updates_NP, root_update=root_update).benign, ~malicious_N)
    return exact


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    cells = list(product(TASKS, CLIPS, SIZES))
    console = Console(width=120)
    table = Table("task", "clip", "clients", *(f"{rule}: not exact" for rule in RULES))
    wrong, num_each = dict.fromkeys(RULES, 0), len(WIDTHS) * SEEDS
    for task, clip, size in track(cells, "judging", console=console):
        exact = [judged_exactly(task, clip, size, width, seed) for width, seed in product(WIDTHS, range(SEEDS))]
        missed = {rule: sum(not one[rule] for one in exact) for rule in RULES}
        wrong = {rule: wrong[rule] + missed[rule] for rule in RULES}
        table.add_row(task, str(clip), str(size), *(f"{missed[rule]} of {num_each}" for rule in RULES))
    total = num_each * len(cells)
    table.add_row("all", "", "", *(f"{wrong[rule]} of {total} ({wrong[rule] / total:.1%})" for rule in RULES))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
