"""A sweep: many runs, called cells, each in a process and a folder of its own.

A cell that fails or is killed does not disturb the others. The sweep's folder holds a folder
``cells/NAME/`` for each cell. It holds the files that :mod:`skymask_gpu.federation.run_folder`
lists, or ``error.txt``, and ``memory.json``, the most bytes that the cell's process held.
``sweep.json`` lists the cells that there will be.

The cells of one sweep may be divided among several machines: each plays a shard, and all write to
the same folder.
"""

import json
import multiprocessing
import os
import re
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skymask_gpu.engine.peak_memory import resident
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.models import build_model
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import METRICS, check_same_run, clear_results, has_results, is_whole
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.io.files import InUseError, locked, write_text

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = [
    "CELLS",
    "ERROR",
    "CellState",
    "cell_folder",
    "check_cells",
    "check_inputs",
    "clear_cells",
    "end_with_parent",
    "has_cells",
    "least_used",
    "most_held",
    "planned_cells",
    "play_cells",
    "processes",
    "shard_of",
    "threads_per_job",
    "write_plan",
]

CELLS, ERROR, _MEMORY, _PLAN = "cells", "error.txt", "memory.json", "sweep.json"
# The exit status of a cell's process if another process plays the cell.
_IN_USE = 75
_POLL_SECONDS = 0.2
# The path of a Unix socket has at most 107 bytes, and multiprocessing adds "/listener-" and eight
# characters to its folder.
_LONGEST_FOLDER = 107 - 18
# What a run imports only on its way: the digits, torch's wrapper of `split`, and the CPU kernels.
# The server skips what is not installed.
_KERNELS = tuple(f"skymask_gpu.kernels.{name}.cpu" for name in ("bins", "cuts", "mask_step"))
_IMPORTED_LATE = ("sklearn.datasets", "torch._dynamo", *_KERNELS)


@dataclass(frozen=True)
class CellState:
    """How far a cell is.

    Attributes:
        config: the run of the cell.
        state: ``"running"``, ``"done"`` or ``"failed"``.
        rounds: the number of rounds on disk.
        error: the first line of the error, if the cell failed.
    """

    config: RunConfig
    state: str
    rounds: int
    error: str = ""


def cell_folder(folder: Path, config: RunConfig) -> Path:
    return folder / CELLS / config.name


def has_cells(folder: Path, configs: list[RunConfig] | None = None) -> bool:
    """Whether a sweep was begun in ``folder``; of a shard, whether one of its own cells was."""
    if configs is None:
        return (folder / CELLS).exists()
    return any(has_results(cell_folder(folder, config)) for config in configs)


def clear_cells(folder: Path, configs: list[RunConfig]) -> None:
    """Remove what these cells wrote.

    Raises:
        ValueError: another process plays one of them.
    """
    for config in configs:
        if cell_folder(folder, config).exists():
            with locked(cell_folder(folder, config)):
                clear_results(cell_folder(folder, config))
                for name in (ERROR, _MEMORY):
                    (cell_folder(folder, config) / name).unlink(missing_ok=True)


def shard_of(cells: list[RunConfig], shard: str) -> list[RunConfig]:
    """The cells of one shard; each cell is in exactly one of the n shards ``1/n`` to ``n/n``.

    Neighbours in the grid are in different shards, since one rule may take longer than another.

    Raises:
        ValueError: ``shard`` is not of the form ``i/n`` with i from 1 to n.
    """
    form = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    number, count = map(int, form.groups()) if form else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard must be i/n with i from 1 to n, such as 2/8, got {shard!r}")
    return cells[number - 1 :: count]


def write_plan(folder: Path, configs: list[RunConfig]) -> None:
    """Write which cells the folder will hold, so that a report can say which are missing."""
    write_text(folder / _PLAN, json.dumps({"cells": [config.name for config in configs]}, indent=1) + "\n")


def planned_cells(folder: Path) -> list[str]:
    """The names of the cells of the sweep that was last begun in ``folder``; empty if none was."""
    try:
        cells = json.loads((folder / _PLAN).read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _PLAN} must hold the names of a sweep's cells: {error!r}; remove the file") from error
    return [str(cell) for cell in cells]


def check_cells(folder: Path, configs: list[RunConfig]) -> None:
    """Raise a ValueError if a cell's folder holds a run with other settings."""
    for config in configs:
        check_same_run(config, cell_folder(folder, config))


def check_inputs(configs: list[RunConfig]) -> None:
    """Load each data set and build each model once: what is missing is said before the first cell.

    Raises:
        ValueError: a data set's files are missing or damaged, or a model does not fit.
    """
    for name, where in dict.fromkeys((c.data.dataset, c.data.data_dir) for c in configs):
        dataset = load_dataset(name, Path(where) if where else None)
        shape = tuple(dataset.train_inputs.shape[1:])
        for model in dict.fromkeys(c.model.name for c in configs if (c.data.dataset, c.data.data_dir) == (name, where)):
            build_model(model, shape, dataset.num_classes, seed=0, dtype=dataset.train_inputs.dtype)


