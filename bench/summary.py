"""The tables of a benchmark, as Markdown."""

from itertools import groupby
from pathlib import Path

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.table import RATIOS, Row
from skymask_gpu.io.files import write_text

__all__ = ["cells", "shown_ratios", "write_summary"]

# A ratio is given as a number if its interval reaches at most this share above it.
_KNOWN = 0.075


def write_summary(rows: list[Row], path: Path) -> None:
    """Write a table per case, dtype and number of clients, and why a row has no time."""
    write_text(path, "\n".join(_lines(rows)) + "\n")


def _lines(rows: list[Row]) -> list[str]:
    if not rows:
        return ["# Benchmark", "", "Nothing was measured."]
    first = rows[0]
    lines = [
        "# Benchmark",
        "",
        f"{first.device}; {first.threads} threads; {first.versions}; commit {first.commit}; seed {first.seed}; {first.time}",
        "",
        "Every result was compared before it was timed (client labels up to N = 5,000). Times are medians, with the 20th",
        "and the 80th percentile in brackets. Memory is the peak above what was held before.",
        "",
        "Each ratio is to something that was measured in this run on the same updates: `x mean` to a plain mean of the rows,",
        "`x passes` to the model's own forward and backward passes, `x reference` to that solver in the same round. The mean",
        "and the passes are timed again and again, and each repeat is divided by their times before and after it. If they",
        "take less than a millisecond, no ratio to them is given. `x before` is the ratio to the revision of `--against`.",
        f"One number: a ratio that this run knows to within {_KNOWN:.1%} with 95% confidence. Two numbers: the interval of a",
        "ratio that it does not know as well; more repeats would narrow it.",
        "",
        "On a CPU every timed call begins with empty caches, and the process keeps the memory that it frees (glibc).",
    ]
    for (case, dtype, clients), group in groupby(rows, lambda row: (row.case, row.dtype, row.clients)):
        timed = [row for row in group if row.status == "ok"]
        if not timed:
            continue
        row = timed[0]
        steps = f", model {row.model}, {row.mask_steps} mask steps, {row.root_samples} root samples"
        lines += ["", f"## {case}, N = {clients:,}, P = {row.params:,}, {dtype}{steps}", ""]
        heads = ["what", "time", *(f"x {name.removeprefix('to_')}" for name in shown_ratios(rows)), "peak MiB", "first call"]
        lines += [f"| {' | '.join([*heads, 'agrees with'])} |", "|" + " --- |" * (len(heads) + 1)]
        lines += [_table_row(row, shown_ratios(rows)) for row in timed]
    untimed: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            key = (f"{row.case}, {row.dtype}", f"{row.clients:,}", row.status, row.detail.replace("|", "/"))
            untimed.setdefault(key, []).append(row.provider)
    if untimed:
        lines += ["", "## Without a time", "", "| case | N | what | status | why |", "|" + " --- |" * 5]
    lines += [
        f"| {case} | {clients} | {', '.join(names)} | {status} | {detail} |"
        for (case, clients, status, detail), names in untimed.items()
    ]
    return lines


def _table_row(row: Row, ratios: tuple[str, ...]) -> str:
    time, *others = cells(row, ratios)
    times = f"{time} ({_seconds(row.p20_s)} - {_seconds(row.p80_s)})"
    first = "" if row.first_s is None else _seconds(row.first_s)
    return f"| {' | '.join([row.provider, times, *others, first, row.compared_with])} |"


def shown_ratios(rows: list[Row]) -> tuple[str, ...]:
    """The names of the ratios that these rows have."""
    return ("to_before",) if any(row.to_before is not None for row in rows) else RATIOS


def cells(row: Row, ratios: tuple[str, ...]) -> list[str]:
    """A row's median time, its ratios, and its peak memory in MiB.

    A ratio that is not known well is an interval. A phase of a call has no peak of its own.
    """
    unknown = "" if row.first_s is None else "unknown"
    memory = f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes is not None else unknown
    return [_seconds(row.median_s), *(_ratio(row.ratio(name)) for name in ratios), memory]


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return _number(ratio.value) if ratio.is_within(_KNOWN) else f"{_number(ratio.low)} to {_number(ratio.high)}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    value = value or 0.0
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
