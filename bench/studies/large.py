"""A round of many clients, or of a large model, from disk: time, peak memory, and wrong labels.

``python -m skymask_gpu.bench.studies.large DIR --case CASE`` writes synthetic updates of a model to
DIR, a fifth of them with the sign flipped; those of an earlier run are used again. It judges them
in a process of its own, so that only the judging counts, and there it then times 20 forward and
backward passes of the model on the same root samples. Both are timed by the clock and in seconds of
CPU time, which other programs disturb less. Exit code 1: a label is wrong.

| case | model | parameters | clients | updates on disk |
| --- | --- | --- | --- | --- |
| ``cnn`` | the paper's CNN | 139,960 | 20,000 | 11.2 GB, float32 |
| ``lenet`` | LeNet-5 | 13,426 | 100,000 | 5.4 GB, float32 |
| ``resnet18`` | ResNet-18, images of 32 x 32 pixels | 11,173,962 | 500 | 11.2 GB, bfloat16 |
| ``vit-s`` | ViT-S/16, images of 224 x 224 pixels | 21,668,746 | 100 | 4.3 GB, bfloat16 |

``--compare`` judges the same masks by all pairs and by a sample, and counts the labels that differ.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.bench.solvers import downhill, make_model, noisy_rows
from skymask_gpu.defence import Aggregation, SkyMask
from skymask_gpu.engine import ClientBlocks, Clustering, FlatModel
from skymask_gpu.engine.clustering.sampled import SampledDistances
from skymask_gpu.engine.clustering.verdict import cluster
from skymask_gpu.engine.distances import mask_distances
from skymask_gpu.engine.peak_memory import resident
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.io.files import write_tensors

# A file holds at most this number of clients and about this number of values. The first fifth of
# the clients of each file are attackers.
_CLIENTS_A_FILE, _VALUES_A_FILE = 500, 2**27
_PASSES = 20

Model = tuple[nn.Module, Tensor, Tensor]


class ViTSmall(nn.Module):
    """ViT-S/16 (Touvron et al., ICML 2021, arXiv 2012.12877): width 384, 12 layers, 6 heads.

    It takes images of 224 x 224 pixels. The mean over the patches replaces the class token.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 384, 16, stride=16)
        self.position = nn.Parameter(0.02 * torch.randn(196, 384))
        layer = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 12, nn.LayerNorm(384), enable_nested_tensor=False)
        self.head = nn.Linear(384, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches + self.position).mean(1))


def make_vit() -> Model:
    """ViT-S/16 and 20 root samples."""
    _, inputs, labels = make_model("logreg", (3, 224, 224), num_samples=20)
    torch.manual_seed(0)
    return ViTSmall(), inputs, labels


@dataclass(frozen=True)
class Case:
    """A model with its root samples, and the clients whose updates are written."""

    make: Callable[[], Model]
    clients: int
    dtype: torch.dtype = torch.float32


CASES = {
    "cnn": Case(make_model, 20_000),
    "lenet": Case(lambda: make_model("lenet"), 100_000),
    "resnet18": Case(lambda: make_model("resnet18", (3, 32, 32), num_samples=50), 500, torch.bfloat16),
    "vit-s": Case(make_vit, 100, torch.bfloat16),
}


