"""What a row, a bin and a column cost the solvers here: the constants by which ``auto`` chooses.

``python -m skymask_gpu.bench.studies.costs`` prints nanoseconds, without the model's passes: it
trains masks with a loss that costs nothing. Copy the numbers to ``_ROW_STEP`` of
``engine/solvers/fused.py``, and to the constants of ``engine/solvers/collapsed.py``.
"""

import statistics
import sys

import torch
from rich.console import Console
from torch import Tensor

from skymask_gpu.bench.measure import sample
from skymask_gpu.engine import MaskTraining, train_masks

NUM_PARAMS = 140_000


def seconds(solver: str, num_rows: int, config: MaskTraining) -> float:
    """Median time of mask training on random rows."""
    generator = torch.Generator().manual_seed(0)
    rows_RP = 1e-3 * torch.randn(num_rows, NUM_PARAMS, generator=generator)
    weights_P = torch.randn(NUM_PARAMS, generator=generator)

    def loss(params_P: Tensor) -> Tensor:
        return weights_P @ params_P

    def train() -> None:
        train_masks(rows_RP, torch.zeros(NUM_PARAMS), loss, config=config, solver=solver)

    train()
    return statistics.median(sample(train, torch.device("cpu")) for _ in range(5))


def main() -> int:
    console = Console()
    steps, fewer, rows, more_rows = 20, 10, 200, 800
    config, short = (MaskTraining(steps=n, min_improvement=-1e9) for n in (steps, fewer))
    fused = (seconds("fused", more_rows, config) - seconds("fused", rows, config)) / (more_rows - rows) / steps
    base = seconds("collapsed", rows, config)
    row = (seconds("collapsed", more_rows, config) - base) / (more_rows - rows)
    bin_step = (base - seconds("collapsed", rows, short)) / (steps - fewer) / config.bins
    column = base - row * rows - bin_step * steps * config.bins
    for name, value in (
        ("fused, row and step", fused),
        ("collapsed, row", row),
        ("bin and step", bin_step),
        ("column", column),
    ):
        console.print(f"{name}: {value / NUM_PARAMS * 1e9:.3g} ns a column")
    return 0


if __name__ == "__main__":
    sys.exit(main())
