"""What happened from round to round: states of clients, positions of masks, strips of verdicts, the page's data and script."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skymask_gpu.report import FinishedRun, load_folders, missing_cells, write_report
from skymask_gpu.report.history import State, positions_by_round, verdicts, witness_by_round
from skymask_gpu.report.interactive import page_data
from skymask_gpu.report.plots_by_round import evenly_spaced, plot_masks_by_round, plot_rejections, plot_verdicts
from skymask_gpu.report.sweep import arrange


def record(number: int, rejected: list[int], clients: list[int] | None = None, **more: Any) -> dict[str, Any]:
    taking_part = 5 if clients is None else len(clients)
    return {
        "round": number, "accuracy": 0.1 * number, "participants": taking_part, "kept": taking_part - len(rejected),
        "rejected": rejected, "false_positive_rate": 0.25 * number, "false_negative_rate": 1.0 if number else None,
        **({} if clients is None else {"clients": clients}), **more,
    }  # fmt: skip


def finished(records: list[dict[str, Any]], name: str = "a", folder: Path = Path("a"), **settings: Any) -> FinishedRun:
    config = {"name": name, "rounds": len(records), "data": {"clients": 5}, "attack": {"name": "ipm", "share": 0.4}, **settings}
    return FinishedRun(config, folder, records, [])


KEPT, OUT, BAD_KEPT, BAD_OUT, ABSENT = (
    State.HONEST_KEPT, State.HONEST_REJECTED, State.ATTACKER_KEPT, State.ATTACKER_REJECTED, State.ABSENT,
)  # fmt: skip


def test_states_are_those_of_a_loop_over_clients_and_rounds() -> None:
    """Two of five clients attack; in round 2 three take part; round 3 is of an older version, which did not say who."""
    old = {**record(2, [4]), "participants": 3}
    found = verdicts(finished([record(0, [0, 3]), record(1, [1], clients=[1, 2, 4]), old]))
    assert found is not None
    assert (found.malicious, found.rounds) == (2, [0, 1, 2])
    unknown = State.UNKNOWN
    assert found.states.tolist() == [
        [BAD_OUT, ABSENT, unknown],
        [BAD_KEPT, BAD_OUT, unknown],
        [KEPT, KEPT, unknown],
        [OUT, ABSENT, unknown],
        [KEPT, KEPT, OUT],
    ]


def test_rules_that_judge_nobody_and_records_of_old_have_no_states() -> None:
    assert verdicts(finished([{**record(0, []), "kept": None}])) is None
    assert verdicts(finished([{"round": 0, "accuracy": 0.5}])) is None
    assert verdicts(FinishedRun({}, Path("a"), [record(0, [])], [])) is None
    peaceful = verdicts(finished([record(0, [2])], attack={"name": "none", "share": 0.0}))
    assert peaceful is not None
    assert peaceful.malicious == 0


def test_witnesses_go_to_the_clients_that_took_part() -> None:
    records = [record(0, [], keep_share=[0.1, 0.2, None, 0.4, 0.5]), record(1, [], clients=[1, 4], keep_share=[0.6, 0.7])]
    run = finished(records)
    table = witness_by_round(run, "keep_share", [0, 1], 5)
    assert table == [[0.1, None], [0.2, 0.6], [None, None], [0.4, None], [0.5, 0.7]]
    assert witness_by_round(run, "agreement", [0, 1], 5) is None


def test_positions_are_mirrored_to_resemble_the_round_before() -> None:
    first = [[1.0, 2.0], [3.0, -1.0], None, [0.5, 0.5], [2.0, 2.0], [-1.0, 0.0]]
    mirrored = [None if point is None else [-point[0], point[1]] for point in first]
    run = finished([record(0, [], positions=first), record(1, [], positions=mirrored), record(2, [])])
    found = positions_by_round(run, 5)
    assert list(found) == [0, 1], "round 2 recorded none"
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0][5], [-1.0, 0.0])
    assert np.isnan(found[0][2]).all()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from skymask_gpu.report import plots_by_round

    saved: dict[str, Any] = {}
    monkeypatch.setattr(plots_by_round, "save", lambda figure, path: saved.update({path.stem: figure}))
    return saved


def test_each_verdict_has_a_strip_of_its_own(figures: dict[str, Any]) -> None:
    """Two runs with the same rates: nothing lies on anything, and what was not judged is no zero."""
    records = [record(0, []), record(1, [3]), record(2, [3])]
    runs = [
        finished(records, "one"),
        finished(records, "two"),
        finished([{**records[0], "false_positive_rate": None}], "median"),
    ]
    assert plot_verdicts(runs, Path("verdicts.png"))
    axes, _ = figures["verdicts"].axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[0, 25, 50], [-1, 100, 100]] * 2
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == ["one: honest rejected", "one: attackers kept", "two: honest rejected", "two: attackers kept"]
    assert not plot_verdicts(runs[2:], Path("verdicts.png"))
    assert not plot_verdicts(runs * 3, Path("verdicts.png")), "too many runs for one picture"


def test_the_map_of_rejections_shows_the_states(figures: dict[str, Any]) -> None:
    runs = [finished([record(0, [0, 3]), record(1, [])], f"run {number}") for number in range(2)]
    assert plot_rejections(runs, Path("rejections.png"))
    axes = figures["rejections"].axes[0]
    (image,) = axes.images
    found = verdicts(runs[0])
    assert found is not None
    assert image.get_array().tolist() == found.states.tolist()
    assert image.get_extent() == [0.5, 2.5, 4.5, -0.5]
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5], "a line below the two attackers"
    (legend,) = figures["rejections"].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "honest, kept", "honest, rejected", "attacker, kept", "attacker, rejected"
    ]  # fmt: skip
    assert not plot_rejections([finished([{"round": 0}])], Path("rejections.png"))


def test_masks_of_every_round(figures: dict[str, Any]) -> None:
    points = [[1.0, 2.0], [3.0, -1.0], [0.0, 0.0], [0.5, 0.5], [2.0, 2.0], [-1.0, 0.0]]
    run = finished([record(number, [0, 3], positions=points) for number in range(30)])
    assert plot_masks_by_round([run], Path("masks.png"))
    panels = figures["masks"].axes
    assert len(panels) == 24
    honest, attackers, rejected, root = (drawn.get_offsets().data.tolist() for drawn in panels[0].collections)
    assert (honest, attackers, rejected, root) == (points[2:5], points[:2], [points[0], points[3]], points[5:])
    assert panels[-1].get_title() == "round 30"
    assert not plot_masks_by_round([finished([record(0, [])])], Path("masks.png"))
    assert evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]


def test_the_pages_data(tmp_path: Path) -> None:
    points = [[1.0, 2.0], None, [0.0, 0.0], [0.5, 0.5], [2.0, 2.0], [-1.0, 0.0]]
    run = finished([record(0, [0, 3], positions=points, agreement=[0.1] * 5), record(1, [])])
    (data,) = json.loads(json.dumps(page_data([run]), allow_nan=False))["runs"]
    assert data["rounds"] == [1, 2]
    assert data["false_negative_rate"] == [None, 1.0]
    assert "attack_success_rate" not in data
    assert data["clients"]["states"] == ["43", "33", "11", "21", "11"]
    assert data["clients"]["agreement"][0] == [0.1, None]
    assert data["clients"]["keep_share"] is None
    assert data["clients"]["positions"] == [points, None]
    # too much for a page: curves only
    huge = finished([record(0, [])], data={"clients": 10**6})
    assert "clients" not in page_data([huge])["runs"][0]


# --- folders side by side, formats ---------------------------------------------------------------


def written(folder: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    run = finished(records, folder.name, folder, **settings)
    (folder / "config.json").write_text(json.dumps(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder


def test_folders_are_compared_in_columns_side_by_side(tmp_path: Path) -> None:
    records = [record(0, [0]), record(1, [1])]
    for name in ("first", "second"):
        written(tmp_path / name / "SkyMask", records, defence={"rule": "skymask"})
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = load_folders(folders)
    assert [run.name for run in runs] == ["first: SkyMask", "second: SkyMask"]
    (block,) = arrange(runs).blocks
    assert block.rules == ["skymask (folder=first)", "skymask (folder=second)"]
    assert arrange(runs).left_out == [], "the same settings and seed in two folders are no repetition"
    report = write_report("both", runs, tmp_path / "out", sources=folders, picture_format="svg")
    assert "second: SkyMask" in report.page.read_text(encoding="utf-8")
    for name in ("rounds", "verdicts", "rejections"):
        assert (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert (tmp_path / "out" / f"{name}.png").exists()
    with pytest.raises(ValueError, match="the folders to compare must differ"):
        load_folders([folders[0], tmp_path / "second" / ".." / "first"])
    with pytest.raises(ValueError, match=r"--format must be one of svg, pdf, got 'jpg'"):
        write_report("both", runs, tmp_path / "out", picture_format="jpg")


def test_the_command_compares_two_folders_with_pictures_as_pdf(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    for name in ("first", "second"):
        written(tmp_path / name, [record(0, [0]), record(1, [1])], defence={"rule": "skymask"})
    out = tmp_path / "out"
    code, printed = run("report", tmp_path / "first", tmp_path / "second", "--out", out, "--format", "pdf")
    assert code == 0, printed
    assert "first and second" in printed
    for name in ("rounds", "verdicts", "rejections"):
        written_pdf = (out / f"{name}.pdf").read_bytes()
        assert written_pdf.startswith(b"%PDF-")
        assert b"%%EOF" in written_pdf[-1024:]
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.svg"))
    code, printed = run("report", tmp_path / "first", "--format", "eps")
    assert code == 2
    assert "--format must be one of svg, pdf, got 'eps'" in printed


def test_a_report_says_which_cells_are_missing(tmp_path: Path) -> None:
    written(tmp_path / "cells" / "a", [record(0, [])])
    (tmp_path / "sweep.json").write_text('{"cells": ["a", "b"]}')
    assert missing_cells(tmp_path) == ["b"]
    report = write_report("sweep", load_folders([tmp_path]), tmp_path)
    assert "<b>b</b>: no round is finished yet" in report.page.read_text(encoding="utf-8")
    assert "- b: no round is finished yet\n" in report.markdown.read_text(encoding="utf-8")


# --- the script, in a browser where there is one -------------------------------------------------

CLICKS = """
<script>
var said = [];
function say(name, value) { said.push(name + "=" + value); }
var keys = document.querySelectorAll("#keys .key");
say("keys", keys.length);
say("charts", document.querySelectorAll("#charts svg").length);
keys[0].click();
say("hidden", document.querySelectorAll('#charts g[style*="none"]').length);
keys[0].click();
say("shown", document.querySelectorAll('#charts g[style*="none"]').length);
var table = document.querySelector("table"), head = table.querySelectorAll("th")[3];
head.click(); say("up", table.tBodies[0].rows[0].cells[0].textContent);
head.click(); say("down", table.tBodies[0].rows[0].cells[0].textContent);
var map = document.getElementById("map"), box = map.getBoundingClientRect();
map.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + 34 + 45, clientY: box.top + 16 + 18}));
say("about", document.getElementById("about").textContent);
say("history", document.querySelectorAll("#history svg").length);
say("circles", document.querySelectorAll("#masks circle").length);
document.title = said.join("; ");
</script>
"""


def test_the_page_sorts_toggles_and_tells_histories(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium to run the page's script in")
    points = [[1.0, 2.0], None, [0.0, 0.0], [0.5, 0.5], [2.0, 2.0], [-1.0, 0.0]]
    records = [record(number, [1, 3], positions=points, agreement=[0.5] * 5, keep_share=[0.5] * 5) for number in range(3)]
    written(tmp_path / "a", records)
    written(tmp_path / "b", [{**line, "accuracy": 0.05} for line in records])
    page = write_report("t", load_folders([tmp_path]), tmp_path).page.read_text(encoding="utf-8")
    (tmp_path / "clicked.html").write_text(page.replace("</body>", f"{CLICKS}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "clicked.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    said = dict(part.split("=", 1) for part in title.split("; ", 7))
    assert said["keys"] == "2"
    assert said["charts"] == "3"
    assert (said["hidden"], said["shown"]) == ("3", "0")
    assert (said["up"], said["down"]) == ("b", "a")
    assert "Client 1, an attacker: in round 2 rejected; rejected in 3 of 3 rounds (1, 2, 3)." in title
    assert "history=2" in title
    assert "circles=4" in title
