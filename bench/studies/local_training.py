"""Local training of many clients, side by side and one by one: how ``batching = "auto"`` chooses.

``python -m skymask_gpu.bench.studies.local_training`` trains the same clients with the same batches
in three ways and prints times as ratios to a plain loop with ``torch.optim.SGD``. It first checks
on a few clients that the updates agree, in float64: where max pooling or ReLU switch, rounding to
float32 can change a gradient by much more.
"""

import argparse
import copy
import statistics
import sys
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.bench.measure import sample
from skymask_gpu.federation.clients import Batches, LocalTraining, batching_for, draw_batches, train_clients
from skymask_gpu.federation.models import build_model

CASES = {
    "mlp": (1, 8, 8),
    "mlp, 28 x 28": (1, 28, 28),
    "cnn": (1, 28, 28),
    "logreg": (561,),
    "vit": (1, 28, 28),
    "resnet20-gn": (3, 32, 32),
}
RECIPE = LocalTraining(steps=5, batch_size=32)
WAYS = ("plain", "vmap", "loop")
_SAMPLES = 60
_CHECKED = 5
_TOLERANCE = 1e-9


def plain_loop(module: nn.Module, inputs: Tensor, labels: Tensor, batches: Batches) -> Tensor:
    """Updates ``(C, P)``, as one writes it with PyTorch's optimiser."""
    start = {name: value.clone() for name, value in module.state_dict().items()}
    start_P = nn.utils.parameters_to_vector(module.parameters()).detach()
    updates = []
    for index_SB in batches.index_CSB:
        module.load_state_dict(start)
        optimiser = torch.optim.SGD(module.parameters(), lr=RECIPE.lr)
        for index_B in index_SB:
            optimiser.zero_grad()
            F.cross_entropy(module(inputs[index_B]), labels[index_B]).backward()
            nn.utils.clip_grad_value_(module.parameters(), RECIPE.grad_clip)
            optimiser.step()
        updates.append(nn.utils.parameters_to_vector(module.parameters()).detach() - start_P)
    module.load_state_dict(start)
    return torch.stack(updates)


def compare(case: str, num_clients: int, repeats: int, device: torch.device) -> tuple[dict[str, float], float]:
    """Seconds of ``"plain"``, ``"vmap"`` and ``"loop"``, and the largest difference of an update.

    The difference is relative to the largest value.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_SAMPLES * num_clients, *CASES[case], generator=generator).to(device)
    labels = (torch.arange(len(inputs)) % 10).to(device)
    module = build_model(case.split(",")[0], CASES[case], 10, seed=0).to(device)
    drawn = draw_batches(list(torch.arange(len(inputs)).split(_SAMPLES)), RECIPE, generator)
    batches = Batches(drawn.index_CSB.to(device), drawn.steps_C)

    def train(way: str, module: nn.Module, inputs: Tensor, batches: Batches) -> Tensor:
        if way == "plain":
            return plain_loop(module, inputs, labels, batches)
        start_P = nn.utils.parameters_to_vector(module.parameters()).detach()
        return train_clients(module, start_P, inputs, labels, batches, replace(RECIPE, batching=way)).updates

    few = Batches(batches.index_CSB[:_CHECKED], batches.steps_C[:_CHECKED])
    exact = {way: train(way, copy.deepcopy(module).double(), inputs.double(), few) for way in WAYS}
    error = max(float((exact[way] - exact["plain"]).abs().max()) for way in WAYS) / float(exact["plain"].abs().max())
    seconds = {}
    for way in WAYS:
        train(way, module, inputs, few)  # warms up
        call = partial(train, way, module, inputs, batches)
        seconds[way] = statistics.median(sample(call, device) for _ in range(repeats))
    return seconds, error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("model", "clients", "vmap / plain loop", "our loop / plain loop", "auto takes", "largest difference")
    agree = True
    for case in options.cases:
        # a large network is measured with fewer clients, because the ratio does not depend on their
        # number
        num_clients = max(2, options.clients // 10) if case.startswith("resnet") else options.clients
        seconds, error = compare(case, num_clients, options.repeats, device)
        agree &= error < _TOLERANCE
        ratios = (f"{seconds[way] / seconds['plain']:.2f}" if error < _TOLERANCE else "wrong" for way in ("vmap", "loop"))
        batch_inputs = torch.zeros(RECIPE.batch_size, *CASES[case], device=device)
        chosen = batching_for(build_model(case.split(",")[0], CASES[case], 10, seed=0).to(device), batch_inputs, RECIPE)
        table.add_row(case, str(num_clients), *ratios, chosen, f"{error:.1e}")
    Console(width=140).print(table)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
