"""A round of very many clients from disk: time, peak memory, and whether every label is right.

``python -m skymask_gpu.bench.studies.large DIR --clients 20000`` writes synthetic updates of the
paper's CNN to DIR (560 kB per client, a fifth of them with the sign flipped; those of an earlier
run are used again). It judges them in a process of its own, so that only the judging counts. Exit
code 1: a label is wrong.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from skymask_gpu.bench.solvers import honest_rows, make_model
from skymask_gpu.defence import SkyMask
from skymask_gpu.engine import ClientBlocks, FlatModel
from skymask_gpu.engine.peak_memory import resident
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.io.files import write_tensors

# Clients per file; the first fifth of each file are attackers.
_CLIENTS_A_FILE = 500


def file_sizes(num_clients: int) -> list[int]:
    return [min(_CLIENTS_A_FILE, num_clients - first) for first in range(0, num_clients, _CLIENTS_A_FILE)]


def is_malicious(size: int) -> Tensor:
    """Which clients of one file attack, ``(size,)`` bool."""
    return torch.arange(size) < size // 5


def write_clients(folder: Path, num_clients: int) -> None:
    """Files of stacked updates; those that are there stay."""
    loss = FlatModel(*make_model())
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(track(file_sizes(num_clients), description="writing updates")):
        path = folder / f"{number:04}.safetensors"
        if not path.exists():
            rows_NP = honest_rows(loss, size, seed=number)
            write_tensors(
                path, {"updates": attack(rows_NP, is_malicious(size), Threat(AttackConfig(name="sign-flip", share=0.2)))}
            )


def judge(folder: Path, num_clients: int) -> dict[str, Any]:
    """Aggregate the updates in the folder: what it took, and the number of wrong labels."""
    start = time.perf_counter()
    result = SkyMask(*make_model()).aggregate(ClientBlocks.from_folder(folder))
    seconds = time.perf_counter() - start
    malicious_N = torch.cat([is_malicious(size) for size in file_sizes(num_clients)])
    return {
        "clients": len(result.benign),
        "wrong_labels": int((result.benign == malicious_N).sum()),
        "seconds": {**result.seconds, "wall": seconds},
        "mask_steps": result.masks.steps,
        "solver": f"{result.masks.solver} ({result.masks.solver_reason})",
        "peak_resident_bytes": resident("VmHWM"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=20_000)
    parser.add_argument("--judge", action="store_true", help="judge what is in the folder, in this process")
    options = parser.parse_args(arguments)
    if options.judge:
        print(json.dumps(judge(options.folder, options.clients)))
        return 0
    write_clients(options.folder, options.clients)
    console = Console()
    command = [sys.executable, "-P", "-m", "skymask_gpu.bench.studies.large", str(options.folder), "--judge"]
    with console.status(f"judging {options.clients:,} clients ..."):
        done = subprocess.run([*command, "--clients", str(options.clients)], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    console.print_json(data=report)
    console.print(f"{report['wrong_labels']} labels wrong, {report['peak_resident_bytes'] / 2**30:.2f} GiB resident at most")
    return 1 if report["wrong_labels"] else 0


if __name__ == "__main__":
    sys.exit(main())
