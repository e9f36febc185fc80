"""The tables of a benchmark, as Markdown."""

from itertools import groupby
from pathlib import Path

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.run import RATIOS, Row
from skymask_gpu.io.files import write_text

__all__ = ["is_known", "ratio_text", "seconds", "write_summary"]

# A ratio's interval reaches at most so much above it where the ratio is given as a number.
_KNOWN = 0.075


def write_summary(rows: list[Row], path: Path) -> None:
    """A table for each case, dtype and number of clients, and what has no time with the reason."""
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
        "Every result was compared before it was timed (client labels up to N = 5,000). Times are medians; in brackets the",
        "20th and the 80th percentile. Memory: the peak above what was held before.",
        "",
        "Ratios are to what was measured in this run on the same updates: `x mean` to a plain mean of the rows and `x passes`",
        "to the model's own forward and backward passes, which are timed again and again in between (a repeat is held against",
        "the times before and after it; a mean or a pass of less than a millisecond is no yardstick), `x reference` to that",
        "solver in the same round, both in passes if these are a yardstick. A number is a ratio that this run knows to within",
        f"{_KNOWN:.1%}, with 95% confidence; of others the interval stands there: more repeats would narrow it.",
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
        lines += ["| what | time | x reference | x passes | x mean | peak MiB | first call | agrees with |", "|" + " --- |" * 8]
        lines += [_table_row(row) for row in timed]
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


def _table_row(row: Row) -> str:
    assert row.median_s is not None
    assert row.p20_s is not None
    assert row.p80_s is not None
    ratios = (ratio_text(row.ratio(name)) for name in RATIOS)
    memory = f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes is not None else "unknown"
    times = f"{seconds(row.median_s)} ({seconds(row.p20_s)} - {seconds(row.p80_s)})"
    cells = [row.provider, times, *ratios, memory, seconds(row.first_s or 0.0), row.compared_with]
    return "| " + " | ".join(cells) + " |"


def is_known(ratio: Ratio) -> bool:
    """Whether a run knows the ratio well enough to give it as a number."""
    return ratio.is_within(_KNOWN)


def ratio_text(ratio: Ratio | None) -> str:
    """A number, or the interval of one that is not known; empty for None."""
    if ratio is None:
        return ""
    return _number(ratio.value) if is_known(ratio) else f"{_number(ratio.low)} to {_number(ratio.high)}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
