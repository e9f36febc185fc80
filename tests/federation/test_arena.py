"""The arena: its file, the score of the worst attack, and a tiny one through the command line."""

import dataclasses
import functools
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skymask_gpu.federation import simulation, sweep
from skymask_gpu.federation.arena.config import Arena, Key, read_arena
from skymask_gpu.federation.arena.page import write_arena
from skymask_gpu.federation.arena.scoring import attack_lines, half_width, rule_lines, score
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.sweep import most_held, planned_cells
from skymask_gpu.report.summary import FinishedRun

Run = Callable[..., tuple[int, str]]

TINY = """
rounds = 2
warmup_rounds = 2
shares = [0.2]
rules = ["fedavg", { rule = "median", label = "my median" }]
[data]
clients = 10
root_samples = 40
[model]
name = "logreg"
[local]
steps = 2
[[recipes]]
name = "few"
[[attacks]]
name = "sign-flip"
[[attacks]]
name = "ipm"
label = "ipm 2"
epsilon = 2.0
[[attacks]]
name = "scaling-backdoor"
"""


def arena_of(folder: Path, text: str = TINY) -> Arena:
    (folder / "tiny.toml").write_text(text)
    return read_arena(folder / "tiny.toml")


def finished(accuracy: float, success: float | None = None, *, diverged: bool = False) -> FinishedRun:
    first = {"round": 0, "accuracy": None, "attack_success_rate": None, "false_positive_rate": 1.0, "diverged": False}
    last = {**first, "round": 1, "accuracy": accuracy, "attack_success_rate": success, "false_positive_rate": 0.25}
    return FinishedRun({"rounds": 2}, Path("made-up"), [first, {**last, "diverged": diverged}], [])


# --- scores, on made-up records ---------------------------------------------------------------------

ATTACKS = {"none": None, "weak": None, "strong": None, "backdoor": 0.7}
ACCURACIES = {"none": 0.9, "weak": 0.8, "strong": 0.3, "backdoor": 0.85}


def made_up(seeds: tuple[int, ...] = (0, 1)) -> dict[Key, FinishedRun]:
    """One rule; the second seed is 0.02 better each time."""
    return {
        Key("r", "early", 0.2 * (attack != "none"), attack, "median", seed): finished(
            ACCURACIES[attack] + 0.02 * seed, ATTACKS[attack]
        )
        for attack in ATTACKS
        for seed in seeds
    }


def test_a_rule_is_as_good_as_its_worst_attack() -> None:
    runs = made_up()
    (line,) = rule_lines(attack_lines(runs, runs))
    # By accuracy alone, "strong" would be the worst; the backdoor leaves 0.85 - 0.7.
    assert line.worst_attack == "backdoor"
    assert line.score == pytest.approx(0.16)
    assert line.unattacked == pytest.approx(0.91)
    assert line.interval == pytest.approx(12.706 * statistics.stdev([0, 0.02]) / 2**0.5, rel=1e-4)
    assert line.fpr == 0.25, "the first round does not count"
    assert (line.runs, line.planned) == (8, 8)
    (one_seed,) = rule_lines(attack_lines(made_up((0,)), made_up((0,))))
    assert one_seed.score == pytest.approx(0.15)
    assert one_seed.interval is None


def test_the_worst_attack_is_found_over_seeds_and_not_in_each() -> None:
    """An attacker does not know the seed: the mean decides, even if another attack has the lowest single run."""
    runs = made_up()
    for seed, accuracy in ((0, 0.0), (1, 0.9)):
        runs[Key("r", "early", 0.2, "weak", "median", seed)] = finished(accuracy)
    (line,) = rule_lines(attack_lines(runs, runs))
    assert line.worst_attack == "backdoor"


