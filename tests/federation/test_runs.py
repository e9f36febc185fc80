"""``load_runs(...).frame()``: a row per run and round, whether or not pandas is installed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skymask_gpu.federation import load_runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs that differ in rule and number of clients, and in what decides nothing."""
    for name, rule, clients in (("one", "median", 10), ("two", "skymask", 20)):
        run = tmp_path / name
        run.mkdir()
        tracking = {"tracker": "none" if name == "one" else "tensorboard"}
        config = {"name": name, "rounds": 2, "data": {"clients": clients}, "defence": {"rule": rule}, "tracking": tracking}
        (run / "config.json").write_text(json.dumps(config))
        lines = [{"run": name, "round": number, "accuracy": 0.5 + number / 4, "rejected": [number]} for number in range(2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "two" / "times.jsonl").write_text('{"round": 1, "aggregation": 0.25, "phases": {"root": 0.1}}\n')
    return tmp_path


ROWS = [
    {"run": "one", "data.clients": 10, "defence.rule": "median", "round": 0, "accuracy": 0.5, "rejected": [0]},
    {"run": "one", "data.clients": 10, "defence.rule": "median", "round": 1, "accuracy": 0.75, "rejected": [1]},
    {"run": "two", "data.clients": 20, "defence.rule": "skymask", "round": 0, "accuracy": 0.5, "rejected": [0]},
    {"run": "two", "data.clients": 20, "defence.rule": "skymask", "round": 1, "accuracy": 0.75, "rejected": [1],
     "seconds.aggregation": 0.25},
]  # fmt: skip


def test_rows_have_the_settings_that_differ_the_record_and_the_times(folder: Path) -> None:
    runs = load_runs(str(folder))
    assert list(runs.rows()) == ROWS
    assert repr(runs) == "<2 runs: one, two>"
    assert [run.name for run in runs[1:]] == ["two"]
    assert next(runs[1:].rows()).keys() == {"run", "round", "accuracy", "rejected"}, "one run differs from none"
    with pytest.raises(ValueError, match="no run found"):
        load_runs(folder / "absent")


def test_frame_is_made_of_the_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: made.append(rows) or "frame"))
    assert load_runs(folder).frame() == "frame"  # type: ignore[comparison-overlap]
    assert made == [ROWS]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"frame\(\) needs pandas: pip install pandas; rows\(\) does without"):
        load_runs(folder).frame()


def test_frame_where_pandas_is_installed(folder: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = load_runs(folder).frame()
    assert len(frame) == 4
    assert frame.pivot(index="round", columns="run", values="accuracy").loc[1, "two"] == 0.75
    assert frame["seconds.aggregation"].isna().sum() == 3
