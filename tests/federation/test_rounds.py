"""Runs: what they record, that they resume, and that SkyMask is right on real images."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from skymask_gpu.federation.config import AttackConfig, DataConfig, DefenceConfig, ModelConfig, RunConfig
from skymask_gpu.federation.local_training import LocalTraining
from skymask_gpu.federation.rounds import CHECKPOINT, MASKS, METRICS, Federation, clear_results, has_results, run_rounds
from skymask_gpu.files import append_line, read_lines, read_tensors, write_whole

SMALL = RunConfig(
    rounds=4,
    data=DataConfig(clients=20, root_samples=50),
    local=LocalTraining(steps=5, batch_size=16),
    attack=AttackConfig(name="min-max", malicious=4),
)


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "phases")} for record in records]


def test_a_run_records_every_round(tmp_path: Path) -> None:
    records = list(run_rounds(Federation.build(SMALL), tmp_path))
    assert read_lines(tmp_path / METRICS) == records
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert record["false_positive_rate"] == len([c for c in record["rejected"] if c >= 4]) / 16
        assert record["false_negative_rate"] == 1 - len([c for c in record["rejected"] if c < 4]) / 4
        assert record["kept"] == 20 - len(record["rejected"])
        assert 0 <= record["accuracy"] <= 1
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT)
    assert metadata["round"] == "3"
    assert tensors["global_params"].shape == (4810,)
    scores = read_tensors(tmp_path / MASKS)[0]
    assert scores["scores"].shape == (21, 2)
    assert scores["malicious"].sum() == 4


def test_a_run_repeats_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = list(run_rounds(Federation.build(SMALL), tmp_path / "whole"))
    stopped = run_rounds(Federation.build(SMALL), tmp_path / "stopped")
    next(stopped), next(stopped)
    stopped.close()
    # the power went out after the line of round 2 and in the middle of that of round 3, before their checkpoint
    with (tmp_path / "stopped" / METRICS).open("a") as file:
        file.write(json.dumps({"round": 2}) + '\n{"round": 3, "accu')
    rest = list(run_rounds(Federation.build(SMALL), tmp_path / "stopped"))
    assert [record["round"] for record in rest] == [2, 3]
    assert without_times(read_lines(tmp_path / "stopped" / METRICS)) == without_times(whole)
    a, b = (read_tensors(tmp_path / run / CHECKPOINT)[0]["global_params"] for run in ("whole", "stopped"))
    assert torch.equal(a, b)


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    list(run_rounds(Federation.build(dataclasses.replace(SMALL, rounds=1)), tmp_path))
    other = dataclasses.replace(SMALL, seed=7, defence=DefenceConfig(rule="fedavg"))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed, defence\)"):
        list(run_rounds(Federation.build(other), tmp_path))
    # more rounds are the same run
    assert len(list(run_rounds(Federation.build(SMALL), tmp_path))) == 3


def test_a_checkpoint_without_its_metrics_is_refused_and_clearing_removes_results_only(tmp_path: Path) -> None:
    list(run_rounds(Federation.build(dataclasses.replace(SMALL, rounds=1)), tmp_path))
    (tmp_path / METRICS).unlink()
    assert has_results(tmp_path)
    with pytest.raises(ValueError, match="lacks rounds that"):
        list(run_rounds(Federation.build(SMALL), tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    clear_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert not has_results(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_appended_a_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    for number in range(3):
        append_line(path, {"round": number})
    assert path.read_text() == '{"round": 0}\n{"round": 1}\n{"round": 2}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        append_line(path, {"accuracy": float("nan")})
    assert len(read_lines(path)) == 3


def mnist_run(mnist_dir: Path, malicious: int, rounds: int, steps: int) -> RunConfig:
    return RunConfig(
        rounds=rounds,
        data=DataConfig(dataset="mnist", data_dir=str(mnist_dir), clients=100, bias=0.5),
        model=ModelConfig(name="cnn"),
        local=LocalTraining(steps=steps),
        attack=AttackConfig(name="min-max" if malicious else "none", malicious=malicious),
        defence=DefenceConfig(rule="skymask"),
    )


def check_verdicts(records: list[dict], malicious: int) -> None:
    for record in records:
        if malicious == 0:
            assert record["false_positive_rate"] <= 0.01, record
        elif record["round"] >= 1:
            assert (record["false_positive_rate"], record["false_negative_rate"]) == (0, 0), record


@pytest.mark.parametrize("malicious", [20, 0], ids=["min-max", "no-attack"])
def test_skymask_on_mnist_is_exact(malicious: int, mnist_dir: Path, tmp_path: Path) -> None:
    """The paper's CNN, 100 clients, bias 0.5: the first two rounds, with short local training."""
    config = mnist_run(mnist_dir, malicious, rounds=2, steps=5)
    check_verdicts(list(run_rounds(Federation.build(config), tmp_path)), malicious)


@pytest.mark.slow
@pytest.mark.parametrize("malicious", [20, 0], ids=["min-max", "no-attack"])
def test_skymask_on_mnist_stays_exact(malicious: int, mnist_dir: Path, tmp_path: Path) -> None:
    """Ten rounds of ten local steps."""
    config = mnist_run(mnist_dir, malicious, rounds=10, steps=10)
    records = list(run_rounds(Federation.build(config), tmp_path))
    for record in records:
        print({k: record[k] for k in ("round", "accuracy", "false_positive_rate", "false_negative_rate")})
    check_verdicts(records, malicious)
