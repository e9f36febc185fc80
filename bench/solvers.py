"""Mask training, solver against solver: the paper's CNN, N clients, 20 steps, side by side in one run.

``python -m skymask_gpu.bench.solvers`` (or ``make bench``). A solver's bits, losses and client labels are compared with those
of `reference` first; one that disagrees is printed as wrong, without a time, and the exit code is 1. Floors measured in the
same run: a plain mean over the same rows (FedAvg), and the model's own 20 forward and backward passes.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from skymask_gpu.bench.measure import Measured, measure
from skymask_gpu.engine import FlatModel, TrainedMasks, cluster_masks, train_masks, unpack_bits, why_not_solver
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.federation.models import build_model
from skymask_gpu.files import write_text

STEPS = 20
SOLVERS = ("reference", "vmap", "fused", "collapsed")
# Share of bits by which float32 solvers may differ on these inputs, and relative difference of losses. The collapsed solver is
# approximate: its bits may differ by twice what rounding the updates to bfloat16 changes (at least 1e-4), its losses by 1e-3.
MOST_DIFFERING, MOST_LOSS_ERROR = 1e-5, 1e-5
LEAST_COLLAPSED_DIFFERING, MOST_COLLAPSED_LOSS_ERROR = 1e-4, 1e-3


def make_model() -> tuple[nn.Module, Tensor, Tensor]:
    """The CNN, and 100 root samples: synthetic images with the class in them, so that the benchmark needs no files."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    patterns = torch.randn(10, 1, 28, 28, generator=generator)
    images = patterns[labels] + 0.5 * torch.randn(100, 1, 28, 28, generator=generator)
    return build_model("cnn", (1, 28, 28), 10, seed=0), images, labels


def honest_rows(loss: FlatModel, num_rows: int, seed: int) -> Tensor:
    """``(num_rows, P)``: noisy steps downhill, as real clients' would be; the work does not depend on the values."""
    params_P = loss.initial_params.clone()
    for _ in range(10):
        params_P.requires_grad_()
        (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
        params_P = (params_P - 0.1 * grad_P.clamp(-0.01, 0.01)).detach()
    downhill_P = params_P - loss.initial_params
    rows_RP = torch.randn(num_rows, loss.num_params, generator=torch.Generator().manual_seed(seed))
    return rows_RP.mul_(downhill_P.std() / 2).add_(downhill_P)


def make_case(num_clients: int, device: torch.device) -> tuple[Tensor, FlatModel]:
    """Rows ``(N + 1, P)`` and the loss: the first fifth are Min-Max attackers, the root is the last."""
    loss = FlatModel(*make_model())
    rows_RP = honest_rows(loss, num_clients + 1, seed=0)
    malicious_N = torch.arange(num_clients) < num_clients // 5
    rows_RP[:-1] = attack(rows_RP[:-1], malicious_N, Threat(AttackConfig(name="min-max", share=0.2)))
    return rows_RP.to(device), loss.to(device)


def differing_share(got: TrainedMasks, want: TrainedMasks) -> float:
    """The share of mask bits in which two results differ."""
    return (unpack_bits(got.bits, got.num_params) != unpack_bits(want.bits, want.num_params)).float().mean().item()


def disagreement(
    got: TrainedMasks,
    want: TrainedMasks,
    *,
    most_differing: float = MOST_DIFFERING,
    most_loss_error: float = MOST_LOSS_ERROR,
) -> str | None:
    """What differs between two solvers' results, or None if they agree."""
    share = differing_share(got, want)
    if share > most_differing:
        return f"{share:.1e} of the bits differ"
    if len(got.losses) != len(want.losses):
        return f"{len(got.losses)} steps instead of {len(want.losses)}"
    error = max(abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True))
    if not error <= most_loss_error:
        return f"losses differ by {error:.1e}"
    labels = [cluster_masks(masks.bits, masks.num_params).benign for masks in (got, want)]
    return None if torch.equal(*labels) else "client labels differ"


