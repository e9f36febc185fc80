"""Runs that start from a trained model, attackers that come late and leave, and what is recorded of it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.board.config import read_board
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig, read_config, read_grid
from skymask_gpu.federation.datasets import Dataset, load_dataset
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import CHECKPOINT, METRICS
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.io.files import read_tensors
from skymask_gpu.report.summary import FinishedRun
from skymask_gpu.report.sweep import Block
from skymask_gpu.report.tables import Cell, block_tables

SMALL = RunConfig(
    rounds=5,
    data=DataConfig(clients=10, root_samples=20),
    model=ModelConfig(name="logreg"),
    local=LocalTraining(steps=2, batch_size=8),
    attack=AttackConfig(name="scaling-backdoor", share=0.3, first_round=1, last_round=2),
    defence=DefenceConfig(rule="median"),
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None)


def played(config: RunConfig, digits: Dataset, folder: Path) -> list[dict[str, Any]]:
    return list(play(Federation.build(config, digits), folder))


def model_after(folder: Path) -> torch.Tensor:
    return read_tensors(folder / CHECKPOINT)[0]["global_params"]


def changed(**attack: Any) -> RunConfig:
    return dataclasses.replace(SMALL, attack=dataclasses.replace(SMALL.attack, **attack))


def test_attackers_are_honest_outside_of_their_rounds(digits: Dataset, tmp_path: Path) -> None:
    records = played(SMALL, digits, tmp_path / "window")
    assert [record["attacked"] for record in records] == [False, True, True, False, False]
    never = dataclasses.replace(SMALL, attack=AttackConfig())
    one = played(dataclasses.replace(never, rounds=1), digits, tmp_path / "honest")
    assert one[0]["accuracy"] == records[0]["accuracy"]
    # The attack comes in round 4, and the run is stopped before it.
    rounds = play(Federation.build(changed(first_round=4, last_round=-1), digits), tmp_path / "late")
    for _ in range(4):
        next(rounds)
    rounds.close()
    played(dataclasses.replace(never, rounds=4), digits, tmp_path / "never")
    assert torch.equal(model_after(tmp_path / "late"), model_after(tmp_path / "never"))
    assert not torch.equal(model_after(tmp_path / "window"), model_after(tmp_path / "never"))


def test_rates_know_who_attacks_in_a_round(digits: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, defence=DefenceConfig(rule="krum"))
    records = played(config, digits, tmp_path)
    for record in records:
        assert (record["false_negative_rate"] is None) == (not record["attacked"])
    # Krum keeps one client: of ten honest ones, nine are rejected wrongly
    assert records[0]["false_positive_rate"] == 0.9


def test_a_run_that_was_stopped_in_the_window_goes_on(digits: Dataset, tmp_path: Path) -> None:
    played(SMALL, digits, tmp_path / "whole")
    played(dataclasses.replace(SMALL, rounds=2), digits, tmp_path / "stopped")
    played(SMALL, digits, tmp_path / "stopped")
    assert (tmp_path / "whole" / METRICS).read_bytes() == (tmp_path / "stopped" / METRICS).read_bytes()


def test_a_run_starts_from_another_ones_model(digits: Dataset, tmp_path: Path) -> None:
    played(dataclasses.replace(SMALL, rounds=2), digits, tmp_path / "before")
    config = dataclasses.replace(SMALL, rounds=2, start=str(tmp_path / "before" / CHECKPOINT))
    federation = Federation.build(config, digits)
    assert torch.equal(federation.first_model().params, model_after(tmp_path / "before"))
    assert federation.first_model().previous is None
    fresh = dataclasses.replace(config, start="")
    assert not torch.equal(Federation.build(fresh, digits).first_model().params, federation.first_model().params)
    played(config, digits, tmp_path / "after")
    assert not torch.equal(model_after(tmp_path / "after"), model_after(tmp_path / "before"))
    other = dataclasses.replace(config, model=ModelConfig(name="mlp"))
    with pytest.raises(
        ValueError, match=r"start: global_params in .* must be float32 \(\d+,\), it is float32 \(650,\); give start"
    ):
        Federation.build(other, digits).first_model()
    with pytest.raises(ValueError, match=r"start: .*nowhere.*; give start the checkpoint\.safetensors of a run"):
        Federation.build(dataclasses.replace(config, start=str(tmp_path / "nowhere")), digits).first_model()


def test_start_is_relative_to_the_runs_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('start = "old/checkpoint.safetensors"\n')
    (run,) = read_config(tmp_path / "run.toml")
    assert run.start == str((tmp_path / "old" / "checkpoint.safetensors").resolve())
    (tmp_path / "grid.toml").write_text('[grid]\nstart = ["", "a.safetensors"]\n')
    assert [run.start for run in read_grid(tmp_path / "grid.toml")] == ["", str((tmp_path / "a.safetensors").resolve())]
    (tmp_path / "two.toml").write_text('[[variants]]\nname = "a"\nstart = "a.safetensors"\n[[variants]]\nname = "b"\n')
    assert [run.start for run in read_config(tmp_path / "two.toml")] == [str((tmp_path / "a.safetensors").resolve()), ""]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_round": -1}, r"attack\.first_round must be at least 0, the run's first round, got -1"),
        ({"first_round": 3, "last_round": 2}, r"attack\.last_round must be at least attack\.first_round = 3, or -1 .*, got 2"),
        ({"last_round": -2}, r"attack\.last_round must be .*, got -2"),
    ],
)
def test_windows_that_are_none_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**{"last_round": -1, **settings})


def test_an_attack_that_would_never_strike_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attack\.first_round must be below rounds = 5, .*, got 5; take an earlier"):
        changed(first_round=5, last_round=-1)
    assert changed(first_round=4, last_round=-1).attack.strikes_in(4)
    # Without attackers, there is nothing that could be missed.
    dataclasses.replace(SMALL, attack=AttackConfig(first_round=9))


def test_on_a_board_an_attack_strikes_in_the_rounds_of_the_board(tmp_path: Path) -> None:
    text = """