def file_sizes(num_clients: int, num_params: int) -> list[int]:
    most = max(5, min(_CLIENTS_A_FILE, _VALUES_A_FILE // num_params // 5 * 5))
    return [min(most, num_clients - first) for first in range(0, num_clients, most)]


def is_malicious(size: int) -> Tensor:
    """Which clients of one file attack, ``(size,)`` bool."""
    return torch.arange(size) < size // 5


def write_clients(folder: Path, case: Case, num_clients: int) -> None:
    """Files of stacked updates; those that are there stay."""
    loss = FlatModel(*case.make())
    folder.mkdir(parents=True, exist_ok=True)
    downhill_P = downhill(loss)
    for number, size in enumerate(track(file_sizes(num_clients, loss.num_params), description="writing updates")):
        path = folder / f"{number:04}.safetensors"
        if not path.exists():
            rows_NP = noisy_rows(downhill_P, size, seed=number)
            rows_NP = attack(rows_NP, is_malicious(size), Threat(AttackConfig(name="sign-flip", share=0.2)))
            write_tensors(path, {"updates": rows_NP.to(case.dtype)})


def judge(folder: Path, case: Case, num_clients: int, *, compare: bool = False) -> dict[str, Any]:
    """Aggregate the updates in the folder: what it took, and the number of wrong labels."""
    model = case.make()
    defence = SkyMask(*model)
    result, wall, cpu = timed(lambda: defence.aggregate(ClientBlocks.from_folder(folder)))
    report = {
        "clients": len(result.benign),
        "parameters": result.masks.num_params,
        "root_samples": len(model[2]),
        "wrong_labels": num_wrong(result.benign, num_clients, result.masks.num_params),
        "reason": result.clusters.reason,
        "seconds": {**result.seconds, "wall": wall, "cpu": cpu},
        "mask_steps": result.masks.steps,
        "solver": f"{result.masks.solver} ({result.masks.solver_reason})",
        "peak_resident_bytes": resident("VmHWM"),
    }
    loss = FlatModel(*model)
    run_passes(loss, 1)
    _, passes_wall, passes_cpu = timed(lambda: run_passes(loss, _PASSES))
    report["passes"] = {"wall": passes_wall, "cpu": passes_cpu}
    report["ratio_to_passes"] = {"wall": wall / passes_wall, "cpu": cpu / passes_cpu}
    return report | ({"compared": labels_that_differ(result)} if compare else {})


def num_wrong(benign_N: Tensor, num_clients: int, num_params: int) -> int:
    malicious_N = torch.cat([is_malicious(size) for size in file_sizes(num_clients, num_params)])
    return int((benign_N == malicious_N).sum())


def run_passes(loss: FlatModel, number: int) -> None:
    """Forward and backward passes of the model on the root samples."""
    for _ in range(number):
        params_P = loss.initial_params.detach().requires_grad_()
        torch.autograd.grad(loss(params_P), params_P)


def timed(compute: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds by the clock, and the seconds of CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = compute()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def labels_that_differ(result: Aggregation) -> dict[str, Any]:
    """The same masks judged by all pairs and by a sample: seconds, and labels that differ."""
    bits, num_params = result.masks.bits, result.masks.num_params
    norms_N = result.norms.double()
    alignment_N = result.cosines * norms_N
    makes = (lambda: mask_distances(bits, num_params), lambda: SampledDistances.of_masks(bits, ColumnShards(num_params)))

    def verdict(make: Callable[[], Any]) -> Tensor:
        return cluster(make(), alignment_N, Clustering(), keep_share=result.keep_share, norms=norms_N).benign

    verdicts = {name: timed(partial(verdict, make)) for name, make in zip(("by_pairs", "by_sample"), makes, strict=True)}
    differ = int((verdicts["by_pairs"][0] != verdicts["by_sample"][0]).sum())
    return {"labels_differ": differ, **{name: {"wall": wall, "cpu": cpu} for name, (_, wall, cpu) in verdicts.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, default="cnn")
    parser.add_argument("--clients", type=int, help="the case's own number if left out")
    parser.add_argument("--compare", action="store_true", help="also judge the masks by all pairs and by a sample")
    parser.add_argument("--judge", action="store_true", help="judge what is in the folder, in this process")
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    num_clients = options.clients or case.clients
    if options.judge:
        print(json.dumps(judge(options.folder, case, num_clients, compare=options.compare)))
        return 0
    write_clients(options.folder, case, num_clients)
    console = Console()
    command = [sys.executable, "-P", "-m", "skymask_gpu.bench.studies.large", str(options.folder), "--judge"]
    command += ["--case", options.case, "--clients", str(num_clients), *(["--compare"] if options.compare else [])]
    with console.status(f"judging {num_clients:,} clients ..."):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    console.print_json(data=report)
    console.print(f"{report['wrong_labels']} labels wrong, {report['peak_resident_bytes'] / 2**30:.2f} GiB resident at most")
    return 1 if report["wrong_labels"] else 0


if __name__ == "__main__":
    sys.exit(main())
