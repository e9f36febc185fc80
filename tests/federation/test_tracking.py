"""Trackers: every round once, no error ends the run, nothing changes its results.

No package is needed, except where a test says so.
"""

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.federation import DataConfig, DefenceConfig, Federation, RunConfig, play
from skymask_gpu.federation.config import read_config
from skymask_gpu.federation.run_folder import clear_results
from skymask_gpu.federation.tracking import TRACKERS, TrackerContext, TrackingConfig, export, numbers, tracking_for
from skymask_gpu.io.files import read_tensors

RUN = RunConfig(rounds=3, data=DataConfig(clients=10, root_samples=20), defence=DefenceConfig(rule="median"))

Call = tuple[Any, ...]


class Calls:
    """A tracker that notes what it is called with, and breaks what it is given."""

    made: list[Call]
    fails_in = ""

    def __init__(self, context: TrackerContext) -> None:
        self.note("made", context.first_round, context.run_id)

    def start(self, settings: dict[str, Any]) -> None:
        self.note("start", settings.pop("seed"))

    def log(self, round: int, metrics: dict[str, Any]) -> None:
        self.note("log", round, metrics["accuracy"], sorted(metrics["seconds"]))
        metrics.clear()

    def finish(self) -> None:
        self.note("finish")

    def note(self, *call: Any) -> None:
        self.made.append(call)
        if call[0] == self.fails_in:
            raise RuntimeError("the disk of the tracker is full")


@pytest.fixture
def calls() -> Iterator[list[Call]]:
    made: list[Call] = []
    tracker = type("Noted", (Calls,), {"made": made})
    TRACKERS.register("noted")(tracker)
    yield made
    TRACKERS.remove("noted")


def played(folder: Path, config: RunConfig = RUN, rounds: int = 3, tracker: str = "noted") -> list[dict[str, Any]]:
    config = replace(config, rounds=rounds, tracking=TrackingConfig(tracker=tracker))
    return list(play(Federation.build(config), folder))


def test_every_round_once_through_resumes_with_checkpoints_that_are_behind(tmp_path: Path, calls: list[Call]) -> None:
    config = replace(RUN, checkpoint_every=3)
    records = []
    for record in play(Federation.build(replace(config, rounds=5, tracking=TrackingConfig(tracker="noted"))), tmp_path):
        records.append(record)
        if record["round"] == 1:
            break  # stopped before the first checkpoint
    assert [call[0] for call in calls] == ["made", "start", "log", "log", "finish"]
    with pytest.warns(UserWarning, match="plays round 0, 1 again"):
        again = played(tmp_path, config, rounds=5)
    logged = [call for call in calls if call[0] == "log"]
    assert [(call[1], call[2]) for call in logged] == [(record["round"], record["accuracy"]) for record in again]
    assert logged[0][3] == ["aggregation", "local_training"]
    (_, first, run_id), (_, second, same_id) = (call for call in calls if call[0] == "made")
    assert (first, second) == (0, 2)
    assert run_id == same_id
    # an overwritten run is another one
    clear_results(tmp_path)
    calls.clear()
    played(tmp_path, rounds=1)
    assert calls[0][1] == 0
    assert calls[0][2] != run_id


def test_a_tracker_that_comes_later_gets_the_earlier_rounds(tmp_path: Path, calls: list[Call]) -> None:
    played(tmp_path, rounds=2, tracker="none")
    assert not (tmp_path / "tracking.json").exists()
    played(tmp_path, rounds=3)
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1, 2]


