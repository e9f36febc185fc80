"""``skymask-gpu bench --against REV``: two revisions side by side, and rows without a time where results differ."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.bench import against
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.table import Row


def make_row(provider: str, status: str = "ok") -> Row:
    common = dict(case="cnn", what="solvers", model="cnn", clients=50, params=8, dtype="float32")
    return Row(**common, mask_steps=20, root_samples=100, provider=provider, status=status)  # type: ignore[arg-type]


class Side:
    """A revision that needs no process: its rows, results and the seconds of every call."""

    def __init__(self, seconds: float, **results: torch.Tensor | str) -> None:
        self._seconds, self._results = seconds, results
        self.rows = [make_row(name, x if isinstance(x, str) else "ok") for name, x in results.items()]

    def seconds(self, provider: str) -> float:
        return self._seconds

    def result(self, provider: str) -> dict[str, Any]:
        return {"bits" if self._results[provider].dtype == torch.uint8 else "parameters": self._results[provider]}


def test_the_ratio_is_given_where_results_agree_and_the_difference_where_not() -> None:
    bits, values = torch.arange(200, dtype=torch.uint8), torch.ones(100)
    today = Side(3.0, same=bits, flipped=bits, rounded=values, off=values, failed=values)
    before = Side(2.0, same=bits, flipped=bits ^ 1, rounded=values + 1e-7, off=values * 1.01, failed="wrong")
    rows = {row.provider: row for row in against._compared(today, before, 0.0, lambda _: None)}  # type: ignore[arg-type]
    for name in ("same", "rounded"):
        assert rows[name].status == "ok"
        assert rows[name].ratio("to_before") == against.Ratio.of([1.5] * 7)
        assert (rows[name].median_s, rows[name].repeats) == (3.0, 7)
    assert (rows["flipped"].status, rows["flipped"].detail) == ("wrong", "results differ: 1.2e-01 of the bits")
    assert (rows["off"].status, rows["off"].detail) == ("wrong", "results differ: 9.9e-03 of the parameters")
    assert (rows["failed"].status, rows["failed"].median_s) == ("wrong", None)


def test_an_unknown_revision_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--against must be a revision of the git checkout .*, got 'no-such-revision'"):
        next(against.measure_against("no-such-revision", Limits()))


@pytest.mark.slow  # two processes, one of which compiles every kernel anew
def test_a_revision_is_compared_with_itself(checkout: Path) -> None:
    if shutil.which("git") is None or not (checkout / ".git").exists():
        pytest.skip("this is no git checkout")
    left_out = ("reference, torch.compile", "vmap")
    limits = Limits((20,), ("logreg",), ("float32",), repeat_seconds=1.0, left_out=left_out)
    rows = {row.provider: row for row in against.measure_against("HEAD", limits)}
    assert {name for name, row in rows.items() if row.status != "ok"} == set(left_out)
    for row in rows.values():
        ratio = row.ratio("to_before")
        assert ratio is None or ratio.low < 2
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True, check=True)
    assert "/tree " not in worktrees.stdout, "the throw-away worktree is gone"
