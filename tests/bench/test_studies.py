"""The studies: what each command prints and writes, on a small scale."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.bench import solvers
from skymask_gpu.bench.studies import accuracy, costs, few_clients, large, many_clients, privacy, real_updates, sign_flips
from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import ClientBlocks, FlatModel
from skymask_gpu.engine.clustering import sampled
from skymask_gpu.report.summary import FinishedRun

SMALL_MODEL = solvers.make_model("logreg", (561,), 6, num_samples=20)


def test_clients_from_disk_are_judged_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert large.main([str(tmp_path), "--case", "lenet", "--clients", "30", "--compare"]) == 0
    printed = capsys.readouterr().out
    assert "0 labels wrong" in printed
    assert "auto: the updates are on disk" in printed
    assert '"labels_differ": 0' in printed
    (file,) = tmp_path.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    large.write_clients(tmp_path, large.CASES["lenet"], 30)
    assert file.stat().st_mtime_ns == before, "what is there is used again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_label_of_a_client_from_disk_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(sampled, "SAMPLED", 20)
    case = large.Case(lambda: SMALL_MODEL, 30, dtype)
    large.write_clients(tmp_path, case, 30)
    report = large.judge(tmp_path, case, 30, compare=True)
    assert report["wrong_labels"] == report["compared"]["labels_differ"] == 0
    assert "drawn from all" not in report["reason"]
    for clock in ("wall", "cpu"):
        assert report["ratio_to_passes"][clock] == report["seconds"][clock] / report["passes"][clock] > 0
    assert ClientBlocks.from_folder(tmp_path).dtype == dtype
    monkeypatch.setattr(sampled, "MOST_COMPARED", 29)
    monkeypatch.setattr(large, "is_malicious", lambda size: torch.arange(size) < size // 5 + 1)
    report = large.judge(tmp_path, case, 30)
    assert report["wrong_labels"] == 1
    assert report["reason"].endswith("among 20 clients drawn from all")


def test_the_cases_of_large_models_have_the_parameters_that_the_table_says() -> None:
    assert large.__doc__ is not None
    for name, case in large.CASES.items():
        module, inputs, labels = case.make()
        num_params = sum(param.numel() for param in module.parameters())
        sizes = large.file_sizes(case.clients, num_params)
        assert f"| {num_params:,} | {case.clients:,} |" in large.__doc__, name
        assert sum(sizes) == case.clients
        assert max(sizes) * num_params <= 2**27
        assert sum(int(large.is_malicious(size).sum()) for size in sizes) == case.clients // 5
        assert len(inputs) == len(labels)
    assert large.ViTSmall()(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


def test_a_row_of_the_accuracy_table_is_measured_and_drawn(tmp_path: Path) -> None:
    loss = FlatModel(*SMALL_MODEL)
    updates_RP = solvers.honest_rows(loss, 31, seed=0)
    direction_P = root_direction(loss, loss.initial_params, RootTraining(steps=3))
    (row,) = accuracy.measure_case(updates_RP, loss, "sign-flip", direction_P)
    assert row["float32"] <= accuracy.FLOOR
    assert set(row["bins"]) == set(accuracy.BINS)
    assert 0 < row["bins"][64] < row["bins"][8] < 0.1
    assert 0 < row["bfloat16"] < row["8_bit"] < 0.1
    assert row["mean_error"][64] < row["mean_error"][8]
    assert row["same_labels"]
    assert row["allowed"] >= 1e-4
    accuracy._plot([row], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy._table([row]).row_count == 1


def test_where_float32_is_not_stable_another_row_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = FlatModel(*SMALL_MODEL)
    updates_RP = solvers.honest_rows(loss, 11, seed=0)
    monkeypatch.setattr(accuracy, "float32_error", lambda updates, loss, steps: 1e-5 if steps <= 4 else 1e-3)
    rows = accuracy.measure_case(updates_RP, loss, "none", torch.zeros(loss.num_params))
    assert [(row["steps"], row["float32"]) for row in rows] == [(20, 1e-3), (4, 1e-5)]
    assert rows[1]["bins"][8] < rows[0]["bins"][8]


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


def test_rates_of_many_clients_are_printed(small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    problem = small.problem()
    monkeypatch.setattr(many_clients, "mnist_updates", lambda *_: (problem.updates, problem.model.loss))
    monkeypatch.setattr(many_clients, "CASES", ("none", "sign-flip"))
    monkeypatch.setattr(many_clients, "DIVISORS", (1, 1e9))
    assert many_clients.main(["--clients", "30"]) == 0
    printed = capsys.readouterr().out
    assert "none" in printed
    assert "0.00 / 1.00" in printed, "with a learning rate near 0 nobody is found"


def test_each_attack_changes_the_first_fifth_of_a_copy() -> None:
    updates_RP = torch.randn(21, 50, generator=torch.Generator().manual_seed(0))
    before = updates_RP.clone()
    for case in real_updates.CASES:
        changed_R = (real_updates.attacked(updates_RP, case) != updates_RP).any(1)
        assert changed_R.tolist() == [case != "none"] * 4 + [False] * 17, case
    assert torch.equal(updates_RP, before)


def test_few_clients_are_played_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(few_clients, "SIZES", (6,))
    monkeypatch.setattr(few_clients, "ROUNDS", 2)
    found = few_clients.play(("iid", 6, "sign-flip x 5", 0))
    assert found["cell"] == ["iid", 6, "sign-flip x 5", 0]
    assert found["honest_rejected"] == 0
    assert found["attacker_kept"] == 0
    # What the file holds is not played again, whatever it says.
    runs = [
        {"cell": [*cell, 0], "honest_rejected": 0.1, "attacker_kept": 0.2}
        for cell in product(few_clients.PARTITIONS, (6,), few_clients.ATTACKS)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert few_clients.main([str(tmp_path / "runs.jsonl"), "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("10.0%") == 8
    assert printed.count("20.0%") == 6


def test_the_memory_of_rounds_with_a_frozen_base_is_measured() -> None:
    """A small base says nothing about the ratio; tests/engine/test_frozen_bases.py has the large one.

    A process that has freed memory before would use it again, and the peak would show nothing.
    """
    study = [sys.executable, "-P", "-m", "skymask_gpu.bench.studies.frozen_base", "--width", "512", "--layers", "2"]
    lines = subprocess.run([*study, "--clients", "4"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].endswith("adapters: 8,192 parameters")
    assert lines[-1].startswith("ratio to base and pass: ")
    assert float(lines[-1].split()[-1]) > 0.5


def privacy_run(
    method: str, strength: float | None = None, attack: str = "none", rule: str = "skymask", rate: float = 0.0, **privacy: Any
) -> FinishedRun:
    """A run of two rounds, whose rates and accuracy follow from ``rate``."""
    table = {"obfuscation": method, "attackers_too": True, "root_too": True, **privacy}
    config = {
        "privacy": table if strength is None else {**table, "strength": strength},
        "attack": {"name": attack},
        "defence": {"rule": rule},
        "data": {"partition": "iid"},
    }
    rounds = [
        {"round": 0, "accuracy": None, "false_positive_rate": 0.0, "false_negative_rate": rate},
        {"round": 1, "accuracy": 1 - rate, "false_positive_rate": rate, "false_negative_rate": rate},
    ]
    return FinishedRun(config, Path("run"), rounds, [])


def test_accuracies_behind_obfuscation_are_means_over_seeds() -> None:
    runs = [privacy_run("none", rate=0.1), privacy_run("none", rate=0.2), privacy_run("mask", 0.9, rule="median", rate=0.5)]
    lines = privacy.tradeoff_table(runs).splitlines()
    assert lines[0] == "| data | obfuscation | skymask | median |"
    assert lines[2:] == ["| iid | none | 85.0 (10.0) | - |", "| iid | mask 0.9 | - | 50.0 (0.0) |"]


def test_who_is_rejected_behind_obfuscation_is_a_table_and_a_picture(tmp_path: Path) -> None:
    """Honest rejected in one of two rounds, attackers kept in both."""
    runs = [
        privacy_run("none"),
        privacy_run("none", None, "trim", rate=0.2),
        privacy_run("mask", 0.5, rate=0.4),
        privacy_run("mask", 0.5, "trim", rate=0.4, attackers_too=False),
        privacy_run("mask", 0.5, "trim", rate=1.0, root_too=False),
        *(privacy_run(method, 0.5, "trim") for method in ("mask", "clip", "prune", "noise")),
    ]
    lines = privacy.skymask_table(runs).splitlines()
    assert lines[0] == "| obfuscation | none | trim |"
    assert lines[2:6] == [
        "| none | 0 / - / 100.0 | 10 / 20 / 80.0 |",
        "| mask 0.5 | 20 / - / 60.0 | 0 / 0 / 100.0 |",
        "| mask 0.5, not the attackers | - | 20 / 40 / 60.0 |",
        "| mask 0.5, not the root | - | 50 / 100 / 0.0 |",
    ]
    columns = ("obfuscation", "strength", "attacker", "leaked")
    leaks = [
        dict(zip(columns, (method, strength, attacker, "0.5"), strict=True))
        for method, strength in (("none", "0.0"), ("mask", "0.5"), ("clip", "0.5"), ("prune", "0.5"), ("noise", "0.5"))
        for attacker in ("naive", "aware")
    ]
    unattacked = [privacy_run(method, 0.5) for method in ("clip", "prune", "noise")]
    privacy.draw([*runs, *unattacked], leaks, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_sign_flips_are_judged_by_each_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"TASKS": ("regression (MSE)",), "CLIPS": (0.01,), "SIZES": (10,), "WIDTHS": (16,), "SEEDS": 1}.items():
        monkeypatch.setattr(sign_flips, name, value)
    assert sign_flips.judged_exactly("classification", 0.01, 10, 16, 0)["signed"]
    assert sign_flips.main([]) == 0
    assert "0 of 1 (0.0%)" in capsys.readouterr().out