def test_tracking_changes_no_result_and_blocks_no_resume(tmp_path: Path, calls: list[Call]) -> None:
    plain, followed = tmp_path / "plain", tmp_path / "followed"
    played(plain, tracker="none")
    played(followed, rounds=2)
    played(followed, rounds=3, tracker="none")
    assert (plain / "metrics.jsonl").read_bytes() == (followed / "metrics.jsonl").read_bytes()
    one, other = (read_tensors(folder / "checkpoint.safetensors")[0] for folder in (plain, followed))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["made", "start", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    method: str, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calls, "fails_in", method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(played(tmp_path)) == 3
    said = [str(one.message) for one in caught if "tracking" in str(one.message)]
    assert len(said) == 1
    assert "noted is switched off" in said[0]
    assert "RuntimeError: the disk of the tracker is full" in said[0]
    assert sum(call[0] == method for call in calls) == 1, "nothing is called after the error"


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module, remedy in (
        ("tensorboard", "torch.utils.tensorboard", "pip install 'skymask-gpu[tracking]'"),
        ("wandb", "wandb", "pip install wandb"),
        ("mlflow", "mlflow.tracking", "pip install mlflow"),
    ):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        monkeypatch.setitem(__import__("sys").modules, module.partition(".")[0] + ".entities", None)
        with pytest.raises(ValueError, match=f"it needs the package {name}") as raised:
            export(TrackingConfig(tracker=name), {}, tmp_path, [])
        assert remedy in str(raised.value)


def test_a_plugin_brings_a_tracker_with_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from skymask_gpu.federation.tracking import TRACKERS, numbers\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Settings:\n"
        "    file: str = 'x.txt'\n"
        "@TRACKERS.register('mine', settings=Settings)\n"
        "class Mine:\n"
        "    def __init__(self, context, settings):\n"
        "        self.path = context.folder / settings.file\n"
        "    def start(self, settings):\n"
        "        self.path.write_text(settings['model']['name'])\n"
        "    def log(self, round, metrics):\n"
        "        self.path.write_text(self.path.read_text() + f' {round}:{numbers(metrics)[\"participants\"]:g}')\n"
        "    def finish(self):\n"
        "        self.path.write_text(self.path.read_text() + ' end')\n"
    )
    (tmp_path / "run.toml").write_text(
        'plugins = ["mine.py"]\nrounds = 2\n[data]\nclients = 10\nroot_samples = 20\n[defence]\nrule = "fedavg"\n'
        '[tracking]\ntracker = "mine"\nfile = "y.txt"\n'
    )
    (config,) = read_config(tmp_path / "run.toml")
    list(play(Federation.build(config), tmp_path / "out"))
    assert (tmp_path / "out" / "y.txt").read_text() == "mlp 0:10 1:10 end"
    TRACKERS.remove("mine")


def test_numbers_and_settings() -> None:
    metrics = {
        "round": 1,
        "accuracy": None,
        "kept": 3,
        "diverged": True,
        "reason": "x",
        "agreement": [0.1],
        "rejected": [],
        "seconds": {"a": {"b": 1}},
    }
    assert numbers(metrics) == {"kept": 3.0, "diverged": 1.0, "rejected": 0.0, "seconds/a/b": 1.0}
    assert tracking_for("wandb", {"tracking": {"tracker": "wandb", "project": "p"}}).settings.project == "p"
    assert tracking_for("wandb", {"tracking": {"tracker": "none"}}).settings.project == "skymask-gpu"
    with pytest.raises(ValueError, match=r"--to must be one of .*tensorboard.*did you mean 'tensorboard'"):
        tracking_for("tensorbord", {})
    with pytest.raises(ValueError, match="--to must be one of"):
        tracking_for("none", {})


# --- where the packages are installed ------------------------------------------------------------

RECORDS = [({"round": n, "accuracy": n / 10, "rejected": [1] * n}, {"round": n, "aggregation": 0.5}) for n in range(4)]


def test_tensorboard_has_each_round_once_and_an_export_replaces_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tracking is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tracker="tensorboard")
    from skymask_gpu.federation.tracking import followed

    for first in (0, 2):
        with followed(config, {"name": "a"}, tmp_path, RECORDS[:first]) as follow:
            for record, times in RECORDS[max(0, first - 1) : first + 2]:
                follow(record, times)
    for _ in range(2):
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        points = [(event.step, round(event.value, 6)) for event in events.Scalars("accuracy")]
        assert points == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
        assert [event.value for event in events.Scalars("seconds/aggregation")] == [0.5] * 4
        export(config, {"name": "a"}, tmp_path, RECORDS)
    assert json.loads((tmp_path / "tracking.json").read_text())["tensorboard"]["round"] == 3


@pytest.mark.slow
def test_mlflow_has_each_round_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    from skymask_gpu.federation.tracking import followed

    config = TrackingConfig(tracker="mlflow")
    for first in (0, 2):
        with followed(config, {"name": "a", "data": {"clients": 5}}, tmp_path, RECORDS[:first]) as follow:
            for record, times in RECORDS[max(0, first - 1) : first + 2]:
                follow(record, times)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("skymask-gpu")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"name": "a", "data.clients": "5"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert sorted((point.step, point.value) for point in history) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]


@pytest.mark.slow
def test_wandb_writes_offline_files_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(TrackingConfig(tracker="wandb"), {"name": "a"}, tmp_path, RECORDS)
    run_id = json.loads((tmp_path / "tracking.json").read_text())["wandb"]["id"]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{run_id}.wandb"
    # W&B writes in a process of its own, which may end a moment later.
    deadline = time.monotonic() + 30
    while b"accuracy" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert file.read_bytes().count(b"seconds/aggregation") >= len(RECORDS)