def play_cells(configs: list[RunConfig], folder: Path, jobs: int) -> Iterator[CellState]:
    """Play every cell that is not done, ``jobs`` at a time; yield each change of a cell's state.

    A cell that failed before is tried again. With several jobs the threads are shared out among
    them, and each gets the GPU of this machine on which the fewest of them run.
    """
    waiting = list(reversed(configs))
    running: list[tuple[RunConfig, BaseProcess, int, int | None]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.pop()
                done = _num_rounds(cell_folder(folder, config))
                if is_whole(cell_folder(folder, config), config.rounds):
                    yield CellState(config, "done", done)
                else:
                    gpu = least_used([one for *_, one in running], torch.cuda.device_count())
                    running.append((config, _start(config, cell_folder(folder, config), jobs, gpu), -1, gpu))
            time.sleep(_POLL_SECONDS)
            still: list[tuple[RunConfig, BaseProcess, int, int | None]] = []
            for config, process, told, gpu in running:
                alive = process.is_alive()
                done = _num_rounds(cell_folder(folder, config))
                if not alive:
                    yield _finished(config, process, cell_folder(folder, config), done)
                    continue
                if done != told:
                    yield CellState(config, "running", done)
                still.append((config, process, done, gpu))
            running = still
    finally:
        for _, process, *_ in running:
            process.terminate()
            process.join()


def processes() -> "ForkServerContext | SpawnContext":
    """How the processes of a sweep or a board are started.

    Importing PyTorch and the like takes longer than playing a short run does. So a server process,
    which does nothing else, imports them once, and each cell's process is a fork of it. CUDA is not
    initialised in the server, and has to be initialised after a fork. Where there can be no such
    server, each process imports everything for itself: on Windows, and where the path of the
    server's socket, in the folder for temporary files, would be too long for the system.
    """
    too_long = len(os.fsencode(get_temp_dir())) > _LONGEST_FOLDER
    if too_long or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_IMPORTED_LATE])
    return context


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, whatever ended that one.

    If a sweep is killed, as by a scheduler whose time is up, nobody else tells its cells. They
    would play on, and the sweep that resumes it would find their folders in use.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        wait([parent.sentinel])
        # Only this leaves the process at once, from a thread. It may be anywhere: what is on disk
        # stands a kill at any moment.
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def threads_per_job(jobs: int) -> int:
    """The number of threads of each of ``jobs`` processes that share this process's threads."""
    return max(1, torch.get_num_threads() // jobs)


def least_used(used: Iterable[int | None], num_gpus: int) -> int | None:
    """The first of the GPUs on which the fewest cells run; None if there are no GPUs.

    Example:
        >>> least_used([], 2), least_used([0], 2), least_used([0, 1, 0], 2), least_used([], 0)
        (0, 1, 1, None)
    """
    cells = list(used)
    return min(range(num_gpus), key=cells.count, default=None)


def _start(config: RunConfig, folder: Path, jobs: int, gpu: int | None) -> BaseProcess:
    (folder / ERROR).unlink(missing_ok=True)
    arguments = (config.to_dict(), folder, threads_per_job(jobs), gpu)
    process = processes().Process(target=_play, args=arguments, daemon=True)
    process.start()
    return process


def _play(settings: dict[str, Any], folder: Path, num_threads: int, gpu: int | None = None) -> None:
    """Play all rounds in the cell's own process, on GPU number ``gpu``.

    An error goes to disk, with exit status 1.

    The settings come as tables, since the classes of a plugin's settings are not known before the
    plugin is imported.
    """
    end_with_parent()
    torch.set_num_threads(num_threads)
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        config = RunConfig.from_dict(settings)
        # Another shard may play the same cell.
        with locked(folder):
            for _ in play(Federation.build(config), folder):
                pass
            _write_most_held(folder)
    except InUseError:
        # No error of this cell: the files are the other process's.
        raise SystemExit(_IN_USE) from None
    except Exception as error:
        write_text(folder / ERROR, f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def most_held(folder: Path) -> int | None:
    """The most bytes that the process of the cell in ``folder`` held; None if it is not known.

    On a GPU these are the bytes of its tensors there. On a CPU it is all of the process's memory.
    """
    try:
        held = json.loads((folder / _MEMORY).read_text(encoding="utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held if isinstance(held, int) else None


def _write_most_held(folder: Path) -> None:
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    if held is not None:
        # A cell that was stopped and resumed had several processes.
        write_text(folder / _MEMORY, json.dumps({"bytes": max(held, most_held(folder) or 0)}) + "\n")


def _finished(config: RunConfig, process: BaseProcess, folder: Path, done: int) -> CellState:
    if process.exitcode == 0:
        return CellState(config, "done", done)
    if process.exitcode == _IN_USE:
        return CellState(config, "failed", done, f"{folder} is in use by another run or sweep")
    if not (folder / ERROR).exists():
        how = f"signal {-process.exitcode}" if process.exitcode and process.exitcode < 0 else f"status {process.exitcode}"
        write_text(folder / ERROR, f"the process ended with {how} (out of memory?)\n")
    return CellState(config, "failed", done, (folder / ERROR).read_text(encoding="utf-8").split("\n", 1)[0])


def _num_rounds(folder: Path) -> int:
    """The number of rounds on disk."""
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0
