"""Shards of a sweep, the lock that they share, and what a report says is missing."""

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from skymask_gpu.federation import sweep
from skymask_gpu.federation.config import read_grid
from skymask_gpu.federation.sweep import cell_folder, clear_cells, has_cells, planned_cells, shard_of, write_plan
from skymask_gpu.io.files import InUseError, locked
from skymask_gpu.report.summary import missing_cells

GRID = """
rounds = 1
[data]
clients = 10
root_samples = 20
[local]
steps = 1
[defence]
rule = "fedavg"
[grid]
seed = [0, 1, 2, 3, 4, 5, 6]
"""


@pytest.fixture
def cells(tmp_path: Path) -> list:
    (tmp_path / "grid.toml").write_text(GRID)
    return read_grid(tmp_path / "grid.toml")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_each_cell_is_in_exactly_one_shard(cells: list, count: int) -> None:
    shards = [shard_of(cells, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(cell.seed for shard in shards for cell in shard) == [0, 1, 2, 3, 4, 5, 6]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/2/3", " 1/2", ""])
def test_a_shard_that_does_not_exist_is_refused(cells: list, shard: str) -> None:
    with pytest.raises(ValueError, match="--shard must be i/n with i from 1 to n, such as 2/8, got "):
        shard_of(cells, shard)


def test_shards_share_a_lock_that_a_whole_sweep_does_not_get(tmp_path: Path) -> None:
    by_us = pytest.raises(InUseError, match=f"process {os.getpid()}")
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True), by_us, locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(InUseError), locked(tmp_path, shared=True):
        pass


def test_a_cell_that_another_process_plays_is_left_alone(cells: list, tmp_path: Path) -> None:
    """It counts as failed for whoever cannot play it, but no error is written beside the other's files."""
    out, config = tmp_path / "out", cells[0]
    folder = cell_folder(out, config)
    # Held through a descriptor of its own, as another process would.
    folder.mkdir(parents=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InUseError):
            clear_cells(out, [config])
        with pytest.raises(SystemExit) as ended:
            sweep._play(config.to_dict(), folder, num_threads=1)
    finally:
        os.close(descriptor)
    state = sweep._finished(config, SimpleNamespace(exitcode=ended.value.code), folder, 0)  # type: ignore[arg-type]
    assert (state.state, "is in use by another run or sweep" in state.error) == ("failed", True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock"]


def test_what_is_missing_is_what_was_planned_and_neither_begun_nor_failed(cells: list, tmp_path: Path) -> None:
    assert planned_cells(tmp_path) == missing_cells(tmp_path) == []
    write_plan(tmp_path, cells)
    assert planned_cells(tmp_path) == [cell.name for cell in cells]
    done, failed, begun = (cell_folder(tmp_path, cell) for cell in cells[:3])
    for folder in (done, failed, begun):
        folder.mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"round": 0}\n')
    (failed / "error.txt").write_text("ValueError: no\n")
    assert missing_cells(tmp_path) == [cell.name for cell in cells[2:]]
    assert has_cells(tmp_path, cells[:1])
    assert not has_cells(tmp_path, cells[1:]), "a shard looks at its own cells"
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sweep\.json must hold the names of a sweep's cells"):
        planned_cells(tmp_path)