def model_passes(loss: FlatModel) -> Callable[[], None]:
    """The floor that no solver can pass: the model's own forward and backward passes."""

    def run() -> None:
        for _ in range(STEPS):
            params_P = loss.initial_params.detach().requires_grad_()
            torch.autograd.grad(loss(params_P), params_P)

    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement; the median is printed")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()

    with console.status("making updates ..."):
        rows_RP, loss = make_case(options.clients, device)
    floors: dict[str, Measured] = {}
    for name, call in (("mean of the rows (FedAvg)", lambda: rows_RP.mean(0)), (f"{STEPS} model passes", model_passes(loss))):
        call()
        _, floors[name] = measure(call, options.repeats, device)

    measured: dict[str, Measured] = {}
    wrong: dict[str, str] = {}
    not_run: dict[str, str] = {}
    want: TrainedMasks | None = None
    for solver in SOLVERS:
        cannot = why_not_solver(solver, device, rows_RP.dtype)
        if cannot is not None:
            not_run[solver] = cannot
            continue

        def train(solver: str = solver) -> TrainedMasks:
            return train_masks(rows_RP, loss.initial_params, loss, solver=solver)

        with console.status(f"{solver} ..."):
            masks = train()  # compiles, and is what is compared
            want = want or masks
            if solver == "collapsed":
                rounded = train_masks(rows_RP.bfloat16(), loss.initial_params, loss, solver="fused")
                allowed = max(2 * differing_share(rounded, want), LEAST_COLLAPSED_DIFFERING)
                reason = disagreement(masks, want, most_differing=allowed, most_loss_error=MOST_COLLAPSED_LOSS_ERROR)
                del rounded
            else:
                reason = disagreement(masks, want)
            if reason is not None:
                wrong[solver] = reason
                continue
            _, measured[solver] = measure(train, options.repeats, device)

    _print(console, rows_RP, floors, measured, wrong, not_run, device)
    if options.out is not None:
        figures = {name: {"seconds": m.seconds, "peak_bytes": m.peak_bytes} for name, m in {**floors, **measured}.items()}
        report = {"conditions": _conditions(rows_RP, device), "figures": figures, "wrong": wrong, "not_run": not_run}
        write_text(options.out, json.dumps(report, indent=2) + "\n")
    return 1 if wrong else 0


def _conditions(rows_RP: Tensor, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = f"N = {len(rows_RP) - 1}, P = {rows_RP.shape[1]:,}, {STEPS} steps"
    return f"{size}, float32, {name}, torch {torch.__version__}, Python {platform.python_version()}"


def _print(
    console: Console,
    rows_RP: Tensor,
    floors: dict[str, Measured],
    measured: dict[str, Measured],
    wrong: dict[str, str],
    not_run: dict[str, str],
    device: torch.device,
) -> None:
    columns = ("what", "seconds", "x ref.", "x passes", "x mean", "peak MiB", "x ref.")
    table = Table(*columns, title=_conditions(rows_RP, device))
    reference, (mean, passes) = measured["reference"], floors.values()

    def memory(item: Measured) -> tuple[str, str]:
        if item.peak_bytes is None:
            return "unknown", "-"
        return f"{item.peak_bytes / 2**20:,.0f}", f"{item.peak_bytes / (reference.peak_bytes or 1):.2f}"

    for name, item in {**floors, **measured}.items():
        ratios = (f"{item.median / floor.median:.3g}" for floor in (reference, passes, mean))
        table.add_row(name, f"{item.median:.3f}", *ratios, *memory(item))
    for name, reason in wrong.items():
        table.add_row(name, f"wrong: {reason}")
    for name, reason in not_run.items():
        table.add_row(name, f"not run: {reason}")
    console.print(table)
    console.print(
        "medians; bits, losses and labels of every timed solver agree with reference (collapsed: bits to within twice what "
        "rounding the updates to bfloat16 changes); memory beyond the inputs"
    )


if __name__ == "__main__":
    sys.exit(main())
