"""The benchmark of a GPU, played on a CPU: what is wrong gets no time, and an interrupted run goes on."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skymask_gpu.bench import gpu, gpu_bins, gpu_figures, run
from skymask_gpu.bench.cases import CASES
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.providers import Truth
from skymask_gpu.bench.table import CannotRunError, Row, WrongResultError, read_rows, write_rows
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.federation.rules import RuleResult
from skymask_gpu.kernels import bins as kernels

CPU = torch.device("cpu")
LOGREG = CASES["logreg"]


@pytest.fixture(autouse=True)
def few(few_repeats: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short copy, few clients, no compiling."""
    honest = gpu_figures.figures
    chosen = [figure for figure in honest(LOGREG) if figure.name != gpu_figures.COMPILED]
    monkeypatch.setattr(gpu_figures, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(gpu_figures, "FEW_CLIENTS", 10)
    monkeypatch.setattr(gpu, "figures", lambda case: chosen)
    monkeypatch.setattr(gpu, "MODELS", ("logreg",))
    # Fewer clients would have two or three attackers, whose copies are too few to be told as a group.
    monkeypatch.setattr(gpu, "CLIENTS", (20, 500))
    yield
    gpu_figures._wrong_when_captured.cache_clear()


def measured() -> dict[str, Row]:
    limits = Limits((20,), ("logreg",), repeat_seconds=0.0, side_by_side=False)
    return {row.provider: row for row in run.Runner(limits, CPU, gpu.figures).point(LOGREG, 20, "float32")}


def test_all_figures_have_times_and_ratios(tmp_path: Path) -> None:
    rows = measured()
    assert [*rows] == [figure.name for figure in gpu.figures(LOGREG)]
    untimed = {"reference", "bin_edges in Triton", "bin_rows in Triton"}
    assert {name for name, row in rows.items() if row.status != "ok"} == untimed, [row.detail for row in rows.values()]
    write_rows(tmp_path / "x.csv", list(rows.values()))
    copy, step = rows["copy"], rows["next_step"]
    assert step.moved_bytes == 12 * 21 * 3372
    assert step.of_copy == pytest.approx(step.moved_bytes / step.median_s / (2 * 2**20 / copy.median_s))
    assert rows["collapsed"].to_mean > 1
    assert rows["fused"].to_passes > 1
    assert all(row.p20_s <= row.median_s <= row.p80_s for row in rows.values() if row.status == "ok")


def test_one_row_is_timed_with_tf32_but_checked_without(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner switches TF32 off around every check and every time."""
    honest, seen = gpu_figures.loss_and_gradient, []

    def noting(*arguments: Any) -> Any:
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return honest(*arguments)

    monkeypatch.setattr(gpu_figures, "loss_and_gradient", noting)
    (figure,) = [figure for figure in gpu.figures(LOGREG) if figure.timed is gpu_figures._passes_in_tf32]
    with without_tf32():
        figure.prepare(small.problem())()
        assert set(seen) == {"ieee"}
        seen.clear()
        figure.timed(small.problem())()
        assert set(seen) == {"tf32"}
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_a_wrong_solver_gets_no_time(sloppy: Callable[..., None]) -> None:
    sloppy("fused")
    rows = measured()
    assert rows["fused"].median_s is None
    assert (rows["fused"].status, rows["fused"].detail) == ("wrong", "1.2e-03 of the bits differ")
    assert rows["collapsed"].status == "ok"


def test_captured_steps_that_differ_from_launched_ones_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_figures.train_masks
    calls: list[int] = []

    def first_wrong(*arguments: Any, **settings: Any) -> Any:
        masks = honest(*arguments, **settings)
        calls.append(1)
        return replace(masks, losses=[1.01 * x for x in masks.losses]) if len(calls) == 1 else masks

    monkeypatch.setattr(gpu_figures, "train_masks", first_wrong)
    row = measured()["fused"]
    assert row.status == "wrong"
    assert row.detail.startswith("captured and launched at N = 10: losses differ")


@pytest.mark.parametrize("off", [0, 1, 2], ids=["logits", "gate_sum", "weighted_sum"])
def test_a_wrong_step_on_all_rows_is_found(off: int, small: Any) -> None:
    problem = small.problem()
    result = list(gpu_figures._next_step(problem)())
    gpu_figures._check_next_step(problem, tuple(result), Truth())
    result[off] = 1.001 * result[off]
    with pytest.raises(WrongResultError, match=r"(sum|logits) off by"):
        gpu_figures._check_next_step(problem, tuple(result), Truth())


def figure(name: str) -> Any:
    return next(one for one in gpu.figures(LOGREG) if one.name == name)


@pytest.mark.parametrize("off", [0, 1, 2, 3], ids=["counts", "sums", "squares", "ends"])
def test_wrong_bins_are_found(off: int, small: Any) -> None:
    problem, rows = small.problem(), figure("bin_rows")
    edges_EP, bins = rows.prepare(problem)()
    assert rows.check(problem, (edges_EP, bins), Truth()) == "its twin in float64"
    wrong = list(bins)
    wrong[off] = 1.001 * bins[off].float()
    with pytest.raises(WrongResultError, match=r"(counts|sums|squares|ends) off by"):
        rows.check(problem, (edges_EP, wrong), Truth())


def test_wrong_edges_are_found(small: Any) -> None:
    problem, edges = small.problem(), figure("bin_edges")
    edges_EP = edges.prepare(problem)()
    assert edges.check(problem, edges_EP, Truth()) == "its twin in float64"
    with pytest.raises(WrongResultError, match="edges off by"):
        edges.check(problem, 1.001 * edges_EP, Truth())


def test_bins_are_timed_without_making_them_empty(small: Any) -> None:
    problem, rows = small.problem(), figure("bin_rows")
    call = rows.timed(problem)
    calls = [cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, tuple)]
    (counts_BP, *_) = calls[0]
    for times in (1, 2):
        call()
        assert (counts_BP.int().sum(0) == times * len(problem.updates)).all()


def test_a_fall_back_to_triton_is_no_time_of_the_kernel(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from skymask_gpu.kernels.bins import cuda

    problem, edges = small.problem(), figure("bin_edges")
    edges_EP = edges.prepare(problem)()
    monkeypatch.setattr(gpu_bins, "_on_gpu", lambda problem: True)
    monkeypatch.setattr(cuda, "why_triton", lambda device: "NVRTC is not there")
    with pytest.raises(CannotRunError, match="Triton ran instead: NVRTC is not there"):
        edges.check(problem, edges_EP, Truth())


@pytest.mark.parametrize("off", [0, 1, 3], ids=["counts", "sums", "ends"])
def test_bins_that_are_not_those_of_triton_are_found(off: int, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU both run. Here both are Numba's, and one of them is off in one bin, the sums and ends in the last bit only."""
    problem = small.problem()
    edges_EP, bins = figure("bin_rows").prepare(problem)()

    def of_triton(rows: Any, edges: Any, *into: torch.Tensor) -> None:
        kernels.bin_rows(rows, edges, *into)
        one = into[off].int() + 1 if off == 0 else into[off].nextafter(torch.tensor(torch.inf))
        into[off][-1] = one[-1] if change else into[off][-1]

    monkeypatch.setattr(gpu_bins, "_triton", lambda problem: SimpleNamespace(bin_rows=of_triton))
    monkeypatch.setattr(gpu_bins, "_on_gpu", lambda problem: True)
    change = False
    compared_with = gpu_bins._check_rows(problem, (edges_EP, bins), Truth())
    assert compared_with == "its twin in float64, Triton to the bit but for the squares"
    change = True
    with pytest.raises(WrongResultError, match="are not those of Triton to the bit"):
        gpu_bins._check_rows(problem, (edges_EP, bins), Truth())


def test_a_wrong_average_or_label_is_found(small: Any) -> None:
    problem = small.problem()
    result, masks, alignment_N = gpu_figures._judging(problem)()
    truth = Truth(masks, "fused")

    def check(result: RuleResult) -> str:
        return gpu_figures._check_judging(problem, (result, masks, alignment_N), truth)

    assert check(result) == "NumPy's mean, 500 columns, a CPU's labels up to N = 500"
    with pytest.raises(WrongResultError, match="the update is off"):
        check(replace(result, update=1.01 * result.update))
    with pytest.raises(WrongResultError, match="labels differ from those of the CPU"):
        check(replace(result, kept=~result.kept))


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command with a GPU that is a CPU, its points in this process, a copy and a mean instead of all figures."""
    monkeypatch.setattr(gpu, "_gpu", lambda: (CPU, "NVIDIA Test 1"))
    figures = gpu.figures(LOGREG)[:2]
    monkeypatch.setattr(gpu, "figures", lambda case: figures)
    monkeypatch.setattr(gpu, "KERNEL_TESTS", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()

    honest = subprocess.run

    def run_here(command: list[str], **settings: Any) -> subprocess.CompletedProcess:
        if command[:4] != [sys.executable, "-P", "-m", "skymask_gpu.bench.gpu"]:
            return honest(command, **settings)
        return subprocess.CompletedProcess(command, gpu.main(command[4:]))

    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(gpu, "conditions", lambda device: {"device": "NVIDIA Test 1"})
    monkeypatch.setattr("skymask_gpu.bench.run.conditions", lambda device: {"device": "NVIDIA Test 1"})
    return lambda *arguments: gpu.main(["--out", str(tmp_path), *arguments])


def test_without_a_gpu_or_a_checkout_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "no CUDA GPU is present: nothing is measured\n"
    monkeypatch.setattr(gpu, "_gpu", lambda: (CPU, "NVIDIA Test 1"))
    monkeypatch.setattr(gpu, "KERNEL_TESTS", tmp_path / "kernels")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    needed = f"the kernels are checked by {tmp_path}/kernels: this needs a checkout, and in it pip install -e '.[test]'\n"
    assert capsys.readouterr().out == needed
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, played: Callable[..., int]) -> None:
    (tmp_path / "kernels" / "test_step.py").write_text("def test_it() -> None: pass")
    path = tmp_path / "test-1.csv"
    assert played("--seconds", "-1") == 3
    assert [(row.provider, row.status) for row in read_rows(path)] == [("test_step", "ok")]
    assert played() == 0
    rows = {(row.clients, row.provider): row for row in read_rows(path)}
    names = [figure.name for figure in gpu.figures(LOGREG)]
    assert set(rows) == {(0, "test_step"), *((n, name) for n in (20, 500) for name in names)}
    assert rows[20, "copy"].to_500 == rows[20, "copy"].median_s / rows[500, "copy"].median_s
    # stopped within the second point: its rows are measured again, the first point's stay
    write_rows(path, [row for key, row in rows.items() if key != (500, names[-1])])
    assert played() == 0
    again = {(row.clients, row.provider): row for row in read_rows(path)}
    assert set(again) == set(rows)
    assert again[20, "copy"].median_s == rows[20, "copy"].median_s
    assert again[500, "copy"].median_s != rows[500, "copy"].median_s


def test_a_wrong_kernel_is_a_row_and_the_rest_goes_on(tmp_path: Path, played: Callable[..., int]) -> None:
    (tmp_path / "kernels" / "test_step.py").write_text("def test_it() -> None: pass")
    (tmp_path / "kernels" / "test_mean.py").write_text("def test_it() -> None:\n    assert 'off' == 'by one'")
    (tmp_path / "kernels" / "test_tree.py").write_text("import no_such_module")
    assert played() == 1
    rows = {row.provider: row for row in read_rows(tmp_path / "test-1.csv")}
    assert (rows["test_mean"].case, rows["test_mean"].status) == ("kernels", "wrong")
    assert re.match(r"1 failed in .*; FAILED test_mean.py::test_it - AssertionError", rows["test_mean"].detail)
    assert (rows["test_tree"].status, rows["test_step"].status) == ("failed", "ok")
    assert "1 error in" in rows["test_tree"].detail
    assert rows["test_step"].compared_with.startswith("its tests: 1 passed")
    assert (rows["copy"].status, rows["copy"].detail) == ("ok", "")


def test_a_process_that_ends_early_is_a_row_until_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: Callable[..., int]
) -> None:
    with monkeypatch.context() as patched:
        ended = lambda command, **_: subprocess.CompletedProcess(command, -11 if "logreg-20" in command else 0)  # noqa: E731
        patched.setattr(subprocess, "run", ended)
        assert played() == 1
    (row,) = read_rows(tmp_path / "test-1.csv")
    assert (row.case, row.clients, row.provider, row.status) == ("logreg", 20, "process", "failed")
    assert row.detail == "its process ended with exit code -11: start again"
    assert played() == 0
