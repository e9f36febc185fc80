"""The benchmark of a GPU, played on a CPU: what is wrong gets no time, and an interrupted run goes on."""

import importlib
import pkgutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from skymask_gpu import kernels
from skymask_gpu.bench import gpu, kernel_checks, providers
from skymask_gpu.bench.cases import CASES, Model, Problem
from skymask_gpu.bench.measure import Measured
from skymask_gpu.kernels import bins, cuts, hamming, mask_step, mean, mixture, tree

CPU = torch.device("cpu")
NAME = "NVIDIA Test 1"
FLOORS = {gpu.COPY, gpu.MEAN, gpu.CAPTURED}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small model, few clients, a short copy, one repeat, no compiling."""
    monkeypatch.setattr(gpu, "MODELS", ("logreg",))
    monkeypatch.setattr(gpu, "CLIENTS", (12, 500))
    monkeypatch.setattr(gpu, "_COPIED_BYTES", 2**20)
    monkeypatch.setattr(gpu, "_VERIFIED_CLIENTS", 10)
    monkeypatch.setattr(gpu, "measure_steadily", once)
    monkeypatch.setattr(gpu, "FIGURES", [figure for figure in gpu.FIGURES if figure.name != gpu.COMPILED])
    monkeypatch.setattr(gpu, "wrong_kernels", lambda device: iter([("next_step", None)]))


def once(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, Measured]:
    taken = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        taken[name] = Measured([time.perf_counter() - start], None)
    return taken


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_gpu", lambda: (CPU, NAME))


def make_problem(num_clients: int = 12) -> tuple[Problem, str | None]:
    model, agreed = Model.build(CASES["logreg"], CPU), {}
    wrong = gpu.verify_solvers(model, CASES["logreg"], agreed)
    return gpu.make_problem(model, CASES["logreg"], num_clients, agreed), wrong


# --- kernels ------------------------------------------------------------------------------------------------------------


def test_every_kernel_with_a_twin_is_checked() -> None:
    modules = [importlib.import_module(f"skymask_gpu.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    twins = {name for module in modules for name in getattr(module, "__all__", ()) if name.endswith("_reference")}
    missing = {twin.removesuffix("_reference") for twin in twins} - set(kernel_checks.CHECKS)
    assert not missing, f"add to CHECKS in bench/kernel_checks.py: {missing}"


def spoilt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What the kernel returns, or else the last tensor that it writes, is off by a little in its first column or byte."""

    def spoil(tensor: Tensor) -> Tensor:
        first = tensor.flatten() if tensor.is_contiguous() else tensor[0]
        if not tensor.is_floating_point():
            first[: max(1, len(first) // 100)] += 1
        else:
            first[: max(1, len(first) // 100)] *= 1.01
        return tensor

    def run(*arguments: Any, **settings: Any) -> Any:
        result = kernel(*arguments, **settings)
        if result is None:
            spoil(arguments[-1])
            return None
        return (*result[:-1], spoil(result[-1])) if isinstance(result, tuple) else spoil(result)

    return run


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in (
        (mask_step, ["first_step", "next_step", "last_step"]),
        (bins, ["bin_edges", "bin_rows", "bin_step"]),
        (cuts, ["replay", "find_cuts", "cut_bits"]),
        (hamming, ["hamming_counts"]),
        (mean, ["chosen_mean"]),
        (mixture, ["two_normals", "gaussian_mixture"]),
        (tree, ["path_maxima"]),
    ) for name in names],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_a_wrong_kernel_is_found(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "_SIZES", ((9, 1031),))
    assert [next(filter(None, map(kernel_checks.CHECKS[name], kernel_checks._rows(CPU))), None)] == [None]
    monkeypatch.setattr(module, name, spoilt(getattr(module, name)))
    assert next(filter(None, map(kernel_checks.CHECKS[name], kernel_checks._rows(CPU))), None) is not None


def test_with_a_wrong_kernel_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "wrong_kernels", lambda device: iter([("replay", "logits are off")]))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "replay: logits are off" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# --- figures ------------------------------------------------------------------------------------------------------------


def test_all_figures_have_times_and_ratios() -> None:
    problem, wrong = make_problem()
    assert wrong is None
    rows = {row.figure: row for row in gpu.measure_point(problem, wrong)}
    assert [*rows] == [figure.name for figure in gpu.FIGURES]
    assert {row.status for row in rows.values()} == {"ok"}, [row.detail for row in rows.values()]
    mean, passes, copy, step = (rows[name] for name in (gpu.MEAN, gpu.CAPTURED, gpu.COPY, "next_step"))
    assert step.moved_bytes == 12 * 13 * 3372
    assert step.of_copy == pytest.approx(step.moved_bytes / step.median_s / (2 * 2**20 / copy.median_s))
    assert rows["collapsed"].to_mean == rows["collapsed"].median_s / mean.median_s
    assert rows["fused"].to_passes == rows["fused"].median_s / passes.median_s
    assert all(row.p20_s <= row.median_s <= row.p80_s for row in rows.values())


def test_tf32_is_off_in_every_check_and_on_in_one_timed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's default is on for convolutions, where a check for float32 would fail."""
    convolutions, checked, timed = torch.backends.cudnn.conv, [], {}
    assert convolutions.fp32_precision == "tf32"
    honest_measure, honest_train = gpu.measure_steadily, providers.train_masks

    def noting_measure(calls: dict[str, Callable[[], object]], *rest: Any) -> Any:
        timed.update(dict.fromkeys(calls, convolutions.fp32_precision))
        return honest_measure(calls, *rest)

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            checked.append(convolutions.fp32_precision)
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(gpu, "measure_steadily", noting_measure)
    monkeypatch.setattr(providers, "train_masks", noting(honest_train))
    figures = [
        replace(figure, provider=replace(figure.provider, check=noting(figure.provider.check))) for figure in gpu.FIGURES
    ]
    monkeypatch.setattr(gpu, "FIGURES", figures)
    problem, wrong = make_problem()
    rows = list(gpu.measure_point(problem, wrong))
    assert len(checked) > len(figures)
    assert set(checked) == {"ieee"}
    assert timed == {figure.name: "tf32" if figure.name == gpu.CAPTURED_TF32 else "ieee" for figure in figures}
    assert {row.figure for row in rows if row.tf32 == "on"} == {gpu.CAPTURED_TF32}
    assert convolutions.fp32_precision == "tf32"


def test_updates_are_the_same_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = make_problem(20)
    malicious, honest = problem.updates[:4], problem.updates[4:-1]
    assert (malicious == malicious[0]).all()
    assert honest.unique(dim=0).shape == honest.shape
    assert honest.isfinite().all()


def test_a_wrong_solver_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = providers.train_masks

    def sloppy(*arguments: Any, solver: str, **settings: Any) -> Any:
        masks = honest(*arguments, solver=solver, **settings)
        if solver == "fused":
            masks.bits[:, ::125] ^= 1
        return masks

    monkeypatch.setattr(providers, "train_masks", sloppy)
    problem, wrong = make_problem()
    assert wrong == "fused: 1.2e-03 of the bits differ"
    rows = {row.figure: row for row in gpu.measure_point(problem, wrong)}
    assert {name for name, row in rows.items() if row.status == "ok"} == FLOORS
    assert rows["fused"].detail == wrong
    assert rows["fused"].median_s is None


def test_a_solver_that_is_wrong_with_many_clients_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, wrong = make_problem()
    assert wrong is None
    honest = providers.train_masks

    def sloppy(*arguments: Any, solver: str, **settings: Any) -> Any:
        masks = honest(*arguments, solver=solver, **settings)
        return replace(masks, bits=masks.bits ^ 1) if solver == "collapsed" else masks

    monkeypatch.setattr(providers, "train_masks", sloppy)
    rows = {row.figure: row for row in gpu.measure_point(problem, None)}
    assert (rows["collapsed"].status, rows["collapsed"].median_s) == ("wrong", None)
    assert "of the bits differ" in rows["collapsed"].detail
    assert rows["fused"].status == "ok"


def test_captured_steps_that_differ_from_launched_ones_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu.train_masks
    calls: list[int] = []

    def first_wrong(*arguments: Any, **settings: Any) -> Any:
        masks = honest(*arguments, **settings)
        calls.append(1)
        return replace(masks, losses=[1.01 * x for x in masks.losses]) if len(calls) == 1 else masks

    monkeypatch.setattr(gpu, "train_masks", first_wrong)
    wrong = make_problem()[1]
    assert str(wrong).startswith("fused, captured and launched: losses differ")


@pytest.mark.parametrize("off", [0, 1], ids=["gate_sum", "weighted_sum"])
def test_a_wrong_step_on_all_rows_is_found(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = make_problem()
    honest = gpu.next_step

    def sloppy(*arguments: Any, **settings: Any) -> Any:
        sums = list(honest(*arguments, **settings))
        sums[off] = 1.001 * sums[off]
        return tuple(sums)

    monkeypatch.setattr(gpu, "next_step", sloppy)
    rows = {row.figure: row for row in gpu.measure_point(problem, None)}
    assert (rows["next_step"].status, rows["next_step"].median_s) == ("wrong", None)
    assert "sum off by" in rows["next_step"].detail


def test_a_wrong_average_or_label_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = make_problem()
    result = gpu._judging(problem)()
    assert gpu._check_judging(problem, result) is None
    assert "the mean is off" in str(gpu._check_judging(problem, replace(result, update_P=1.01 * result.update_P)))
    assert gpu._check_judging(problem, replace(result, benign_N=~result.benign_N)) == "labels differ from those of the CPU"


def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    problem, _ = make_problem()
    monkeypatch.setattr(gpu, "first_step", exhausted)
    rows = {row.figure: row for row in gpu.measure_point(problem, None)}
    assert (rows["next_step"].status, rows["next_step"].detail) == ("out of memory", "OutOfMemoryError: no more")
    assert rows["collapsed"].status == "ok"


# --- the command --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "no CUDA GPU is present: nothing is measured\n"
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: None) -> None:
    path = tmp_path / "test-1.csv"
    assert gpu.main(["--out", str(tmp_path), "--seconds", "-1"]) == 3
    assert gpu.main(["--out", str(tmp_path)]) == 0
    rows = gpu.read_rows(path)
    assert [(row.clients, row.figure) for row in rows] == [(n, f.name) for n in (12, 500) for f in gpu.FIGURES]
    assert all(row.device == NAME and "torch" in row.versions and row.commit for row in rows)
    by_name = {(row.figure, row.clients): row for row in rows}
    collapsed = by_name["collapsed", 12]
    assert collapsed.to_500 == collapsed.median_s / by_name["collapsed", 500].median_s

    def forbidden(*_: Any) -> None:
        raise AssertionError("all is there")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "make_problem", forbidden)
        assert gpu.main(["--out", str(tmp_path)]) == 0
    # stopped within the second point: its rows are measured again, the first point's stay
    gpu.write_rows(path, rows[:-3])
    assert gpu.main(["--out", str(tmp_path)]) == 0
    again = gpu.read_rows(path)
    assert [(row.clients, row.figure) for row in again] == [(row.clients, row.figure) for row in rows]
    of_first = len(gpu.FIGURES)
    assert [r.median_s for r in again[:of_first]] == [r.median_s for r in rows[:of_first]]
    assert [r.median_s for r in again[of_first:]] != [r.median_s for r in rows[of_first:]]


def test_rows_are_on_disk_as_soon_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    figures = [replace(f, provider=replace(f.provider, prepare=stopped)) if f.name == "fused" else f for f in gpu.FIGURES]
    monkeypatch.setattr(gpu, "FIGURES", figures)
    run = gpu._Run(tmp_path / "x.csv", CPU, Console(quiet=True), [], {"device": NAME})
    with pytest.raises(KeyboardInterrupt):
        run.measure("logreg", 12)
    names = [figure.name for figure in figures]
    assert [row.figure for row in gpu.read_rows(tmp_path / "x.csv")] == names[: names.index("fused")]
    assert not run.is_complete("logreg", 12)


def test_updates_that_do_not_fit_are_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: None) -> None:
    honest = gpu.make_problem

    def exhausted(model: Model, case: Any, num_clients: int, agreed: Any) -> Problem:
        if num_clients == 500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(model, case, num_clients, agreed)

    monkeypatch.setattr(gpu, "make_problem", exhausted)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    rows = [row for row in gpu.read_rows(tmp_path / "test-1.csv") if row.clients == 500]
    assert {(row.status, row.detail) for row in rows} == {("out of memory", "the updates alone: CUDA out of memory")}
    assert len(rows) == len(gpu.FIGURES)


def test_another_files_columns_are_refused(tmp_path: Path, played: None) -> None:
    (tmp_path / "test-1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"test-1\.csv has other columns than this benchmark writes"):
        gpu.main(["--out", str(tmp_path)])
