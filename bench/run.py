"""The benchmark itself: cases x clients x providers, each result compared before it is timed, one row a measurement."""

import csv
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from skymask_gpu.bench.cases import CASES, CLIENTS, DTYPES, Case, Model, Problem, TooLargeError
from skymask_gpu.bench.measure import Floor, Measured, StoppedError, free_memory, limited_memory, measure_steadily
from skymask_gpu.bench.providers import COMPILED, MEAN, PASSES, CannotRunError, NoCheckError, Provider, providers
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.engine.memory import is_out_of_memory
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.peak_memory import give_back_freed
from skymask_gpu.federation.rules import RuleResult
from skymask_gpu.io.files import write_text

__all__ = ["FULL", "QUICK", "RATIOS", "Limits", "Row", "count_rows", "measure_cases", "read_rows", "write_rows"]

RATIOS = ("to_reference", "to_passes", "to_mean")

_SEED = 0
# What most come for is measured first.
_FIRST = (("cnn", 50, "float32"), ("cnn", 500, "float32"))
# Bytes in float32; what has more comes last, for it takes as long as much else together.
_LARGE_UPDATES = 2**30
# A first call, which may compile, is stopped after so many times the longest call that is expected to do.
_STOPPED_AFTER = 3
_PACKAGES = ("torch", "numba", "triton", "numpy", "byzfl")


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Attributes:
        clients: the numbers of clients of each case.
        cases: their names.
        dtypes: of the updates, where a case has them.
        total_seconds: once so many are spent, what is left is skipped.
        call_seconds: a call that takes longer, or is expected to, gets no time; one that takes three times as long is stopped.
        repeat_seconds: a measurement is repeated until its ratios are known or so many are spent.
        left_out: providers that would take too long.
    """

    clients: tuple[int, ...] = CLIENTS
    cases: tuple[str, ...] = tuple(CASES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    total_seconds: float = 530.0
    call_seconds: float = 20.0
    repeat_seconds: float = 3.0
    left_out: tuple[str, ...] = ()


FULL = Limits()
QUICK = Limits((50,), ("cnn",), ("float32",), 45.0, 3.0, 15.0, left_out=(COMPILED, "vmap"))


@dataclass(kw_only=True)
class Row:
    """One measurement: a row of ``bench.csv``. Seconds and bytes are None unless the status is ``"ok"``.

    Attributes:
        status: ok, wrong (its result is, so it has no time), skipped, no check, out of memory, or failed.
        detail: why it is not ok.
        compared_with: what the result agreed with.
        first_s: of the first call, compilation included.
        median_s: and ``p20_s``, ``p80_s``: quantiles over the ``repeats``.
        peak_bytes: above what was held before the call, the inputs among it; empty where the system does not tell.
        to_mean: the time of a repeat over that of a mean of the same rows beside it; ``to_passes`` so over the model's passes,
            ``to_reference`` over solver reference in the same round, each in units of the passes beside it if these are a
            yardstick; empty where a mean or a pass takes less than a millisecond, and after fewer than three repeats. With 95%
            confidence, so far as one run can tell, they lie between ``..._low`` and ``..._high``.
        split: JSON of the median seconds of each phase, of SkyMask's round.
    """

    case: str
    what: str
    model: str
    clients: int
    params: int | None
    dtype: str
    mask_steps: int
    root_samples: int
    provider: str
    status: str
    detail: str = ""
    compared_with: str = ""
    first_s: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    to_mean: float | None = None
    to_mean_low: float | None = None
    to_mean_high: float | None = None
    to_passes: float | None = None
    to_passes_low: float | None = None
    to_passes_high: float | None = None
    to_reference: float | None = None
    to_reference_low: float | None = None
    to_reference_high: float | None = None
    split: str = ""
    device: str = ""
    threads: int | None = None
    versions: str = ""
    commit: str = ""
    seed: int | None = None
    time: str = ""

    def ratio(self, name: str) -> Ratio | None:
        """One of ``RATIOS`` with its interval."""
        value, low, high = (getattr(self, column) for column in (name, f"{name}_low", f"{name}_high"))
        return None if value is None else Ratio(value, low, high)


def count_rows(limits: Limits) -> int:
    return sum(len(providers(case)) for case, _, _ in _points(limits))


def measure_cases(limits: Limits, device: torch.device, started: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Rows as they are measured; ``started`` is told what comes next."""
    run = _Run(limits, device, started)
    for case, num_clients, dtype in _points(limits):
        yield from run.point(case, num_clients, dtype)


