"""The benchmark refuses a time to a solver that is wrong, and measures what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.bench import accuracy, costs, large, many_clients, solvers
from skymask_gpu.bench.measure import measure
from skymask_gpu.engine import FlatModel
from skymask_gpu.root import RootTraining, root_direction


def test_agreeing_solvers_get_times_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert solvers.main(["--clients", "20", "--repeats", "1", "--out", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert set(report["figures"]) == {"mean of the rows (FedAvg)", "20 model passes", "reference", "vmap", "fused", "collapsed"}
    assert report["wrong"] == {}
    assert "fused" in capsys.readouterr().out


def test_a_wrong_solver_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit in a thousand flipped."""
    honest = solvers.train_masks

    def sloppy(*arguments: Any, solver: str, **settings: Any) -> Any:
        masks = honest(*arguments, solver=solver, **settings)
        if solver == "fused":
            masks.bits[:, ::125] ^= 1
        return masks

    monkeypatch.setattr(solvers, "train_masks", sloppy)
    assert solvers.main(["--clients", "20", "--repeats", "1", "--out", str(tmp_path / "figures.json")]) == 1
    report = json.loads((tmp_path / "figures.json").read_text())
    assert "fused" not in report["figures"]
    assert report["wrong"]["fused"] == "1.0e-03 of the bits differ"


def test_a_solver_that_cannot_run_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "why_not_solver", lambda solver, *_: None if solver == "reference" else "no kernels here")
    assert solvers.main(["--clients", "10", "--repeats", "1", "--out", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert set(report["not_run"]) == {"vmap", "fused", "collapsed"}
    assert "reference" in report["figures"]
    assert "fused" not in report["figures"]


def test_peak_memory_is_what_a_call_takes_beyond_what_was_held() -> None:
    held = torch.ones(8 * 2**20)
    result, measured = measure(lambda: torch.ones(16 * 2**20).sum() + held.sum(), 2, torch.device("cpu"))
    assert result == 24 * 2**20
    assert len(measured.seconds) == 2
    if measured.peak_bytes is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 60 * 2**20 < measured.peak_bytes < 100 * 2**20


def test_clients_from_disk_are_judged_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert large.main([str(tmp_path), "--clients", "30"]) == 0
    printed = capsys.readouterr().out
    assert "0 labels wrong" in printed
    assert "auto: the updates are on disk" in printed
    (file,) = tmp_path.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    large.write_clients(tmp_path, 30)
    assert file.stat().st_mtime_ns == before, "what is there is used again"


def test_a_wrong_label_of_a_client_from_disk_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large.write_clients(tmp_path, 30)
    monkeypatch.setattr(large, "is_malicious", lambda size: torch.arange(size) < size // 5 + 1)
    assert large.judge(tmp_path, 30)["wrong_labels"] == 1


def test_a_row_of_the_accuracy_table_is_measured_and_drawn(tmp_path: Path) -> None:
    loss = FlatModel(*solvers.make_model())
    updates_RP = solvers.honest_rows(loss, 31, seed=0)
    direction_P = root_direction(loss, loss.initial_params, RootTraining(steps=3))
    row = accuracy.measure_case(updates_RP, loss, "sign-flip", direction_P)
    assert set(row["bins"]) == set(accuracy.BINS)
    assert 0 < row["bins"][64] < row["bins"][8] < 0.1
    assert 0 < row["bfloat16"] < row["8_bit"] < 0.1
    assert row["mean_error"][64] < row["mean_error"][8]
    assert row["same_labels"]
    assert row["allowed"] >= 1e-4
    accuracy._plot([row], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy._table([row]).row_count == 1


def test_8_bits_keep_each_blocks_largest_value() -> None:
    updates_RP = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    rounded_RP = accuracy.in_8_bits(updates_RP)
    for part, rounded in zip(updates_RP.split(128, 1), rounded_RP.split(128, 1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        torch.testing.assert_close(rounded.abs().amax(1, keepdim=True), largest)
        assert ((rounded - part).abs() <= largest / 254 * 1.001).all()


def test_costs_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(costs, "NUM_PARAMS", 2000)
    assert costs.main() == 0
    assert capsys.readouterr().out.count("ns a column") == 4


def test_rates_of_many_clients_are_printed(
    mnist_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(many_clients, "CASES", ("none", "lie"))
    monkeypatch.setattr(many_clients, "DIVISORS", (1, 1000))
    assert many_clients.main(["--data-dir", str(mnist_dir), "--clients", "30"]) == 0
    printed = capsys.readouterr().out
    assert "none" in printed
    assert "0.00 / 1.00" in printed, "a thousandth of the learning rate finds nobody"
