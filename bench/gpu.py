"""What a CUDA GPU does: the kernels' tests run on it, then solvers and rounds are timed.

``python -m skymask_gpu.bench.gpu --out bench/results`` writes DEVICE.csv there, each row as soon as
it is measured. Whatever fails is a row with the reason. Every file of tests and every point (a
model and a number of clients) has a process of its own, because an error of the GPU makes all later
calls of its process fail. Started again, it goes on with what is not complete; move the file away
to measure all anew.

All results are checked without TF32, and the solvers run without it. A row of its own tells what
TF32 would make of the model's passes.

Exit codes: 0 all rows are there, 1 something is wrong or failed, 2 no CUDA GPU or no tests to run,
3 the time is up and points are left.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skymask_gpu.bench.cases import CASES
from skymask_gpu.bench.gpu_figures import FEWEST_CLIENTS, figures
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.run import Runner
from skymask_gpu.bench.table import Row, conditions, read_rows, write_rows

__all__ = ["main"]

MODELS = ("cnn", "resnet20", "resnet18")
CLIENTS = (FEWEST_CLIENTS, 500, 2_000, 10_000)
KERNEL_TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels"


class _File:
    """DEVICE.csv: what is there already, and rows as they come."""

    def __init__(self, path: Path, device: torch.device, console: Console) -> None:
        self.path, self._device, self._console = path, device, console
        self.rows: list[Row] = []
        self.read()

    def read(self) -> None:
        self.rows = read_rows(self.path) if self.path.exists() else []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self.path, self.rows)
        seconds = "" if row.median_s is None else f" {row.median_s * 1e3:.3f} ms"
        ratios = ((row.of_copy, "of copy bandwidth"), (row.to_mean, "x mean"), (row.to_passes, "x passes"))
        texts = [f"{value:.2f} {what}" for value, what in ratios if value is not None]
        line = f"{row.case}, N = {row.clients:,}: {row.provider}: {row.status}{seconds} {', '.join(texts)}{row.detail}"
        self._console.print(line, markup=False, soft_wrap=True)

    def add_untimed(self, case: str, clients: int, provider: str, **state: Any) -> None:
        empty: dict[str, Any] = {"what": "", "model": "", "params": None, "dtype": "", "mask_steps": 0, "root_samples": 0}
        self.add(Row(case=case, clients=clients, provider=provider, **empty, **state, **conditions(self._device)))

    def is_complete(self, case: str, clients: int, names: set[str]) -> bool:
        return {row.provider for row in self.rows if (row.case, row.clients) == (case, clients)} >= names

    def num_bad(self) -> int:
        return sum(row.status in ("wrong", "failed") for row in self.rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=480.0, help="after this time, no further point begins")
    points = {f"{model}-{clients}": (model, clients) for model, clients in product(MODELS, CLIENTS)}
    parser.add_argument("--point", metavar="MODEL-CLIENTS", choices=points, help="only this point, in this process")
    options = parser.parse_args(arguments)
    console = Console()
    found = _gpu()
    if found is None:
        console.print("no CUDA GPU is present: nothing is measured")
        return 2
    device, name = found
    file = _File(options.out / f"{_file_name(name)}.csv", device, console)
    if options.point is not None:
        measure(file, *points[options.point], device)
        return 0
    if not KERNEL_TESTS.is_dir() or find_spec("pytest") is None:
        needed = f"the kernels are checked by {KERNEL_TESTS}: this needs a checkout, and in it pip install -e '.[test]'"
        console.print(needed, markup=False, soft_wrap=True)
        return 2
    end = time.monotonic() + options.seconds
    check_kernels(file)
    all_began = measure_points(file, end)
    console.print(f"{len(file.rows)} rows, {file.num_bad()} wrong or failed: {file.path}")
    if not all_began:
        console.print(f"the {options.seconds:g} s are spent and points are left: start again")
        return 3
    return 1 if file.num_bad() else 0


def _gpu() -> tuple[torch.device, str] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def _file_name(device_name: str) -> str:
    """``h200`` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia")).strip("-")


def check_kernels(file: _File) -> None:
    """A row per file of tests, which compare the kernels with their twins in float64."""
    for path in sorted(KERNEL_TESTS.glob("test_*.py")):
        if file.is_complete("kernels", 0, {path.stem}):
            continue
        # "long" are those that compile for other GPUs than this one
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-rfE", "-m", "not slow and not long", path.name]
        wide = {**os.environ, "COLUMNS": "300"}
        done = subprocess.run(command, cwd=path.parent, env=wide, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines() or [f"exit code {done.returncode}"]
        if done.returncode == 0:
            file.add_untimed("kernels", 0, path.stem, status="ok", compared_with=f"its tests: {lines[-1]}")
        else:
            first = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:1]
            status = "wrong" if done.returncode == 1 else "failed"
            file.add_untimed("kernels", 0, path.stem, status=status, detail="; ".join([lines[-1], *first])[:300])


def measure_points(file: _File, end: float) -> bool:
    """Measure each point that is not complete, in a process of its own.

    Returns whether all could begin before ``end``.
    """
    for model, clients in product(MODELS, CLIENTS):
        if file.is_complete(model, clients, {provider.name for provider in figures(CASES[model])}):
            continue
        if time.monotonic() > end:
            return False
        command = [sys.executable, "-P", "-m", "skymask_gpu.bench.gpu", "--out", str(file.path.parent)]
        code = subprocess.run([*command, "--point", f"{model}-{clients}"], check=False).returncode
        file.read()
        if code:
            detail = f"its process ended with exit code {code}: start again"
            file.add_untimed(model, clients, "process", status="failed", detail=detail)
    return True


def measure(file: _File, model: str, clients: int, device: torch.device) -> None:
    """All rows of a point."""
    limits = Limits((clients,), (model,), ("float32",), total_seconds=math.inf, repeat_seconds=1.0, side_by_side=False)
    file.rows = [row for row in file.rows if (row.case, row.clients) != (model, clients)]
    for row in Runner(limits, device, figures).point(CASES[model], clients, "float32"):
        file.add(row)


if __name__ == "__main__":
    sys.exit(main())