@pytest.mark.parametrize("attack", ["weak", "strong", "backdoor"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_run_is_no_good_score(attack: str, seed: int, tmp_path: Path) -> None:
    runs = made_up()
    keys = list(runs)
    del runs[Key("r", "early", 0.2, attack, "median", seed)]
    lines = attack_lines(keys, runs)
    (line,) = rule_lines(lines)
    assert (line.score, line.worst_attack, line.interval, line.fpr) == (None, None, None, None)
    assert (line.runs, line.planned) == (7, 8)
    assert {one.attack: one.score is None for one in lines} == {name: name == attack for name in ATTACKS}
    results = SimpleNamespace(attacks=lines, rules=[line], costs=[], runs=7, planned=8, document=dict)
    page = write_arena("t", results, [("a cell", "ValueError: <b>")], tmp_path)[-1].read_text()  # type: ignore[arg-type]
    row = re.findall(r"<td>(.*?)</td>", page[: page.index("Every attack")])
    assert row[4:7] == ["-", "-", "-"]
    assert row[-1] == "7 of 8"
    assert "ValueError: &lt;b&gt;" in page


CLICKS = """
<script>
var said = [], table = document.querySelector("table"), head = table.querySelectorAll("th")[4];
function column(number) {
  return Array.prototype.slice.call(table.tBodies[0].rows).filter(function (row) { return !row.hidden; })
    .map(function (row) { return row.cells[number].textContent; }).join(" ");
}
head.click(); said.push(column(4));
head.click(); said.push(column(4));
var lists = document.querySelector(".filters").querySelectorAll("select");
said.push(lists.length);
lists[3].value = "krum"; lists[3].dispatchEvent(new Event("change"));
said.push(column(3)); said.push(document.querySelector(".filters span").textContent);
document.title = said.join("; ");
</script>
"""


def test_the_rows_of_the_page_sort_and_filter(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium to run the page's script in")
    (line,) = rule_lines(attack_lines(made_up(), made_up()))
    scores = {"median": 0.16, "krum": -0.25, "skymask": None, "fedavg": 0.9}
    rules = [dataclasses.replace(line, rule=rule, score=score) for rule, score in scores.items()]
    results = SimpleNamespace(attacks=[], rules=rules, costs=[], runs=8, planned=8, document=dict)
    page = write_arena("t", results, [], tmp_path)[-1]  # type: ignore[arg-type]
    page.write_text(page.read_text().replace("</body>", f"{CLICKS}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    # What is missing comes last, however the rows are sorted.
    assert title == "-25.0 16.0 90.0 -; 90.0 16.0 -25.0 -; 5; krum; 1 of 4 rows"


def test_a_missing_run_without_attack_leaves_the_score() -> None:
    runs = made_up()
    keys = list(runs)
    del runs[Key("r", "early", 0.0, "none", "median", 0)]
    (line,) = rule_lines(attack_lines(keys, runs))
    assert line.score == pytest.approx(0.16)
    assert line.unattacked is None


def test_scores_and_intervals() -> None:
    assert score(finished(0.75)) == 0.75
    assert score(finished(0.25, 1.0)) == -0.75
    assert half_width([0.5]) is None
    assert half_width([0.5, 0.5, 0.5]) == 0


# --- the file -----------------------------------------------------------------------------------------


def test_the_runs_of_an_arena(tmp_path: Path) -> None:
    arena = arena_of(tmp_path, TINY.replace("shares = [0.2]", "shares = [0.2, 0.5]\nseeds = [0, 3]"))
    assert [(run.name, run.rounds, run.defence.rule, run.attack.name) for run in arena.warm_ups()] == [
        (f"few,warm-up,seed={seed}", 2, "fedavg", "none") for seed in (0, 3)
    ]
    runs = arena.runs(tmp_path / "out")
    # seeds x starts x rules x (no attack, and each attack at each share)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * (1 + 3 * 2)
    by_name = {run.name: run for run in runs}
    trained = by_name["few,trained,ipm 2 50%,my median,seed=3"]
    assert trained.start == str(tmp_path / "out" / "cells" / "few,warm-up,seed=3" / "checkpoint.safetensors")
    assert (trained.attack.settings.epsilon, trained.attack.num_malicious(10), trained.defence.rule) == (2.0, 5, "median")
    assert by_name["few,early,none,fedavg,seed=0"].start == ""
    shards = [arena.shard(f"{number}/2") for number in (1, 2)]
    assert sorted(run.name for shard in shards for run in shard.runs(tmp_path / "out")) == sorted(by_name)
    assert [shard.pairs for shard in shards] == [(("few", 0),), (("few", 3),)]


def test_a_recipe_may_be_played_in_a_part_of_the_arena(tmp_path: Path) -> None:
    part = 'name = "few"\nstarts = ["early"]\nattacks = ["scaling-backdoor", "ipm 2"]\nrules = ["my median"]'
    arena = arena_of(tmp_path, TINY.replace('name = "few"', part))
    assert arena.warm_ups() == []
    # in the order of the arena
    assert [(cell.attack, cell.rule) for cell in arena.cells()] == [
        (attack, "my median") for attack in ("none", "ipm 2", "scaling-backdoor")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "few"', 'name = "few"\nattacks = ["ipm"]'), "attacks of recipe 'few' must be one of .* got 'ipm'"),
        (("shares = [0.2]", "shares = [0.0, 0.2]"), "shares must be above 0 and below 1, got 0.0; runs without attack are"),
        (("shares = [0.2]", "shares = []"), "shares must not be empty"),
        (("shares = [0.2]", "starts = ['late']"), "starts must be one of early, trained, got 'late'"),
        (("warmup_rounds = 2", "warmup_rounds = 0"), "warmup_rounds must be at least 1, got 0"),
        (('label = "my median"', 'label = "fedavg"'), "labels of rules .* must differ, got fedavg more than once"),
        (('label = "my median"', 'label = "a,b"'), "the name of rule 'a,b' must have no comma"),
        (('label = "my median"', 'label = "a/b"'), "label must be usable as a file's name, got 'a/b'"),
        (('"fedavg", ', '"fedavgs", '), "defence.rule must be one of .*did you mean|defence.rule .*fedavg"),
        (('"fedavg", ', "{ trials = 2 }, "), r"rules\[0\]\.rule must be given"),
        (('name = "sign-flip"', 'name = "none"'), "attacks.0..name must not be 'none'; runs without attack are always"),
        (('name = "sign-flip"', 'name = "sign-flip"\nshares = [0.1]'), "attacks.0..shares: the arena's own shares"),
        (("rounds = 2\nwarm", "round = 2\nwarm"), "unknown key round; did you mean rounds"),
    ],
)
def test_what_an_arena_refuses(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in TINY
    with pytest.raises(ValueError, match=message):
        arena_of(tmp_path, TINY.replace(*change, 1))


def test_recipes_that_need_files_are_left_out_without_a_folder(tmp_path: Path) -> None:
    mnist = '[[recipes]]\nname = "mnist"\ndata = { dataset = "mnist" }\n'
    arena = arena_of(tmp_path, TINY.replace("[[attacks]]", f"{mnist}[[attacks]]", 1))
    short, left_out = arena.with_data(None)
    assert left_out == ["mnist"]
    assert {cell.recipe for cell in short.cells()} == {"few"}
    assert [run.name for run in short.warm_ups()] == ["few,warm-up,seed=0"]
    whole, left_out = arena.with_data(Path("somewhere"))
    assert left_out == []
    assert {run.data.data_dir for run in whole.runs(tmp_path)} == {"somewhere"}
    only = arena_of(tmp_path, TINY.replace('name = "few"', 'name = "few"\ndata = { dataset = "mnist" }'))
    with pytest.raises(ValueError, match="--data-dir must be given: each recipe of the arena needs"):
        only.with_data(None)


def test_the_examples_read(checkout: Path) -> None:
    full = read_arena(checkout / "examples" / "arena.toml")
    assert [*full.attacks] == [0.1, 0.2, 0.5, 0.8]
    assert {part.starts for part in full.parts.values()} == {("early", "trained")}
    short, left_out = read_arena(checkout / "examples" / "arena_short.toml").with_data(None)
    assert left_out == ["mnist"]
    assert (len(short.rules), [len(attacks) for attacks in short.attacks.values()]) == (10, [12])
    means, left_out = read_arena(checkout / "examples" / "masked_mean.toml").with_data(None)
    assert left_out == ["mnist"]
    assert {run.data.root_bias for run in means.warm_ups()} == {0.0, 0.5}
    assert {cell.rule for cell in means.cells()} == {"fedavg", "root-only", "root-finetune", "skymask", "masked", "half"}


# --- a tiny arena through the command line ------------------------------------------------------------


class Interrupt:
    """Cells are played in this process, which is faster; Ctrl-C comes before cell number ``at``."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.played = at, list[str]()

    def start(self, config: RunConfig, folder: Path, jobs: int, gpu: int | None) -> Any:
        if len(self.played) == self.at:
            raise KeyboardInterrupt
        self.played.append(config.name)
        sweep._play(config.to_dict(), folder, num_threads=1)
        return SimpleNamespace(is_alive=lambda: False, exitcode=0, terminate=lambda: None, join=lambda: None)


@pytest.fixture
def play(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, list[str]]]:
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0)
    # A cell's process loads its data; here, one process plays all cells.
    load = functools.cache(load_dataset)
    monkeypatch.setattr(simulation, "load_dataset", load)
    monkeypatch.setattr(sweep, "load_dataset", load)

    def play(out: str, *options: object, at: int | None = None) -> tuple[int, str, list[str]]:
        interrupt = Interrupt(at)
        monkeypatch.setattr(sweep, "_start", interrupt.start)
        code, printed = run("arena", tmp_path / "tiny.toml", "--out", tmp_path / out, *options)
        return code, printed, interrupt.played

    return play


def test_an_interrupted_arena_is_resumed_to_the_same_json(play: Callable[..., Any], tmp_path: Path) -> None:
    code, printed, played = play("whole")
    assert code == 0, printed
    assert played[0] == "few,warm-up,seed=0"
    assert len(played) == 1 + 2 * 2 * 4
    code, printed, before = play("stopped", at=7)
    assert code == 130
    assert f"go on with: skymask-gpu arena {tmp_path / 'tiny.toml'} --out {tmp_path / 'stopped'} --jobs 1 --resume" in printed
    code, printed, _ = play("stopped")
    assert code == 2
    assert "holds results already; go on with --resume" in printed
    code, printed, after = play("stopped", "--resume")
    assert code == 0, printed
    assert before + after == played, "what was done is not done again"
    whole, stopped = (json.loads((tmp_path / name / "arena.json").read_text()) for name in ("whole", "stopped"))
    assert (tmp_path / "whole" / "arena.json").read_bytes() == (tmp_path / "stopped" / "arena.json").read_bytes()
    assert (stopped["runs"], stopped["planned"]) == (16, 16)
    assert [(line["start"], line["rule"]) for line in whole["rules"]] == [
        (start, rule) for start in ("early", "trained") for rule in ("fedavg", "my median")
    ]
    for line in whole["rules"]:
        own = [one for one in whole["attacks"] if one["share"] and all(one[key] == line[key] for key in ("start", "rule"))]
        assert len(own) == 3
        assert line["score"] == min(one["score"] for one in own)
        backdoor = own[-1]
        assert backdoor["score"] == backdoor["accuracy"] - backdoor["attack_success"]
    check_page(tmp_path / "whole", whole)
    assert len(planned_cells(tmp_path / "whole")) == 17
    # A trained run starts where the warm-up ended, so it does not begin as a fresh model does.
    accuracies = {
        one["start"]: one["accuracy"] for one in whole["attacks"] if (one["attack"], one["rule"]) == ("none", "fedavg")
    }
    assert accuracies["early"] != accuracies["trained"]


def check_page(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "arena.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(link|img|iframe)|src=", page)
    rows = re.findall(r"<tr>(?:<td>.*?</td>)+</tr>", page)
    costs = json.loads((folder / "costs.json").read_text())
    assert len(rows) == len(found["rules"]) + len(found["attacks"]) + len(costs)
    line = found["rules"][0]
    cells = [line["recipe"], line["start"], "20%", line["rule"], f"{100 * line['score']:.1f}", "-", line["worst_attack"]]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert all(cost["seconds"] > 0 and cost["gigabytes"] > 0 for cost in costs)
    assert f"| {' | '.join(cells)} |" in (folder / "arena.md").read_text(encoding="utf-8")


def test_a_warm_up_that_was_killed_before_its_checkpoint_is_played_again(play: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--set", 'rules=["fedavg"]')
    assert play("out", *options)[0] == 0
    before = (tmp_path / "out" / "arena.json").read_bytes()
    shutil.rmtree(tmp_path / "out" / "cells" / next(n for n in planned_cells(tmp_path / "out") if "trained" in n))
    (tmp_path / "out" / "cells" / "few,warm-up,seed=0" / "checkpoint.safetensors").unlink()
    code, printed, played = play("out", *options, "--resume")
    assert code == 0, printed
    assert played[0] == "few,warm-up,seed=0"
    assert len(played) == 2
    assert (tmp_path / "out" / "arena.json").read_bytes() == before


def test_runs_whose_warm_up_failed_are_missing(
    play: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: RunConfig, folder: Path, jobs: int, gpu: int | None) -> Any:
        folder.mkdir(parents=True)
        (folder / sweep.ERROR).write_text("ValueError: no luck\n")
        return SimpleNamespace(is_alive=lambda: False, exitcode=1, terminate=lambda: None, join=lambda: None)

    real = Interrupt.start

    def start(self: Interrupt, config: RunConfig, folder: Path, jobs: int, gpu: int | None) -> Any:
        return (failing if "warm-up" in config.name else real.__get__(self))(config, folder, jobs, gpu)

    monkeypatch.setattr(Interrupt, "start", start)
    code, printed, _ = play("out", "--set", 'rules=["fedavg"]', "--json")
    assert code == 1
    found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    lost = [name for name in planned_cells(tmp_path / "out") if "trained" in name]
    assert len(lost) == 4
    because = dict.fromkeys(lost, "its warm-up 'few,warm-up,seed=0' failed")
    assert found["failed"] == {"few,warm-up,seed=0": "ValueError: no luck", **because}
    assert "5 of 9 runs failed" in printed
    assert {line["start"]: line["score"] is None for line in found["rules"]} == {"early": False, "trained": True}
    assert "few,warm-up,seed=0: ValueError: no luck" in (tmp_path / "out" / "arena.html").read_text()


def test_the_memory_of_a_cell(tmp_path: Path) -> None:
    assert most_held(tmp_path) is None
    sweep._write_most_held(tmp_path)
    held = most_held(tmp_path)
    assert held is not None
    assert held > 10e6
    (tmp_path / "memory.json").write_text(json.dumps({"bytes": 10 * held}))
    sweep._write_most_held(tmp_path)
    assert most_held(tmp_path) == 10 * held, "a resumed cell had an earlier process"
