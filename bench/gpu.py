"""What a CUDA GPU does: every kernel against its twin, then the solvers and the server round beside floors of the same run.

``python -m skymask_gpu.bench.gpu --out bench/results`` writes DEVICE.csv there, a row as soon as it is measured. Started again,
it goes on with the points (a model and a number of clients) that are not complete; move the file away to measure all anew.
A result is compared before it is timed, and that without TF32. The solvers run without it, too; what it would make of the
model's passes, in convolutions and matrix products, is a row of its own, whose result is only compared without it.

Exit codes: 0 all points are there, 1 something is wrong or failed, 2 no CUDA GPU, 3 the time is up and points are left.
"""

import argparse
import csv
import gc
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from skymask_gpu.bench.cases import CASES, Case, Model, Problem
from skymask_gpu.bench.kernel_checks import wrong_kernels
from skymask_gpu.bench.measure import Measured, measure_steadily
from skymask_gpu.bench.providers import PASSES, CannotRunError, NoCheckError, Provider, providers
from skymask_gpu.bench.run import _commit, _versions
from skymask_gpu.bench.solvers import MOST_DIFFERING, MOST_LOSS_ERROR, differing_share, disagreement
from skymask_gpu.defence import RootTraining, SkyMask, mean_of_rows, root_direction
from skymask_gpu.engine import ClientBlocks, Clustering, FlatModel, MaskTraining, TrainedMasks, cluster_masks, train_masks
from skymask_gpu.engine.memory import is_out_of_memory
from skymask_gpu.engine.numerics import with_tf32, without_tf32
from skymask_gpu.engine.solvers.solution import loss_and_gradient
from skymask_gpu.engine.step_loop import StepLoop
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.io.files import write_text
from skymask_gpu.kernels import first_step, next_step, next_step_reference

__all__ = ["FIGURES", "Row", "main", "make_problem", "measure_point", "read_rows", "write_rows"]

MODELS = ("cnn", "resnet20", "resnet18")
CLIENTS = (100, 500, 2_000, 10_000)
STEPS = 20
COPY, MEAN, CAPTURED, COMPILED = "copy", "mean of the rows", "model passes, captured", "model passes, captured, torch.compile"
CAPTURED_TF32 = "model passes, captured, TF32"
# Compiling does not depend on the clients.
_COMPILED_AT = CLIENTS[0]
_VERIFIED_CLIENTS = 50
_SEED = 0
_COPIED_BYTES = 2**30
_COLUMNS = 500
_REPEAT_SECONDS = 1.0
_MEAN_ERROR = 1e-5


@dataclass(kw_only=True)
class Row:
    """One figure: a row of the CSV file. Seconds and ratios are None unless the status is ``"ok"``.

    Attributes:
        figure: its name, one of ``FIGURES``.
        status: ok, wrong (then it has no time), no check, cannot run, out of memory, or failed; ``detail`` says why.
        compared_with: what its result agreed with.
        tf32: "on" or "off", while it was timed.
        median_s: and ``p20_s``, ``p80_s``: quantiles over the ``repeats``.
        peak_bytes: above what was held before the call.
        moved_bytes: what the operation has to read and write.
        of_copy: ``moved_bytes`` a second over those of ``copy``.
        to_mean: median over that of the mean of the same rows; ``to_passes`` of the captured model passes.
        to_500: over the same figure's at 500 clients.
    """

    figure: str
    model: str
    clients: int
    params: int
    status: str
    detail: str = ""
    compared_with: str = ""
    tf32: str = "off"
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    moved_bytes: int | None = None
    of_copy: float | None = None
    to_mean: float | None = None
    to_passes: float | None = None
    to_500: float | None = None
    device: str = ""
    versions: str = ""
    commit: str = ""
    seed: int = _SEED
    time: str = ""


