"""How often few clients are judged right: the table of ``docs/verdict.md``.

``python -m skymask_gpu.bench.studies.few_clients FILE.jsonl`` plays runs of ten rounds with 4 to 20
clients, an MLP on scikit-learn's digits, nobody or one client attacking, and SkyMask with its
default settings. It appends one line per run to the file, and skips what the file holds already.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from skymask_gpu.federation import Federation, RunConfig
from skymask_gpu.io.files import append_line

ROUNDS = 10
SIZES = (4, 6, 10, 20)
PARTITIONS: dict[str, dict[str, Any]] = {"iid": {"partition": "iid"}, "dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5}}
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "sign-flip x 5": {"name": "sign-flip", "factor": 5.0},
    "label-flip": {"name": "label-flip"},
    "noise": {"name": "noise"},
}
Cell = tuple[str, int, str, int]


def play(cell: Cell) -> dict[str, Any]:
    """In which share of a run's rounds an honest client was rejected, and the attacker kept."""
    torch.set_num_threads(1)
    kind, num_clients, attack, seed = cell
    table = {
        "seed": seed,
        "data": {"clients": num_clients, **PARTITIONS[kind]},
        "local": {"steps": 20, "batch_size": 32, "lr": 0.1, "grad_clip": 1.0},
        "attack": {**ATTACKS[attack], "share": 0.0 if attack == "none" else 1 / num_clients},
    }
    federation = Federation.build(RunConfig.from_dict(table))
    model = federation.first_model()
    honest_rejected = attacker_kept = 0
    for number in range(ROUNDS):
        played = federation.play_round(number, model)
        model = played.model
        assert played.rule_result.kept is not None
        kept_N = played.rule_result.kept.cpu()
        honest_rejected += int((~kept_N & ~federation.malicious).any())
        attacker_kept += int((kept_N & federation.malicious).any())
    return {"cell": list(cell), "honest_rejected": honest_rejected / ROUNDS, "attacker_kept": attacker_kept / ROUNDS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the runs are recorded, one JSON line each")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args(arguments)
    lines = options.file.read_text(encoding="utf-8").splitlines() if options.file.exists() else []
    done: dict[Cell, dict[str, Any]] = {tuple(run["cell"]): run for run in map(json.loads, lines)}
    # Seed by seed, so that a file that was stopped holds the same number of runs for each cell.
    by_seed = product(range(options.seeds), PARTITIONS, SIZES, ATTACKS)
    wanted: list[Cell] = [(kind, size, attack, seed) for seed, kind, size, attack in by_seed]
    left = [cell for cell in wanted if cell not in done]
    console = Console()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for cell, run in zip(left, track(pool.map(play, left), "playing", len(left), console=console), strict=True):
            append_line(options.file, run)
            done[cell] = run
    console.print(_table([done[cell] for cell in wanted], options.seeds))
    return 0


def _table(runs: list[dict[str, Any]], num_seeds: int) -> Table:
    """Shares of rounds; the columns are numbers of clients."""
    table = Table("clients' data", "attack", "share of rounds in which", *(f"N = {size}" for size in SIZES))
    for kind, attack in product(PARTITIONS, ATTACKS):
        for key in ("honest_rejected",) if attack == "none" else ("honest_rejected", "attacker_kept"):
            shares = []
            for size in SIZES:
                values = [run[key] for run in runs if run["cell"][:3] == [kind, size, attack]]
                shares.append(f"{sum(values) / num_seeds:.1%}")
            words = "an honest client is rejected" if key == "honest_rejected" else "the attacker is kept"
            table.add_row(kind, attack, words, *shares)
    return table


if __name__ == "__main__":
    sys.exit(main())
