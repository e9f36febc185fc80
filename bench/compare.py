"""How far the ratios of several runs of the benchmark lie apart: ``python -m skymask_gpu.bench.compare DIR DIR [DIR ...]``."""

import argparse
import sys
from pathlib import Path

from skymask_gpu.bench.run import RATIOS, Row, read_rows
from skymask_gpu.bench.summary import is_known, ratio_text

__all__ = ["main"]

_Key = tuple[str, int, str, str]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what `skymask-gpu bench --out DIR` wrote")
    options = parser.parse_args(arguments)
    if len(options.folders) < 2:
        parser.error("DIR: name two runs at least")
    try:
        runs = [
            {
                (row.case, row.clients, row.dtype, row.provider): row
                for row in read_rows(folder / "bench.csv")
                if row.status == "ok"
            }
            for folder in options.folders
        ]
    except (OSError, ValueError) as error:
        parser.error(f"DIR: {error}; name folders that `skymask-gpu bench --out DIR` wrote")
    print("\n".join(_lines(runs)))
    return 0


def _lines(runs: list[dict[_Key, Row]]) -> list[str]:
    """A table of what all runs timed; in brackets by how much the largest number is above the smallest."""
    lines = ["| case | N | dtype | what | x reference | x passes | x mean |", "|" + " --- |" * 7]
    known: list[float] = []
    values: list[float] = []
    for key in [key for key in runs[0] if all(key in run for run in runs)]:
        cells = []
        for name in RATIOS:
            ratios = [run[key].ratio(name) for run in runs]
            there = [ratio for ratio in ratios if ratio is not None]
            if {ratio.value for ratio in there} <= {1.0}:  # of something to itself
                cells.append("")
                continue
            cell = ", ".join(ratio_text(ratio) or "none" for ratio in ratios)
            if len(there) == len(runs):
                values.append(max(ratio.value for ratio in there) / min(ratio.value for ratio in there) - 1)
                if all(map(is_known, there)):
                    known.append(values[-1])
                    cell += f" ({known[-1]:.0%})"
            cells.append(cell)
        case, clients, dtype, provider = key
        lines.append("| " + " | ".join([case, f"{clients:,}", dtype, provider, *cells]) + " |")
    return [
        *lines,
        "",
        f"Numbers in each run: {_apart(known)}. Numbers and middles of intervals: {_apart(values)}.",
    ]


def _apart(spreads: list[float]) -> str:
    most = f", at most {max(spreads):.0%} apart" if spreads else ""
    return f"{len(spreads)} ratios{most}, {sum(spread <= 0.15 for spread in spreads)} of them within 15%"


if __name__ == "__main__":
    sys.exit(main())
