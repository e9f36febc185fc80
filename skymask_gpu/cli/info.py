"""The command ``skymask-gpu info``: what can run here, and why not."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch
import typer
from rich.markup import escape
from rich.table import Table

from skymask_gpu.cli.console import answer, console
from skymask_gpu.cli.options import AsJson
from skymask_gpu.engine import SOLVERS, why_not_solver
from skymask_gpu.engine.clustering import BACKENDS, why_not_backend

__all__ = ["capabilities", "register", "versions"]

_PACKAGES = (
    "skymask-gpu",
    "torch",
    "triton",
    "numba",
    "numpy",
    "safetensors",
    "scikit-learn",
    "cuml-cu13",
    "matplotlib",
    "jinja2",
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(info)


def info(as_json: AsJson = False) -> None:
    """What can run here, and why not."""
    with answer(as_json=as_json) as found:
        table = Table("", "", show_header=False, box=None)
        for name, version in versions():
            table.add_row(name, version)
        console.print(table)
        rows = capabilities()
        table = Table("what", "runs", "detail")
        for what, runs, detail in rows:
            table.add_row(what, f"[{'green' if runs == 'yes' else 'red'}]{runs}[/]", escape(detail))
        console.print(table)
        found["versions"] = dict(versions())
        found["capabilities"] = [{"what": what, "runs": runs == "yes", "detail": detail} for what, runs, detail in rows]


def versions() -> list[tuple[str, str]]:
    """(name, version) of Python, the machine, and each package that the product uses.

    The version is "not installed" if the package is missing.
    """
    rows = [("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}, {os.cpu_count()} processors")]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def capabilities() -> list[tuple[str, str, str]]:
    """What can run here, as (what, "yes" or "no", detail).

    There is a row for each GPU, for each solver on each kind of device, for each backend of
    clustering, and for the command ``run``.
    """
    rows = []
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append((f"cuda:{index}", "yes", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
        devices.append(torch.device("cuda"))
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA driver or device"
        rows.append(("cuda", "no", why))
    for device in devices:
        for solver in SOLVERS:
            for dtype in (torch.float32, torch.bfloat16):
                reason = why_not_solver(solver, device, dtype)
                name = f"solver {solver} on {device.type}, {str(dtype).removeprefix('torch.')} updates"
                rows.append((name, "no" if reason else "yes", reason or ""))
    for backend in BACKENDS:
        reason = why_not_backend(backend)
        rows.append((f"clustering backend {backend}", "no" if reason else "yes", reason or ""))
    missing = [name for name in ("sklearn", "matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    detail = f"{', '.join(missing)} missing: pip install 'skymask-gpu[run]'" if missing else ""
    rows.append(("skymask-gpu run", "no" if missing else "yes", detail))
    return rows