@dataclass(frozen=True)
class Figure:
    """What is checked and timed, and the bytes that it has to move; ``tf32``: it is timed with TF32, but checked without."""

    provider: Provider
    moved_bytes: Callable[[Problem], int] | None = None
    most_clients: int | None = None
    tf32: bool = False

    @property
    def name(self) -> str:
        return self.provider.name


# --- problems -----------------------------------------------------------------------------------------------------------


@without_tf32()
def make_problem(model: Model, case: Case, num_clients: int, agreed: dict[str, int]) -> Problem:
    """The benchmark's updates, made on the device: noisy steps downhill, a fifth of the clients sends "a little is enough"."""
    loss, params_P = model.loss, model.loss.initial_params.clone()
    for _ in range(10):
        _, grad_P = loss_and_gradient(loss, params_P)
        params_P = params_P - 0.1 * grad_P.clamp(-0.01, 0.01)
    downhill_P = params_P - loss.initial_params
    generator = torch.Generator(params_P.device).manual_seed(_SEED)
    rows_RP = torch.randn(num_clients + 1, loss.num_params, generator=generator, device=params_P.device)
    rows_RP.mul_(downhill_P.std() / 2).add_(downhill_P)
    malicious_N = torch.arange(num_clients, device=params_P.device) < num_clients // 5
    # a few columns at a time: an attack takes several times the memory of its rows
    for part_RC in rows_RP.split(max(1, 2**28 // num_clients), dim=1):
        part_RC[:-1] = attack(part_RC[:-1], malicious_N, Threat(AttackConfig(name="lie", share=0.2)))
    return Problem(case, model, "float32", rows_RP, rows_RP, _SEED, agreed)


def _some_columns(rows_RP: Tensor) -> Tensor:
    """A copy of every so-manieth column, about 500."""
    return rows_RP[:, :: max(1, rows_RP.shape[1] // _COLUMNS)].contiguous()


def _benchmarks_own(case: Case, name: str) -> Provider:
    """The provider of ``skymask-gpu bench``."""
    return next(provider for provider in providers(case) if provider.name == name)


# --- figures ------------------------------------------------------------------------------------------------------------


def _copy(problem: Problem) -> Callable[[], Tensor]:
    source = torch.arange(_COPIED_BYTES // 4, dtype=torch.float32, device=problem.updates.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _check_copy(problem: Problem, target: Tensor) -> str | None:
    exact = torch.arange(len(target), dtype=torch.float32, device=target.device)
    return None if torch.equal(target, exact) else "the copy differs"


def _check_mean(problem: Problem, mean_P: Tensor, kept_N: Tensor | None = None) -> str | None:
    """Of the kept clients, in float64, in some columns."""
    rows_NC = _some_columns(problem.updates)[:-1].double()
    want_C = (rows_NC if kept_N is None else rows_NC[kept_N]).mean(0)
    error = float((_some_columns(mean_P[None])[0].double() - want_C).abs().max() / rows_NC.abs().mean())
    return None if error <= _MEAN_ERROR else f"the mean is off by {error:.1e} of an update's mean size"


def _captured_passes(compile: bool, problem: Problem) -> Callable[[], Tensor]:
    model = problem.model
    loss = FlatModel(model.module, model.inputs, model.labels, compile=True) if compile else model.loss
    params_P, grad_P = loss.initial_params.clone(), torch.empty_like(loss.initial_params)

    def one() -> None:
        grad_P.copy_(loss_and_gradient(loss, params_P)[1])

    one()  # what compiles may wait
    loop = StepLoop(one, params_P.device)
    loop.run(2)
    if loop.not_captured is not None:
        raise CannotRunError(f"not captured: {loop.not_captured}")

    def passes() -> Tensor:
        loop.run(STEPS)
        return grad_P

    return passes


def _next_step(problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """A whole exact step on all rows; beside its sums, the logits of some columns before and after the first call."""
    rows_RP, full_step = problem.updates, problem.training.full_step
    mean_P = rows_RP.mean(0)
    slope_P = torch.randn(mean_P.shape, device=mean_P.device, generator=torch.Generator(mean_P.device).manual_seed(_SEED))
    slope_P /= rows_RP.std(0).clamp_min(1e-12)  # part of the steps are clipped
    logits_RP = torch.empty_like(rows_RP)
    first_step(rows_RP, logits_RP, slope_P, mean_P, init=problem.training.init, full_step=full_step)
    before_RC = _some_columns(logits_RP)
    calls: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        sums = next_step(rows_RP, logits_RP, slope_P, mean_P, full_step=full_step)
        if not calls:
            calls.append(before_RC)
            return (*sums, before_RC, _some_columns(logits_RP), slope_P, mean_P)
        return sums

    return step


def _check_next_step(problem: Problem, result: tuple[Tensor, ...]) -> str | None:
    gate_sum_P, weighted_sum_P, before_RC, after_RC, slope_P, mean_P = result
    logits_RC = before_RC.double()
    slope_C, mean_C = (_some_columns(x[None])[0].double() for x in (slope_P, mean_P))
    rows_RC = _some_columns(problem.updates).double()
    want = next_step_reference(rows_RC, logits_RC, slope_C, mean_C, full_step=problem.training.full_step)
    got = (after_RC, *(_some_columns(x[None])[0] for x in (gate_sum_P, weighted_sum_P)))
    for name, a, b in zip(("logits", "gate_sum", "weighted_sum"), got, (logits_RC, *want), strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= 1e-5:
            return f"{name} off by {error:.1e}"
    return None


def _train(solver: str, problem: Problem, steps: int, loss: Callable[[Tensor], Tensor] | None = None) -> TrainedMasks:
    config = MaskTraining(steps=steps, min_improvement=-1e9)
    loss = loss or problem.model.loss
    return train_masks(problem.updates, problem.model.loss.initial_params, loss, config=config, solver=solver)


def _prepare_solver(solver: str, problem: Problem) -> Callable[[], TrainedMasks]:
    return lambda: _train(solver, problem, STEPS)


def _check_solver(solver: str, problem: Problem, masks: TrainedMasks) -> str | None:
    """Captured, in all steps; and right in as many steps as float32 is stable, by the benchmark's own check."""
    if not _as_expected(masks, captured=True):
        return masks.solver_reason
    if masks.steps != STEPS:
        return f"{masks.steps} steps instead of {STEPS}"
    own = _benchmarks_own(problem.case, solver)
    return own.check(problem, own.prepare(problem)())


def _as_expected(masks: TrainedMasks, *, captured: bool) -> bool:
    """Captured or not; on a CPU nothing is."""
    return not masks.bits.is_cuda or ("not captured" not in masks.solver_reason) == captured


@without_tf32()
def verify_solvers(model: Model, case: Case, agreed: dict[str, int]) -> str | None:
    """With few clients: `fused` and `collapsed` agree with `reference`; captured steps with launched ones as these with
    themselves."""
    problem = make_problem(model, case, _VERIFIED_CLIENTS, agreed)
    for solver in ("reference", "fused", "collapsed"):
        own = _benchmarks_own(case, solver)
        wrong = own.check(problem, own.prepare(problem)())
        if wrong is not None:
            return f"{solver}: {wrong}"

    def waiting(params_P: Tensor) -> Tensor:
        value = model.loss(params_P)
        value.item()
        return value

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for solver in ("fused", "collapsed"):
            captured = _train(solver, problem, STEPS)
            launched, again = (_train(solver, problem, STEPS, waiting) for _ in range(2))
            for masks, wanted in ((captured, True), (launched, False)):
                if not _as_expected(masks, captured=wanted):
                    return f"{solver}: {masks.solver_reason}"
            # 0 if the model's passes are deterministic
            noise = 2 * max(abs(a - b) for a, b in zip(again.losses, launched.losses, strict=True)) / abs(launched.losses[0])
            wrong = disagreement(
                captured,
                launched,
                most_differing=2 * differing_share(again, launched) + MOST_DIFFERING,
                most_loss_error=noise + MOST_LOSS_ERROR,
            )
            if wrong is not None:
                return f"{solver}, captured and launched: {wrong}"
    finally:
        torch.backends.cudnn.deterministic = before
    return None


@dataclass(frozen=True)
class _Round:
    """What is checked of a server round."""

    update_P: Tensor
    benign_N: Tensor
    masks: TrainedMasks
    alignment_N: Tensor


def _judging(problem: Problem) -> Callable[[], _Round]:
    """Mask training, clustering and averaging, as ``SkyMask.aggregate`` does them."""
    params_P, rows = problem.model.loss.initial_params, ClientBlocks([problem.updates])
    clients = ClientBlocks([problem.updates[:-1]])
    alignment_N = problem.updates[:-1] @ root_direction(problem.model.loss, params_P, RootTraining())
    training = MaskTraining(steps=STEPS, min_improvement=-1e9)

    def judge() -> _Round:
        masks = train_masks(rows, params_P, problem.model.loss, config=training)
        clusters = cluster_masks(masks.bits, masks.num_params, alignment=alignment_N, config=Clustering())
        return _Round(mean_of_rows(clients, clusters.benign), clusters.benign, masks, alignment_N)

    return judge


def _check_judging(problem: Problem, result: _Round) -> str | None:
    """Steps were captured; the labels against clustering on the CPU where that is quick; the mean of those kept."""
    masks = result.masks
    if not _as_expected(masks, captured=True):
        return masks.solver_reason
    if problem.num_clients <= 500 and masks.num_params <= 10**6:
        on_cpu = cluster_masks(masks.bits.cpu(), masks.num_params, alignment=result.alignment_N.cpu(), config=Clustering())
        if not torch.equal(on_cpu.benign, result.benign_N.cpu()):
            return "labels differ from those of the CPU"
    return _check_mean(problem, result.update_P, result.benign_N)


def _aggregate(problem: Problem) -> Callable[[], _Round]:
    """The whole of ``SkyMask.aggregate``: root training and collecting too."""
    model, training = problem.model, MaskTraining(steps=STEPS, min_improvement=-1e9)
    defence = SkyMask(model.module, model.inputs, model.labels, training=training)

    def aggregate() -> _Round:
        result = defence.aggregate(problem.updates[:-1])
        return _Round(result.update, result.benign, result.masks, result.benign)

    return aggregate


def _row_bytes(a_row_and_column: int) -> Callable[[Problem], int]:
    return lambda problem: a_row_and_column * problem.updates.numel()


def _figure(name: str, prepare: Any, check: Any, compared_with: str, **settings: Any) -> Figure:
    return Figure(Provider(name, prepare, check, lambda _: compared_with), **settings)


def _check_passes(problem: Problem, grad_P: Tensor) -> str | None:
    return _benchmarks_own(problem.case, PASSES).check(problem, grad_P)


def _launched_passes(problem: Problem) -> Callable[[], Tensor]:
    case = replace(problem.case, mask_steps=STEPS)
    return _benchmarks_own(case, PASSES).prepare(replace(problem, case=case))


_TRUTH = f"reference, or fused as it agreed with it at N = {_VERIFIED_CLIENTS}; there, captured steps with launched ones"
# The floors come first.
FIGURES = [
    _figure(COPY, _copy, _check_copy, "the source", moved_bytes=lambda _: 2 * _COPIED_BYTES),
    _figure(
        MEAN,
        lambda problem: lambda: problem.updates[:-1].mean(0),
        _check_mean,
        "the mean in float64",
        moved_bytes=_row_bytes(4),
    ),
    _figure(CAPTURED, partial(_captured_passes, False), _check_passes, "the gradient in float64"),
    _figure(
        CAPTURED_TF32,
        partial(_captured_passes, False),
        _check_passes,
        "without TF32, the gradient in float64",
        tf32=True,
    ),
    _figure("model passes, launched", _launched_passes, _check_passes, "the gradient in float64"),
    _figure(
        COMPILED, partial(_captured_passes, True), _check_passes, "the gradient in float64", most_clients=_COMPILED_AT
    ),
    _figure("next_step", _next_step, _check_next_step, "its twin in float64", moved_bytes=_row_bytes(12)),
    *(_figure(name, partial(_prepare_solver, name), partial(_check_solver, name), _TRUTH) for name in ("fused", "collapsed")),
    _figure("mask training, clustering, averaging", _judging, _check_judging, "float64 means, a CPU's labels up to N = 500"),
    _figure(
        "aggregate", _aggregate, lambda problem, r: _check_mean(problem, r.update_P, r.benign_N), "the mean in float64"
    ),
]  # fmt: skip


def figures_at(num_clients: int) -> list[Figure]:
    return [figure for figure in FIGURES if figure.most_clients is None or num_clients <= figure.most_clients]


# --- measuring ----------------------------------------------------------------------------------------------------------


def measure_point(problem: Problem, wrong: str | None, repeat_seconds: float = _REPEAT_SECONDS) -> Iterator[Row]:
    """All figures of a model and a number of clients, each as soon as it is there; ``wrong``: what the solvers are, if so."""
    medians: dict[str, float] = {}
    device = problem.updates.device
    for figure in figures_at(problem.num_clients):
        row = Row(
            figure=figure.name,
            model=problem.case.name,
            clients=problem.num_clients,
            params=problem.updates.shape[1],
            tf32="on" if figure.tf32 else "off",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            **_measured(figure, problem, wrong, repeat_seconds),
        )
        if row.median_s is not None:
            medians[figure.name] = row.median_s
            row.to_mean, row.to_passes = (
                row.median_s / medians[floor] if floor in medians else None for floor in (MEAN, CAPTURED)
            )
            if figure.moved_bytes is not None:
                row.moved_bytes = figure.moved_bytes(problem)
                if COPY in medians:
                    row.of_copy = row.moved_bytes / row.median_s / (2 * _COPIED_BYTES / medians[COPY])
        yield row
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _measured(figure: Figure, problem: Problem, wrong: str | None, repeat_seconds: float) -> dict[str, Any]:
    """The columns that come from running one figure."""
    if wrong is not None and figure.name not in (COPY, MEAN, CAPTURED):
        return {"status": "wrong", "detail": wrong}
    provider = figure.provider
    try:
        with without_tf32():
            call = provider.prepare(problem)
            reason = provider.check(problem, call())
        if reason is not None:
            return {"status": "wrong", "detail": reason}
        with with_tf32() if figure.tf32 else without_tf32():
            if figure.tf32:
                call = provider.prepare(problem)  # a captured graph keeps the setting that it was captured with
            measured = measure_steadily({figure.name: call}, problem.updates.device, repeat_seconds)[figure.name]
        if isinstance(measured, Exception):
            raise measured
    except CannotRunError as error:
        return {"status": "cannot run", "detail": str(error)}
    except NoCheckError as error:
        return {"status": "no check", "detail": str(error)}
    except Exception as error:
        kind = "out of memory" if is_out_of_memory(error) else "failed"
        return {"status": kind, "detail": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"status": "ok", "compared_with": provider.compared_with(problem), **_columns(measured)}


def _columns(measured: Measured) -> dict[str, Any]:
    return {
        "median_s": measured.median,
        "p20_s": measured.quantile(0.2),
        "p80_s": measured.quantile(0.8),
        "repeats": len(measured.seconds),
        "peak_bytes": measured.peak_bytes,
    }


# --- the file -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row]) -> None:
    at_500 = {(row.figure, row.model): row.median_s for row in rows if row.clients == 500 and row.median_s is not None}
    for row in rows:
        floor = at_500.get((row.figure, row.model))
        row.to_500 = row.median_s / floor if row.median_s is not None and floor else None
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows that are there, none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(Row)]:
            raise ValueError(f"{path} has other columns than this benchmark writes, {reader.fieldnames}; move it away")
        return [Row(**{f.name: _parsed(record[f.name], f.type) for f in fields(Row)}) for record in reader]


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if not text:
        return None
    return int(text) if kind in (int, int | None) else float(text)


def _file_name(device_name: str) -> str:
    """``h200`` of "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia")).strip("-")


@dataclass
class _Run:
    """The file, and what is known of each model."""

    path: Path
    device: torch.device
    console: Console
    rows: list[Row]
    conditions: dict[str, str]
    agreed: dict[str, dict[str, int]] = field(default_factory=dict)
    models: dict[str, tuple[Model, str | None]] = field(default_factory=dict)

    def is_complete(self, model: str, num_clients: int) -> bool:
        there = {row.figure for row in self.rows if (row.model, row.clients) == (model, num_clients)}
        return there >= {figure.name for figure in figures_at(num_clients)}

    def measure(self, name: str, num_clients: int) -> None:
        """All figures of one point; what an earlier, incomplete run measured there is replaced."""
        self.rows = [row for row in self.rows if (row.model, row.clients) != (name, num_clients)]
        case, agreed = CASES[name], self.agreed.setdefault(name, {})
        if name not in self.models:
            model = Model.build(case, self.device)
            self.models[name] = (model, verify_solvers(model, case, agreed))
        model, wrong = self.models[name]
        try:
            problem = make_problem(model, case, num_clients, agreed)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0][:200]
            for figure in figures_at(num_clients):
                self._add(
                    Row(
                        figure=figure.name,
                        model=name,
                        clients=num_clients,
                        params=model.loss.num_params,
                        tf32="on" if figure.tf32 else "off",
                        status="out of memory",
                        detail=f"the updates alone: {reason}",
                    )
                )
            return
        for row in measure_point(problem, wrong):
            self._add(row)

    def _add(self, row: Row) -> None:
        for name, value in self.conditions.items():
            setattr(row, name, value)
        self.rows.append(row)
        write_rows(self.path, self.rows)
        seconds = "" if row.median_s is None else f" {row.median_s * 1e3:.3f} ms"
        ratios = [
            f"{value:.2f} {what}"
            for value, what in (
                (row.of_copy, "of copy bandwidth"),
                (row.to_mean, "x mean"),
                (row.to_passes, "x passes"),
                (row.to_500, "x N = 500"),
            )
            if value is not None
        ]
        line = f"{row.model}, N = {row.clients:,}: {row.figure}: {row.status}{seconds} {', '.join(ratios)}{row.detail}"
        self.console.print(line, markup=False, soft_wrap=True)


def _gpu() -> tuple[torch.device, str] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no further point after so many")
    options = parser.parse_args(arguments)
    console = Console()
    found = _gpu()
    if found is None:
        console.print("no CUDA GPU is present: nothing is measured")
        return 2
    begin, (device, name) = time.monotonic(), found
    for kernel, wrong in wrong_kernels(device):
        console.print(f"{kernel}: {wrong or 'equals its twin'}", markup=False)
        if wrong is not None:
            console.print("a kernel is wrong: nothing is timed")
            return 1
    path = options.out / f"{_file_name(name)}.csv"
    conditions = {"device": name, "versions": _versions(), "commit": _commit()}
    run = _Run(path, device, console, read_rows(path), conditions)
    points = [(model, clients) for clients in CLIENTS for model in MODELS if not run.is_complete(model, clients)]
    for number, (model, clients) in enumerate(points):
        if time.monotonic() - begin > options.seconds:
            console.print(f"the {options.seconds:g} s are spent, {len(points) - number} points are left: start again")
            return 3
        run.measure(model, clients)
    bad = [row for row in run.rows if row.status in ("wrong", "failed")]
    console.print(f"{len(run.rows)} rows, {len(bad)} wrong or failed: {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
