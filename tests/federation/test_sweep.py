"""Sweeps: every cell in its own process and folder; what fails is recorded, what is done is not done again."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skymask_gpu.federation import sweep
from skymask_gpu.federation.config import RunConfig, read_grid
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import CHECKPOINT, CONFIG, METRICS, is_whole
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.federation.sweep import ERROR, CellState, cell_folder, clear_cells, has_cells, play_cells
from skymask_gpu.io.files import read_metadata

pytestmark = pytest.mark.long

GRID = """
rounds = 2
[data]
clients = 12
root_samples = 40
[local]
steps = 2
[attack]
name = "sign-flip"
share = 0.4
[grid]
"defence.rule" = ["fedavg", "bulyan"]
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CellState]]:
    """FedAvg runs; Bulyan cannot, with 5 attackers of 12 clients."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(GRID)
    return folder, list(play_cells(read_grid(folder / "grid.toml"), folder / "out", jobs=2))


def last_states(states: list[CellState]) -> dict[str, CellState]:
    return {state.config.defence.rule: state for state in states}


def test_a_failed_cell_is_recorded_and_the_others_go_on(swept: tuple[Path, list[CellState]]) -> None:
    folder, states = swept
    last = last_states(states)
    assert (last["fedavg"].state, last["fedavg"].rounds) == ("done", 2)
    assert last["bulyan"].state == "failed"
    assert "bulyan" in last["bulyan"].error.lower()
    failed, done = (cell_folder(folder / "out", last[rule].config) for rule in ("bulyan", "fedavg"))
    assert (failed / ERROR).read_text().startswith(last["bulyan"].error)
    assert "Traceback" in (failed / ERROR).read_text()
    assert not (done / ERROR).exists()
    assert json.loads((done / CONFIG).read_text())["defence"]["rule"] == "fedavg"
    assert has_cells(folder / "out")


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(swept: tuple[Path, list[CellState]]) -> None:
    folder, states = swept
    done = cell_folder(folder / "out", last_states(states)["fedavg"].config) / METRICS
    before = done.stat().st_mtime_ns
    cells = read_grid(folder / "grid.toml")
    again = last_states(list(play_cells(cells, folder / "out", jobs=1)))
    assert again["fedavg"].state == "done"
    assert again["bulyan"].state == "failed"
    assert done.stat().st_mtime_ns == before
    clear_cells(folder / "out", cells)
    assert not done.exists()


def test_a_killed_cell_is_a_failed_one(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace("rounds = 2", "rounds = 4000").replace(', "bulyan"', ""))
    (cell,) = read_grid(tmp_path / "grid.toml")
    last = None
    for state in play_cells([cell], tmp_path / "out", jobs=1):
        last = state
        if state.state == "running" and state.rounds >= 1:
            for child in multiprocessing.active_children():
                child.kill()
            time.sleep(0.1)
    assert last is not None
    assert (last.state, last.error) == ("failed", "the process ended with signal 9 (out of memory?)")
    assert last.rounds >= 1


def test_cells_share_the_threads_and_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs on two GPUs. A cell that ends leaves its GPU to the next one."""
    (tmp_path / "grid.toml").write_text(GRID.replace('"defence.rule" = ["fedavg", "bulyan"]', "seed = [0, 1, 2, 3, 4]"))
    gpus: list[int | None] = []

    def start(config: RunConfig, folder: Path, jobs: int, gpu: int | None) -> Any:
        gpus.append(gpu)
        ends = iter([False] if config.seed == 1 else [True, False])
        return SimpleNamespace(is_alive=lambda: next(ends), exitcode=0, terminate=lambda: None, join=lambda: None)

    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    list(play_cells(read_grid(tmp_path / "grid.toml"), tmp_path / "out", jobs=3))
    # Seeds 0, 1 and 2 begin together. Seed 1 ends first, so that GPU 1 is free for seed 3.
    assert gpus[:4] == [0, 1, 0, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert [sweep.threads_per_job(jobs) for jobs in (1, 2, 8)] == [5, 2, 1]


def test_a_socket_whose_path_would_be_too_long_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "get_temp_dir", lambda: "/" + "x" * 88)
    assert sweep.processes().get_start_method() == "forkserver"
    monkeypatch.setattr(sweep, "get_temp_dir", lambda: "/" + "x" * 89)
    assert sweep.processes().get_start_method() == "spawn"


def test_a_cell_that_was_killed_before_its_last_checkpoint_is_not_done(tmp_path: Path) -> None:
    """The checkpoint comes after the last line of the metrics; here, it is still that of the first round."""
    grid = GRID.replace('"defence.rule" = ["fedavg", "bulyan"]', "seed = [0]")
    (tmp_path / "grid.toml").write_text(f'{grid}[defence]\nrule = "fedavg"\n')
    (cell,) = read_grid(tmp_path / "grid.toml")
    folder = cell_folder(tmp_path / "out", cell)
    list(play(Federation.build(replace(cell, rounds=1)), folder))
    before = (folder / CHECKPOINT).read_bytes()
    list(play(Federation.build(cell), folder))
    lines = (folder / METRICS).read_bytes()
    assert is_whole(folder, 2)
    (folder / CHECKPOINT).write_bytes(before)
    assert not is_whole(folder, 2)
    states = list(play_cells([cell], tmp_path / "out", jobs=1))
    assert (states[-1].state, states[-1].rounds) == ("done", 2)
    assert read_metadata(folder / CHECKPOINT)["round"] == "1"
    assert (folder / METRICS).read_bytes() == lines
    (folder / CHECKPOINT).unlink()
    assert not is_whole(folder, 2)
