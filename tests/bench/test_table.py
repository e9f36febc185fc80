"""Rows, their file, the summary, the plots, and the command that writes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from skymask_gpu.bench import plots, run
from skymask_gpu.bench.providers import MEAN, PASSES
from skymask_gpu.bench.summary import write_summary
from skymask_gpu.bench.table import COPY, Row, read_rows, write_rows
from skymask_gpu.cli import app


def made_rows() -> list[Row]:
    """As of a run on three numbers of clients, of which the last is too large for reference."""
    rows = []
    for clients in (50, 500, 5000):
        for provider, share in ((MEAN, 0.001), (PASSES, 0.1), ("reference", 1.0), ("collapsed", 0.2)):
            seconds = share * clients / 500
            timed = dict(status="ok", median_s=seconds, p20_s=0.9 * seconds, p80_s=1.1 * seconds, peak_bytes=clients * 2**20)
            timed |= dict(repeats=3, first_s=seconds, compared_with="reference")
            timed |= dict(to_mean=share * 1000, to_mean_low=share * 950, to_mean_high=share * 1050)
            timed |= dict(to_passes=share * 10, to_passes_low=share * 8, to_passes_high=share * 12)
            if (clients, provider) == (5000, "reference"):
                timed = dict(status="out of memory", detail="you tried to | allocate")
            common = dict(case="cnn", what="solvers", model="cnn", clients=clients, params=139_960, dtype="float32")
            rows.append(Row(**common, mask_steps=20, root_samples=100, provider=provider, **timed, device="a CPU", threads=2))
        rows.append(replace(rows[-1], case="rules", what="rules", provider="skymask"))
    return rows


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = made_rows()
    write_rows(tmp_path / "bench.csv", rows)
    assert read_rows(tmp_path / "bench.csv") == rows
    assert [row.to_500 for row in rows if row.provider == "collapsed"] == pytest.approx([0.1, 1.0, 10.0])
    rows[1].moved_bytes, rows[0].moved_bytes, rows[0].provider = 2 * 10**9, 10**9, COPY
    write_rows(tmp_path / "bench.csv", rows)
    assert rows[1].of_copy == pytest.approx(2 * rows[0].median_s / rows[1].median_s)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than this benchmark writes"):
        read_rows(tmp_path / "other.csv")


def test_times_are_the_median_and_the_20th_and_80th_percentile() -> None:
    row = made_rows()[0]
    row.set_times([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert (row.median_s, row.p20_s, row.p80_s, row.repeats) == (3.5, 2.0, 5.0, 6)


def test_the_summary_has_every_row_with_a_time_or_a_reason(tmp_path: Path) -> None:
    write_summary(made_rows(), tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text()
    assert "## cnn, N = 500, P = 139,960, float32, model cnn, 20 mask steps, 100 root samples" in text
    assert "| collapsed | 200 ms (180 ms - 220 ms) |  | 1.6 to 2.4 | 200 | 500 | 200 ms | reference |" in text
    assert "| cnn, float32 | 5,000 | reference | out of memory | you tried to / allocate |" in text
    rows = [replace(row, to_before=1.1, to_before_low=1.0, to_before_high=1.2) for row in made_rows()[:1]]
    write_summary(rows, tmp_path / "summary.md")
    assert "| x before | peak MiB |" in (tmp_path / "summary.md").read_text()
    assert "| 1 to 1.2 |" in (tmp_path / "summary.md").read_text()
    write_summary([], tmp_path / "summary.md")
    assert "Nothing was measured" in (tmp_path / "summary.md").read_text()


def test_plots_are_drawn_with_a_line_a_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.plot_time(made_rows(), tmp_path / "time.png")
    solvers_axes, _ = drawn[0].axes
    lines = {line.get_label(): line for line in solvers_axes.lines}
    assert set(lines) == {MEAN, PASSES, "reference", "collapsed", "out of memory (see summary)"}
    assert lines[MEAN].get_linestyle() == lines[PASSES].get_linestyle() == "--"
    assert lines["reference"].get_xydata().tolist() == [[50, 0.1], [500, 1.0]]
    assert lines["out of memory (see summary)"].get_xdata().tolist() == [5000]
    assert (solvers_axes.get_xscale(), solvers_axes.get_yscale()) == ("log", "log")


def test_plots_are_files_and_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    for plot in (plots.plot_time, plots.plot_memory):
        plot(made_rows(), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    plots.plot_time([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_command_keeps_what_is_there_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextmanager
    def memory_kept() -> Iterator[None]:
        events.append("kept")
        try:
            yield
        finally:
            events.append("given back")

    def stopped(*_: Any) -> Iterator[Row]:
        events.append("measuring")
        yield made_rows()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("skymask_gpu.bench.measure.freed_memory_kept", memory_kept)
    monkeypatch.setattr(run, "measure_cases", stopped)
    done = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path / "bench")])
    assert done.exit_code == 130
    assert "x reference" in done.output
    assert "mean" in done.output, "what was measured is printed as a table"
    assert events == ["kept", "measuring", "given back"]
    assert read_rows(tmp_path / "bench" / "bench.csv") == made_rows()[:1]
    assert (tmp_path / "bench" / "time.png").exists()
    again = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path / "bench")])
    assert "holds results already" in str(again.exception)
    unknown = CliRunner().invoke(app, ["bench", "--case", "cnm", "--out", str(tmp_path / "other")])
    assert "--case must be one of cnn, rules, round, logreg, resnet20, resnet18, got 'cnm'" in str(unknown.exception)
