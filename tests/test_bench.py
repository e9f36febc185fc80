"""The benchmark refuses a time to a solver that is wrong, and measures what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.bench import solvers
from skymask_gpu.bench.measure import measure


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