def _points(limits: Limits) -> list[tuple[Case, int, str]]:
    """Cases, clients and dtypes in the order of measuring: the CNN, few clients, of these float32 first; large updates last."""
    cases = [CASES[name] for name in limits.cases]
    points = [(case, n, dtype) for n in limits.clients for dtype in limits.dtypes for case in cases if dtype in case.dtypes]

    def place(point: tuple[Case, int, str]) -> tuple[bool, bool]:
        case, num_clients, dtype = point
        return 4 * num_clients * case.num_params > _LARGE_UPDATES, (case.name, num_clients, dtype) not in _FIRST

    return sorted(points, key=place)


def write_rows(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of :func:`write_rows`.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(Row)]:
            raise ValueError(f"{path} is no table of this benchmark: its columns are {reader.fieldnames}")
        return [Row(**{f.name: _parsed(record[f.name], f.type) for f in fields(Row)}) for record in reader]


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if not text:
        return None
    return float(text) if kind == float | None else int(text)


class _SlowError(BaseException):
    """The call takes too long. No Exception, for torch.compile catches those."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer, between two lines of Python."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _SlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class _Run:
    """What is known so far: the models, how long calls took, and who agreed with whom."""

    limits: Limits
    device: torch.device
    started: Callable[[str], None]
    models: dict[str, Model] = field(default_factory=dict)
    paces: dict[tuple[str, str, str], tuple[int, float]] = field(default_factory=dict)  # clients, seconds of a call
    agreed: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.conditions: dict[str, Any] = {
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
            "commit": _commit(),
            "seed": _SEED,
        }

    def point(self, case: Case, num_clients: int, dtype: str) -> Iterator[Row]:
        """All rows of one case with so many clients whose updates are of ``dtype``."""
        self.started(f"{case.name}, N = {num_clients:,}, {dtype}: updates")
        give_back_freed()
        try:
            if self._is_over():
                raise CannotRunError(self._over())
            with limited_memory(self.device):
                if case.name not in self.models:
                    self.models[case.name] = Model.build(case, self.device)
                problem = Problem.build(case, self.models[case.name], num_clients, _SEED, free_memory(self.device)).to(dtype)
        except (CannotRunError, TooLargeError) as reason:
            for provider in providers(case):
                yield self._row(case, num_clients, dtype, provider, status="skipped", detail=str(reason))
            return
        problem.agreed = self.agreed.setdefault((case.name, dtype), {})
        yield from self._side_by_side(problem)

    def _side_by_side(self, problem: Problem) -> Iterator[Row]:
        """The rows of all providers: first each result is checked, then those that are right are timed in rounds."""
        case, dtype = problem.case, problem.dtype
        point = f"{case.name}, N = {problem.num_clients:,}, {dtype}"
        known = {provider.name: provider for provider in providers(case)}
        columns, calls = {}, {}
        for name, provider in known.items():
            self.started(f"{point}: {name}")
            columns[name], call = self._checked(problem, provider)
            if call is not None:
                calls[name] = _Phases(call)
        stopped: StoppedError | None = None
        measured: Mapping[str, Measured | Exception]
        try:
            with limited_memory(self.device), without_tf32():
                measured = measure_steadily(
                    calls,
                    self.device,
                    self.limits.repeat_seconds,
                    {
                        name: Floor(calls[name], parts)
                        for name, parts in ((MEAN, 1), (PASSES, case.mask_steps))
                        if name in calls
                    },
                    is_over=self._is_over,
                    started=lambda name: self.started(f"{point}: {name}"),
                )
        except StoppedError as reason:
            measured, stopped = reason.measured, reason
        except Exception as error:  # of a floor
            measured = dict.fromkeys(calls, error)
        reference = measured.get("reference")
        for name, provider in known.items():
            if name in measured:
                columns[name] |= self._timed(problem, provider, calls[name], measured[name], reference)
            elif name in calls:
                columns[name] = {"status": "skipped", "detail": "stopped" if stopped else self._over()}
            yield self._row(case, problem.num_clients, dtype, provider, **columns[name])
        if stopped is not None:
            raise stopped

    @without_tf32()
    def _checked(self, problem: Problem, provider: Provider) -> tuple[dict[str, Any], Callable[[], Any] | None]:
        """The columns that are known before it is timed, and the call if it may be."""
        if provider.name in self.limits.left_out:
            return {"status": "skipped", "detail": "it takes too long for a quick run"}, None
        if self._is_over():
            return {"status": "skipped", "detail": self._over()}, None
        key = (problem.case.name, problem.dtype, provider.name)
        if key in self.paces:
            clients, seconds = self.paces[key]
            expected = seconds * problem.num_clients / clients
            if expected > self.limits.call_seconds:
                detail = (
                    f"about {expected:.2g} s a call expected from N = {clients:,}, the limit is {self.limits.call_seconds:g} s"
                )
                return {"status": "skipped", "detail": detail}, None
        try:
            with limited_memory(self.device):
                call = provider.prepare(problem)
                result, first = self._call(call)
                wrong = provider.check(problem, result)
                del result
                # the first may have compiled
                pace = first if wrong or first <= self.limits.call_seconds else self._call(call)[1]
                self.paces[key] = (problem.num_clients, pace)
        except CannotRunError as reason:
            return {"status": "skipped", "detail": str(reason)}, None
        except NoCheckError as reason:
            return {"status": "no check", "detail": str(reason)}, None
        except _SlowError:
            stopped = _STOPPED_AFTER * self.limits.call_seconds
            self.paces[key] = (problem.num_clients, stopped)
            return {"status": "skipped", "detail": f"stopped after {stopped:g} s"}, None
        except Exception as error:
            return _failure(error), None
        if wrong is not None:
            return {"status": "wrong", "detail": wrong}, None
        if pace > self.limits.call_seconds:
            return {"status": "skipped", "detail": f"{pace:.2g} s a call, the limit is {self.limits.call_seconds:g} s"}, None
        return {"first_s": first, "compared_with": provider.compared_with(problem)}, call

    def _call(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """A call's result and its seconds.

        Raises:
            _SlowError: it takes too long.
        """
        give_back_freed()  # in pieces, it might not do where memory is short
        start = time.perf_counter()
        with _at_most(_STOPPED_AFTER * self.limits.call_seconds):
            result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result, time.perf_counter() - start

    def _timed(
        self,
        problem: Problem,
        provider: Provider,
        phases: "_Phases",
        measured: Measured | Exception,
        reference: Measured | Exception | None,
    ) -> dict[str, Any]:
        """The columns of one whose result is right."""
        if isinstance(measured, Exception):
            return {"first_s": None, "compared_with": "", **_failure(measured)}
        self.paces[problem.case.name, problem.dtype, provider.name] = (problem.num_clients, measured.median)
        ratios = {name: Ratio.of(measured.ratios.get(name, [])) for name in provider.floors}
        is_floor = provider.name in (MEAN, PASSES)
        if is_floor:
            ratios[provider.name] = Ratio(1.0, 1.0, 1.0)
        return {
            "status": "ok",
            "split": phases.split(),
            **_ratio_columns("to_mean", ratios.get(MEAN)),
            **_ratio_columns("to_passes", ratios.get(PASSES)),
            **_ratio_columns("to_reference", None if is_floor else _to_reference(measured, reference)),
            **_columns(measured),
        }

    def _row(self, case: Case, num_clients: int, dtype: str, provider: Provider, **measured: Any) -> Row:
        model = self.models.get(case.name)
        return Row(
            case=case.name,
            what=case.what,
            model=case.model,
            clients=num_clients,
            params=model.loss.num_params if model else None,
            dtype=dtype,
            mask_steps=case.mask_steps,
            root_samples=case.root_samples,
            provider=provider.name,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            **measured,
            **self.conditions,
        )

    def _is_over(self) -> bool:
        return time.monotonic() - self.begin > self.limits.total_seconds

    def _over(self) -> str:
        return f"the {self.limits.total_seconds:g} s of this run were spent"


def _failure(error: Exception) -> dict[str, Any]:
    if is_out_of_memory(error):
        return {"status": "out of memory", "detail": str(error).splitlines()[0][:200]}
    return {"status": "failed", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


class _Phases:
    """A call that keeps the seconds of SkyMask's phases."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._seconds: list[dict[str, float]] = []

    def __call__(self) -> None:
        result = self._call()
        if isinstance(result, RuleResult) and result.seconds:
            self._seconds.append(result.seconds)

    def split(self) -> str:
        if not self._seconds:
            return ""
        phases = {name: statistics.median(seconds[name] for seconds in self._seconds) for name in self._seconds[0]}
        total = phases.pop("total")
        return json.dumps({**phases, "other": max(0.0, total - sum(phases.values()))})


def _to_reference(measured: Measured, reference: Measured | Exception | None) -> Ratio | None:
    """To the reference in the same round, each in units of the passes beside it if these are a yardstick."""
    if not isinstance(reference, Measured):
        return None
    own, others = (of_call.ratios.get(PASSES) for of_call in (measured, reference))
    if own is None or others is None:
        own, others = measured.seconds, reference.seconds
    return Ratio.of([mine / its for mine, its in zip(own, others, strict=False)])


def _ratio_columns(name: str, ratio: Ratio | None) -> dict[str, float | None]:
    if ratio is None:
        return {name: None}
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def _columns(measured: Measured) -> dict[str, Any]:
    return {
        "median_s": measured.median,
        "p20_s": measured.quantile(0.2),
        "p80_s": measured.quantile(0.8),
        "repeats": len(measured.seconds),
        "peak_bytes": measured.peak_bytes,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    """Of the checkout that this file is in; "unknown" for an installed package."""
    here = Path(__file__).resolve()
    try:
        git = ["git", "-C", str(here.parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
