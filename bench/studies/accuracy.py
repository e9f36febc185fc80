"""How far the collapsed solver is from the exact one, for ``docs/collapsed.md``.

``python -m skymask_gpu.bench.studies.accuracy --data-dir DIR --out bench/results/accuracy`` trains
real updates of the paper's CNN on MNIST (files in DIR) for each number of clients. Per attack it
compares with the exact masks in float32:

* the share of bits that differ for several numbers of bins, for updates rounded to bfloat16 (the
  baseline), and for updates rounded to 8 bits in blocks;
* the relative error of the masked mean that the last step sees;
* the client labels.

Training may amplify rounding until float32 itself is further from float64 than is allowed. A second
row then compares after the largest number of steps (of those tried) at which float32 is stable, and
that row decides.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from skymask_gpu.bench.solvers import differing_share
from skymask_gpu.bench.studies.real_updates import CASES, attacked, mnist_updates
from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import ClientBlocks, FlatModel, MaskTraining, TrainedMasks, cluster_masks, train_masks
from skymask_gpu.engine.solvers import collapsed
from skymask_gpu.engine.solvers.solution import MaskedModel
from skymask_gpu.io.files import write_text, write_whole

BINS = (8, 16, 32, 64)
# Values that share a scale in the 8-bit form.
_BLOCK = 128
# The default number of bins may change this multiple of the bits that rounding to bfloat16 changes,
# or this share of the bits if that is larger (the wide one for scaled clients and noise).
MOST_YARDSTICKS = 2.0
FLOOR, FLOOR_WIDE = 1e-4, 5e-4
STEPS = 20
FEWER_STEPS = (18, 16, 14, 12, 10, 8, 6, 4, 2)


def allowed(case: str, yardstick: float) -> float:
    """The share of bits in which the collapsed solver may differ."""
    return max(MOST_YARDSTICKS * yardstick, FLOOR_WIDE if case in ("scaling", "noise") else FLOOR)


def in_8_bits(updates_RP: Tensor) -> Tensor:
    """The updates rounded to 255 levels, as float32.

    The levels lie between minus and plus the largest of each row's blocks of neighbours.
    """
    rounded_RP = updates_RP.clone()
    for part in rounded_RP.split(_BLOCK, dim=1):
        scale = (part.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        part.copy_((part / scale).round_().mul_(scale))
    return rounded_RP


def mean_error(updates_RP: Tensor, loss: FlatModel, config: MaskTraining) -> float:
    """Relative error of the masked mean that the last step sees, bins against all rows."""
    before = MaskTraining(steps=config.steps - 1, min_improvement=-1e9)
    logits_RP = train_masks(updates_RP, loss.initial_params, loss, config=before, solver="fused", keep_logits=True).logits
    assert logits_RP is not None
    gates_RP = torch.sigmoid(logits_RP)
    want_P = (gates_RP * updates_RP).sum(0, dtype=torch.float64) / gates_RP.sum(0, dtype=torch.float64)
    _, centres_BP, weights_BP, _, mean_P = collapsed._bins(ClientBlocks([updates_RP]), config.bins)
    masked = MaskedModel(loss, loss.initial_params, mean_P, len(updates_RP), config, keep_history=True)
    _, losses = collapsed._train_bins(weights_BP, centres_BP, masked, config)
    last_mean_P = masked.means_TP[len(losses) - 1]
    return float(torch.linalg.vector_norm(last_mean_P - want_P) / torch.linalg.vector_norm(want_P))


def float32_error(updates_RP: Tensor, loss: FlatModel, steps: int) -> float:
    """The share of bits in which the exact solver in float32 differs from itself in float64."""
    config = MaskTraining(steps=steps, min_improvement=-1e9)
    float32, float64 = (
        train_masks(updates_RP.to(dtype), loss_of.initial_params, loss_of, config=config, solver="fused")
        for dtype, loss_of in ((torch.float32, loss), (torch.float64, loss.to(torch.float64)))
    )
    return differing_share(float32, float64)


def measure_case(updates_RP: Tensor, loss: FlatModel, case: str, direction_P: Tensor) -> list[dict[str, Any]]:
    """The rows of the tables: one, or two where float32 is not stable for all steps."""
    updates_RP = attacked(updates_RP, case)
    error = float32_error(updates_RP, loss, STEPS)
    rows = [{**_compare(updates_RP, loss, case, direction_P, STEPS), "float32": error}]
    if error > FLOOR:
        for steps in FEWER_STEPS:
            error = float32_error(updates_RP, loss, steps)
            if error <= FLOOR:
                rows.append({**_compare(updates_RP, loss, case, direction_P, steps), "float32": error})
                break
    return rows


def _compare(updates_RP: Tensor, loss: FlatModel, case: str, direction_P: Tensor, steps: int) -> dict[str, Any]:
    alignment_N = (updates_RP[:-1] @ direction_P).double()

    def train(rows_RP: Tensor, solver: str, bins: int = MaskTraining().bins) -> TrainedMasks:
        config = MaskTraining(steps=steps, bins=bins, min_improvement=-1e9)
        return train_masks(rows_RP, loss.initial_params, loss, config=config, solver=solver)

    def labels(masks: TrainedMasks) -> Tensor:
        return cluster_masks(masks.bits, masks.num_params, alignment=alignment_N).benign

    exact = train(updates_RP, "fused")
    yardstick = differing_share(train(updates_RP.bfloat16(), "fused"), exact)
    by_bins = {bins: train(updates_RP, "collapsed", bins) for bins in BINS}
    shares = {bins: differing_share(masks, exact) for bins, masks in by_bins.items()}
    honest_N = torch.arange(len(updates_RP) - 1) >= (0 if case == "none" else (len(updates_RP) - 1) // 5)
    exact_labels = labels(exact)
    default = by_bins[MaskTraining().bins]
    return {
        "case": case,
        "clients": len(updates_RP) - 1,
        "steps": steps,
        "bfloat16": yardstick,
        "8_bit": differing_share(train(in_8_bits(updates_RP), "fused"), exact),
        "bins": shares,
        "allowed": allowed(case, yardstick),
        "within": shares[MaskTraining().bins] <= allowed(case, yardstick),
        "mean_error": {
            bins: mean_error(updates_RP, loss, MaskTraining(steps=steps, bins=bins, min_improvement=-1e9)) for bins in BINS
        },
        "same_labels": torch.equal(labels(default), exact_labels),
        "wrong_labels": int((exact_labels != honest_N).sum()),
        "one_cut": 1 - default.cuts.several.float().mean().item() if default.cuts else None,
        "constant": default.cuts.constant.float().mean().item() if default.cuts else None,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy"), help="without suffix: .json and .png")
    options = parser.parse_args(arguments)
    console = Console()
    rows = []
    for num_clients in options.clients:
        with console.status(f"training {num_clients} clients on MNIST ..."):
            updates_RP, loss = mnist_updates(num_clients, options.data_dir)
            direction_P = root_direction(loss, loss.initial_params, RootTraining())
        for case in track(CASES, description=f"{num_clients} clients", console=console):
            rows.extend(measure_case(updates_RP, loss, case, direction_P))
    console.print(_table(rows))
    # Each row has a line of its own, so that a diff shows which rows changed.
    write_text(options.out.with_suffix(".json"), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    _plot(rows, options.out.with_suffix(".png"))
    return 0 if all(row["same_labels"] and (row["within"] or row["float32"] > FLOOR) for row in rows) else 1


def _table(rows: list[dict[str, Any]]) -> Table:
    heads = (*(f"B = {bins}" for bins in BINS), "float32", "bfloat16", "allowed", "8 bit", "labels", "error of A")
    table = Table("clients", "attack", "steps", *heads)
    for row in rows:
        verdict = "" if row["within"] else " [red]exceeded[/]" if row["float32"] <= FLOOR else " float32 not stable"
        shares = [f"{share:.1e}" for share in (*row["bins"].values(), row["float32"], row["bfloat16"], row["allowed"])]
        shares[-1] += verdict
        same = "same" if row["same_labels"] else "[red]differ[/]"
        error = row["mean_error"][MaskTraining().bins]
        start = (str(row["clients"]), row["case"], str(row["steps"]))
        table.add_row(*start, *shares, f"{row['8_bit']:.1e}", same, f"{error:.1e}")
    return table


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of differing bits and error of A against the number of bins, one line per attack."""
    from matplotlib.figure import Figure

    largest = max(row["clients"] for row in rows)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(r for r in rows if r["clients"] == largest and r["steps"] == STEPS):
        colour = f"C{number}"
        left.loglog(BINS, [row["bins"][bins] for bins in BINS], "o-", color=colour, label=row["case"])
        left.axhline(row["bfloat16"], color=colour, linestyle=":", linewidth=0.8)
        right.loglog(BINS, [row["mean_error"][bins] for bins in BINS], "o-", color=colour)
    left.set(ylabel="share of bits that differ from exact (dotted: bfloat16)")
    right.set(ylabel="relative error of the masked mean A at the last step")
    for axes in (left, right):
        axes.set(xlabel="bins B", title=f"N = {largest}", xticks=BINS, xticklabels=map(str, BINS))
        axes.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110))


if __name__ == "__main__":
    sys.exit(main())
