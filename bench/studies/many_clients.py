"""What the published learning rate does to the masks of very many clients.

``python -m skymask_gpu.bench.studies.many_clients --data-dir DIR`` prints false positive and false
negative rates of the two-stage rule. A mask's gradient contains the factor 1 / N, so 500 real
clients (the paper's CNN on MNIST, files in DIR) with the learning rate divided by k are judged as k
times as many would be.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from skymask_gpu.bench.studies.real_updates import attacked, mnist_updates
from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import MaskTraining, cluster_masks, train_masks

DIVISORS = (0.25, 1, 2, 4, 8, 40)
CASES = ("none", "min-max", "sign-flip", "lie")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--clients", type=int, default=500)
    options = parser.parse_args(arguments)
    console = Console()
    with console.status(f"training {options.clients} clients on MNIST ..."):
        updates_RP, loss = mnist_updates(options.clients, options.data_dir)
        direction_P = root_direction(loss, loss.initial_params, RootTraining())
    table = Table("attack", *(f"k = {k:g}" for k in DIVISORS), title=f"N = {options.clients}: FPR / FNR")
    for case in track(CASES, description="judging", console=console):
        rows_RP = attacked(updates_RP, case)
        alignment_N = (rows_RP[:-1] @ direction_P).double()
        honest_N = torch.arange(options.clients) >= (0 if case == "none" else options.clients // 5)
        rates = []
        for k in DIVISORS:
            config = MaskTraining(lr=1e7 / k, grad_clip=1e-7 * k, lr_clients=10**9)
            masks = train_masks(rows_RP, loss.initial_params, loss, config=config, solver="collapsed")
            benign_N = cluster_masks(masks.bits, masks.num_params, alignment=alignment_N).benign
            false_negative = "-" if honest_N.all() else f"{benign_N[~honest_N].float().mean():.2f}"
            rates.append(f"{(~benign_N)[honest_N].float().mean():.2f} / {false_negative}")
        table.add_row(case, *rates)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
