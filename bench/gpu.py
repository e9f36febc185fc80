"""What a CUDA GPU does: every kernel is checked against its twin, then solvers and server rounds are timed.

``python -m skymask_gpu.bench.gpu --out bench/results`` writes DEVICE.csv there, each row as soon as it is measured.
Whatever fails is a row with the reason. The kernels and each model have a process of their own, and a new one after a
GPU error, because such an error makes all later calls of its process fail. Started again, it measures the points (a
model and a number of clients) that are not complete; move the file away to measure all anew.

All results are checked without TF32, and the solvers run without it. A row of its own tells what TF32 would make of
the model's passes.

Exit codes: 0 all rows are there, 1 something is wrong or failed, 2 no CUDA GPU, 3 the time is up and points are left.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skymask_gpu.bench.cases import CASES
from skymask_gpu.bench.gpu_figures import FEWEST_CLIENTS, figures
from skymask_gpu.bench.kernel_checks import CHECKS, wrong_with
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.run import Runner
from skymask_gpu.bench.table import Row, conditions, read_rows, status_of, write_rows
from skymask_gpu.engine.numerics import without_tf32

__all__ = ["main"]

KERNELS, MODELS = "kernels", ("cnn", "resnet20", "resnet18")
CLIENTS = (FEWEST_CLIENTS, 500, 2_000, 10_000)
# Exit codes of a part: the time is up; the GPU answers no more.
_TIME_UP, _LOST = 3, 4


class _File:
    """DEVICE.csv: what is there already, and rows as they come."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self._console = path, console
        self.rows = read_rows(path) if path.exists() else []

    def drop(self, case: str, clients: int) -> None:
        self.rows = [row for row in self.rows if (row.case, row.clients) != (case, clients)]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self.path, self.rows)
        seconds = "" if row.median_s is None else f" {row.median_s * 1e3:.3f} ms"
        ratios = ((row.of_copy, "of copy bandwidth"), (row.to_mean, "x mean"), (row.to_passes, "x passes"))
        texts = [f"{value:.2f} {what}" for value, what in ratios if value is not None]
        line = f"{row.case}, N = {row.clients:,}: {row.provider}: {row.status}{seconds} {', '.join(texts)}{row.detail}"
        self._console.print(line, markup=False, soft_wrap=True)

    def add_check(self, part: str, provider: str, device: torch.device, state: dict[str, Any]) -> None:
        """A row of something that is not timed."""
        empty: dict[str, Any] = {"model": "", "clients": 0, "params": None, "dtype": "", "mask_steps": 0, "root_samples": 0}
        self.add(Row(case=part, what="kernel", provider=provider, **empty, **state, **conditions(device, 0)))

    def is_complete(self, case: str, clients: int, names: set[str]) -> bool:
        return {row.provider for row in self.rows if (row.case, row.clients) == (case, clients)} >= names

    def num_bad(self) -> int:
        return sum(row.status in ("wrong", "failed") for row in self.rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=480.0, help="after this time, no further point begins")
    parser.add_argument("--part", choices=(KERNELS, *MODELS), help="only this part, in this process")
    options = parser.parse_args(arguments)
    console = Console()
    found = _gpu()
    if found is None:
        console.print("no CUDA GPU is present: nothing is measured")
        return 2
    device, name = found
    file = _File(options.out / f"{_file_name(name)}.csv", console)
    if options.part is None:
        return _play_parts(file, device, options.seconds, console)
    with without_tf32():
        return check_kernels(file, device) if options.part == KERNELS else measure(file, options.part, device, options.seconds)


def _gpu() -> tuple[torch.device, str] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def _file_name(device_name: str) -> str:
    """``h200`` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia")).strip("-")


def _play_parts(file: _File, device: torch.device, seconds: float, console: Console) -> int:
    """Each part in a process of its own; one that ends early is a row, and the next part begins."""
    begin, time_up = time.monotonic(), False
    for part in (KERNELS, *MODELS):
        code = _LOST
        while code == _LOST:
            left = seconds - (time.monotonic() - begin)
            command = [sys.executable, "-P", "-m", "skymask_gpu.bench.gpu", "--part", part, "--out", str(file.path.parent)]
            code = subprocess.run([*command, "--seconds", str(left)], check=False).returncode
        time_up |= code == _TIME_UP
        file = _File(file.path, console)
        if code not in (0, _TIME_UP):
            state = {"status": "failed", "detail": f"its process ended with exit code {code}: start again"}
            file.add_check(part, "process", device, state)
    console.print(f"{len(file.rows)} rows, {file.num_bad()} wrong or failed: {file.path}")
    if time_up:
        console.print(f"the {seconds:g} s are spent and points are left: start again")
        return _TIME_UP
    return 1 if file.num_bad() else 0


def check_kernels(file: _File, device: torch.device) -> int:
    """A row per kernel."""
    file.drop(KERNELS, 0)
    state: dict[str, Any]
    for name in CHECKS:
        try:
            wrong = wrong_with(name, device)
            state = {"status": "wrong", "detail": wrong} if wrong else {"status": "ok", "compared_with": "its twin in float64"}
        except Exception as error:
            state = status_of(error)
        file.add_check(KERNELS, name, device, state)
    return 0


def measure(file: _File, name: str, device: torch.device, seconds: float) -> int:
    """All points of a model that are not complete."""
    begin, case = time.monotonic(), CASES[name]
    limits = Limits(CLIENTS, (name,), ("float32",), total_seconds=math.inf, repeat_seconds=1.0, side_by_side=False)
    runner, names = Runner(limits, device, figures), {provider.name for provider in figures(case)}
    file.drop(name, 0)
    for clients in CLIENTS:
        if file.is_complete(name, clients, names):
            continue
        if time.monotonic() - begin > seconds:
            return _TIME_UP
        file.drop(name, clients)
        for row in runner.point(case, clients, "float32"):
            file.add(row)
        if _is_lost(device):
            return _LOST
    return 0


def _is_lost(device: torch.device) -> bool:
    """Whether the GPU answers no more in this process: after an illegal address, every call fails."""
    try:
        return bool(torch.zeros(1, device=device).item())
    except RuntimeError:
        return True


if __name__ == "__main__":
    sys.exit(main())