rounds = [1]
[data]
clients = 10
[[recipes]]
name = "few"
[[attacks]]
name = "trim"
first_round = 7
"""
    (tmp_path / "board.toml").write_text(text)
    board = read_board(tmp_path / "board.toml")
    for key in board.set_keys():
        assert board.run_of(key).attack.strikes_in(key.round)


def test_class_accuracies_make_up_the_accuracy(digits: Dataset, tmp_path: Path) -> None:
    record, _ = played(dataclasses.replace(SMALL, rounds=2), digits, tmp_path)
    shares = record["class_accuracy"]
    counts = torch.bincount(digits.test_labels, minlength=10).tolist()
    weighted = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
    assert weighted == pytest.approx(record["accuracy"], abs=1e-4)
    assert len(set(shares)) > 3
    absent = dataclasses.replace(digits, test_inputs=digits.test_inputs[digits.test_labels > 0])
    absent = dataclasses.replace(absent, test_labels=digits.test_labels[digits.test_labels > 0])
    federation = Federation.build(SMALL, absent)
    assert federation.accuracies(federation.first_model())[1][0] is None


def test_the_report_has_tables_of_the_worst_class_and_of_lifespans() -> None:
    """The last tested round counts; a class without test samples does not."""

    def run(seed: int, worst: float, alive: float) -> FinishedRun:
        records = [
            {"round": 0, "accuracy": 0.9, "attacked": True, "attack_success_rate": 1.0, "class_accuracy": [0.1, 0.2]},
            {
                "round": 1,
                "accuracy": 0.9,
                "attacked": False,
                "attack_success_rate": alive,
                "class_accuracy": [None, worst, 0.95],
            },
            {"round": 2, "accuracy": None, "attacked": False, "attack_success_rate": None, "class_accuracy": None},
        ]
        return FinishedRun({"seed": seed}, Path("runs/mine"), records, [])

    block = Block({}, {}, {("dba", "median"): [run(0, 0.5, 0.9), run(1, 0.7, 0.1)]})
    tables = {table.caption: table.rows for table in block_tables(block)}
    (worst,) = [rows for caption, rows in tables.items() if caption.startswith("Accuracy of the worst class")]
    assert worst == [("dba", [Cell("60.0 ± 14.1")])]
    (spans,) = [rows for caption, rows in tables.items() if "outlives" in caption]
    assert spans == [("dba", [Cell("0.5")])]


@pytest.mark.parametrize(
    ("successes", "span"),
    [
        ([0.9, 0.8, 0.6, 0.4, 0.3], 2),
        ([0.9, 0.4, 0.4, 0.4, 0.5], 4),
        ([0.9, 0.1, None, 0.2, None], 0),
        ([0.9] + [None] * 4, None),
    ],
)
def test_the_lifespan_counts_from_the_last_attacked_round(successes: list[float | None], span: int | None) -> None:
    records = [
        {"round": number, "attacked": number < 3, "attack_success_rate": rate}
        for number, rate in enumerate([None, None, *successes])
    ]
    assert FinishedRun({}, Path("runs/mine"), records, []).lifespan == span
    still = [{**record, "attacked": True} for record in records]
    assert FinishedRun({}, Path("runs/mine"), still, []).lifespan is None


def test_the_example_of_a_checkpoint_of_an_older_version_is_still_read(digits: Dataset, tmp_path: Path) -> None:
    """Its settings know neither start nor a window."""
    config = dataclasses.replace(changed(first_round=0, last_round=-1), rounds=1)
    played(config, digits, tmp_path)
    text = (tmp_path / CHECKPOINT).read_bytes()
    assert not re.search(rb"first_round|\\\"start", text)
    assert len(played(dataclasses.replace(config, rounds=2), digits, tmp_path)) == 1
