"""The board: honest clients train once, every attack strikes their updates, every rule judges; sets are stored and resumed."""

import csv
import doctest
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from skymask_gpu.cli import app
from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine import Clustering
from skymask_gpu.engine.registry import forget
from skymask_gpu.federation import plugins
from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.board import judging, making
from skymask_gpu.federation.board.config import CLUSTERINGS, Board, SetKey, read_board
from skymask_gpu.federation.board.judging import auc, judge_sets, lines, verdict
from skymask_gpu.federation.board.making import MODELS, SETS, make_sets, missing_sets
from skymask_gpu.federation.board.mask_set import MaskSet
from skymask_gpu.federation.board.page import trajectory_summary, write_board
from skymask_gpu.federation.board.trajectories import Ended, ended, trajectory_runs
from skymask_gpu.federation.config import read_grid
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import METRICS
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.federation.sweep import cell_folder
from skymask_gpu.io.files import read_lines

PLUGIN = """
import torch
from skymask_gpu.federation.rules import RULES, RuleResult

@RULES.register("first-half")
def first_half(updates_MP, info):
    kept_M = torch.arange(len(updates_MP)) < len(updates_MP) // 2
    return RuleResult(updates_MP[kept_M].mean(0), kept_M)
"""
BOARD = """
rounds = [0, 2]
rules = ["median", "bulyan", "first-half"]
plugins = ["RULE"]
[data]
clients = 12
root_samples = 60
[model]
name = "logreg"
[local]
grad_clip = inf
[[recipes]]
name = "few"
local = { steps = 4, batch_size = 16 }
[[recipes]]
name = "dirichlet"
data = { partition = "dirichlet", alpha = 0.5 }
[[attacks]]
name = "none"
[[attacks]]
name = "label-flip"
shares = [0.25]
[[attacks]]
name = "ipm"
label = "ipm 2.0"
epsilon = 2.0
shares = [0.25]
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One file for all boards here: a name can be registered by one file only."""
    path = tmp_path_factory.mktemp("plugin") / "rule.py"
    path.write_text(PLUGIN)
    yield path
    forget(str(path))
    plugins._LOADED.pop(path, None)


def written(folder: Path, plugin: Path, text: str = BOARD) -> Path:
    (folder / "board.toml").write_text(text.replace("RULE", str(plugin)))
    return folder / "board.toml"


@pytest.fixture(scope="module")
def made(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Board, Path]:
    """A board and the folder that its command wrote."""
    folder = tmp_path_factory.mktemp("board")
    done = CliRunner().invoke(app, ["board", str(written(folder, plugin)), "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    return read_board(folder / "board.toml"), folder / "out"


def assert_same(one: MaskSet, other: MaskSet) -> None:
    """To the bit; the files may differ in the order of their metadata."""
    for name, value in vars(one).items():
        wanted = vars(other)[name]
        if name == "kept":
            assert value.keys() == wanted.keys()
            assert all(torch.equal(value[rule], wanted[rule]) for rule in value)
        else:
            assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted, name


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "board.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_line_per_recipe_attack_and_rule(made: tuple[Board, Path]) -> None:
    _, folder = made
    table = table_of(folder)
    rules = [f"skymask {clustering}" for clustering in CLUSTERINGS] + ["median", "bulyan", "first-half"]
    assert [(line["recipe"], line["attack"], line["rule"]) for line in table] == [
        (recipe, attack, rule)
        for recipe in ("few", "dirichlet")
        for attack in ("none", "label-flip", "ipm 2.0")
        for rule in rules
    ]
    assert {line["sets"] for line in table} == {"2"}
    by_name = {(line["attack"], line["rule"]): line for line in table}
    # the plugin keeps the first six of twelve clients, of whom the first three attack
    half = by_name["label-flip", "first-half"]
    assert (float(half["fpr"]), float(half["fnr"]), half["wrong_side"]) == (6 / 9, 1.0, "2")
    assert by_name["none", "first-half"]["fnr"] == ""
    # who judges nobody has a step all the same, and Bulyan is not defined for 3 attackers of 12
    assert (by_name["ipm 2.0", "median"]["fpr"], by_name["ipm 2.0", "median"]["accuracy"] != "") == ("", True)
    assert (by_name["ipm 2.0", "bulyan"]["fpr"], by_name["ipm 2.0", "bulyan"]["accuracy"]) == ("", "")
    assert "bulyan could not judge 8 of its sets" in (folder / "board.md").read_text()
    assert float(by_name["ipm 2.0", "skymask signed"]["auc_agreement"]) > 0.9
    page = (folder / "board.html").read_text()
    assert page.count('class="map"') == 5
    assert page.count("judged nobody") == 1


def test_the_updates_and_verdicts_of_a_set_are_those_of_a_run(made: tuple[Board, Path]) -> None:
    """The stored masks lead to the verdicts of SkyMask on the updates that a run with this attack has."""
    board, folder = made
    for attack in ("none", "label-flip", "ipm 2.0"):
        key = SetKey("few", 0, attack, 0)
        federation = making.Federation.build(board.run_of(key))
        recorder = making._Recorder()
        object.__setattr__(federation, "rule", recorder)
        federation.play_round(0, federation.first_model())
        root, data, local = federation.parts[-1], federation.dataset, federation.config.local
        stored = MaskSet.read(folder / SETS / key.file_name)
        for clustering in CLUSTERINGS:
            defence = SkyMask(
                federation.module,
                data.train_inputs[root],
                data.train_labels[root],
                clustering=Clustering(rule=clustering),
                root_training=RootTraining(lr=local.lr, grad_clip=local.grad_clip),
            )
            result = defence.aggregate(recorder.updates_NP, recorder.info.global_params, recorder.info.root_update)
            assert torch.equal(verdict(stored, clustering), result.benign), (attack, clustering)
        # malicious clients that train on other data are trained beside fewer others, which may
        # change the last digits of a sum
        torch.testing.assert_close(stored.norms, recorder.updates_NP.double().norm(dim=1), rtol=1e-5, atol=0)
        assert torch.equal(stored.malicious, federation.malicious)


def test_only_what_is_missing_is_made_and_it_is_made_the_same(
    made: tuple[Board, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, folder = made
    lost = SetKey("dirichlet", 0, "label-flip", 2)
    path = folder / SETS / lost.file_name
    before, others = MaskSet.read(path), {p: p.stat().st_mtime_ns for p in (folder / SETS).iterdir() if p != path}
    path.unlink()
    rounds: list[int] = []
    play_round = making.Federation.play_round
    monkeypatch.setattr(
        making.Federation, "play_round", lambda self, at, *rest: rounds.append(at) or play_round(self, at, *rest)
    )
    assert missing_sets(board, folder) == [lost]
    assert list(make_sets(board, [lost], folder)) == [lost]
    # from the stored model: rounds 0 and 1 are not trained again
    assert rounds == [2]
    assert_same(MaskSet.read(path), before)
    assert {p: p.stat().st_mtime_ns for p in others} == others
    # without the stored models too
    for model in (folder / MODELS).iterdir():
        model.unlink()
    path.unlink()
    assert list(make_sets(board, [lost], folder)) == [lost]
    assert rounds == [2, 0, 1, 2]
    assert_same(MaskSet.read(path), before)


def test_stored_sets_judged_again_give_the_same_table(made: tuple[Board, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = made
    before = [(folder / name).read_bytes() for name in ("board.csv", "board.md")]
    monkeypatch.setattr(making, "make_sets", None)
    toml = str(folder.parent / "board.toml")
    for option in ("--judge-only", "--resume"):
        (folder / "board.csv").unlink()
        done = CliRunner().invoke(app, ["board", toml, "--out", str(folder), option])
        assert done.exit_code == 0, done.output
        assert [(folder / name).read_bytes() for name in ("board.csv", "board.md")] == before


def test_a_verdict_that_nobody_measured_has_no_accuracy(made: tuple[Board, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    board, folder = made
    only_last = torch.arange(12) == 11
    monkeypatch.setattr(judging, "verdict", lambda made, clustering: only_last)
    for line in lines(judge_sets(board, folder / SETS)):
        if line.rule.startswith("skymask") and line.attack != "none":
            assert (line.fpr, line.fnr, line.accuracy, line.worse_than_fedavg) == (8 / 9, 0.0, None, None)


def test_a_new_rule_is_shown_to_every_set_and_other_settings_are_refused(made: tuple[Board, Path], plugin: Path) -> None:
    _, folder = made
    more = read_board(written(folder.parent, plugin, BOARD.replace('"median", ', '"median", "krum", ')))
    assert missing_sets(more, folder) == list(more.set_keys())
    fewer = read_board(written(folder.parent, plugin, BOARD.replace('"median", ', "")))
    assert missing_sets(fewer, folder) == []
    other = read_board(written(folder.parent, plugin, BOARD.replace("clients = 12", "clients = 13")))
    with pytest.raises(ValueError, match=r"made with other settings \(data\); use another folder or --overwrite"):
        missing_sets(other, folder)
    written(folder.parent, plugin)


def test_a_damaged_set_is_named_with_the_remedy(made: tuple[Board, Path], tmp_path: Path) -> None:
    board, _ = made
    path = tmp_path / next(board.set_keys()).file_name
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"few\.0\.none\.0\.safetensors is no safetensors file.*--resume makes it anew"):
        judge_sets(board, tmp_path)
    with pytest.raises(ValueError, match="holds no mask set of this board"):
        write_board("empty", [], [], tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds = [0, 2]", "round = [0]", "unknown key round; did you mean rounds"),
        ("rounds = [0, 2]", "rounds = [-1]", "rounds must be at least 0, which is the first, got -1"),
        ("rounds = [0, 2]", "rounds = []", "rounds must not be empty"),
        ("rounds = [0, 2]", "rounds = [1, 1]", "rounds must differ, got 1 more than once"),
        ("rounds = [0, 2]", 'clusterings = ["singed"]', "clusterings must be one of .*did you mean 'signed'"),
        ('"median", ', '"medain", ', "did you mean 'median'"),
        ('"median", ', '"median", "median", ', "rules must differ, got median"),
        ('name = "dirichlet"', 'name = "few"', "the names of recipes must differ, got few"),
        ('name = "dirichlet"', 'name = "a.b"', "must have no dot, got 'a.b'"),
        ("steps = 4", "step = 4", "recipe 'few': unknown key local.step; did you mean local.steps"),
        ("epsilon = 2.0", "epsilom = 2.0", r"unknown key attacks\[2\]\.epsilom; did you mean attacks\[2\]\.epsilon"),
        ('label = "ipm 2.0"', 'label = "none"', r"the labels of attacks .* must differ, got none"),
        ('label = "ipm 2.0"', 'label = "a/b"', r"attacks\[2\]\.label must be usable as a file's name, got 'a/b'"),
        ("shares = [0.25]\n[[", "share = 0.25\n[[", r"attacks\[1\]\.share: write shares = \[0\.25\]"),
        ("shares = [0.25]\n[[", "shares = [0.99]\n[[", "attack.share must leave an honest client"),
        ('[[attacks]]\nname = "none"', "[[attacks]]", r"attacks\[0\]\.name must be given"),
        ("[data]", "[trajectories]\nrounds = -1\n[data]", "trajectories.rounds must be at least 0"),
        ("[data]", '[trajectories]\nrounds = 1\nrules = ["skymask singed"]\n[data]', "did you mean 'skymask signed'"),
        ("[data]", '[trajectories]\nrounds = 1\nattacks = ["ipm"]\n[data]', "did you mean 'ipm 2.0'"),
        ('[[attacks]]\nname = "none"', '[attack]\nname = "none"', "unknown key attack; did you mean attacks"),
    ],
)
def test_wrong_input_has_one_clear_error(old: str, new: str, message: str, plugin: Path, tmp_path: Path) -> None:
    assert old in BOARD
    with pytest.raises(ValueError, match=message):
        read_board(written(tmp_path, plugin, BOARD.replace(old, new, 1)))


def test_the_command_refuses_a_folder_with_results_and_says_how_to_go_on(made: tuple[Board, Path]) -> None:
    _, folder = made
    toml = str(folder.parent / "board.toml")
    done = CliRunner().invoke(app, ["board", toml, "--out", str(folder)])
    assert isinstance(done.exception, ValueError)
    assert "go on with --resume or start anew with --overwrite" in str(done.exception)
    done = CliRunner().invoke(app, ["board", toml, "--out", str(folder), "--judge-only", "--overwrite"])
    assert "exclude each other" in str(done.exception)


def test_ctrl_c_says_how_to_go_on(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making._Cell, "_mask_set", stopped)
    done = CliRunner().invoke(app, ["board", str(written(tmp_path, plugin)), "--out", str(tmp_path / "out")])
    assert done.exit_code == 130
    assert "go on with: skymask-gpu board" in done.output
    assert "--resume" in done.output


TRAJECTORIES = """
[trajectories]
rounds = 2
recipes = ["few"]
attacks = ["ipm 2.0"]
rules = ["skymask signed", "first-half"]
"""


def test_whole_runs_are_compared_with_fedavg_under_the_same_attack_and_without(plugin: Path, tmp_path: Path) -> None:
    board = read_board(written(tmp_path, plugin, BOARD.replace("[data]", TRAJECTORIES + "[data]")))
    runs = trajectory_runs(board)
    assert [(run.attack.name, run.defence.rule) for run in runs] == [
        (attack, rule) for attack in ("none", "ipm") for rule in ("fedavg", "skymask", "first-half")
    ]
    assert {(run.rounds, run.seed, run.local.steps, run.model.name) for run in runs} == {(2, 0, 4, "logreg")}
    assert {run.defence.settings.clustering for run in runs if run.defence.rule == "skymask"} == {"signed"}
    for run in runs[:-1]:
        for _ in play(Federation.build(run), cell_folder(tmp_path, run)):
            pass
    # the last run is not done, so the table goes without it
    found = {(one.attack, one.rule): one for one in ended(board, tmp_path)}
    assert list(found) == [("none", "skymask signed"), ("none", "first-half"), ("ipm 2.0", "skymask signed")]
    records = {run.name: read_lines(cell_folder(tmp_path, run) / METRICS) for run in runs[:-1]}
    attacked = found["ipm 2.0", "skymask signed"]
    of_run = records["few.0.ipm 2.0.skymask signed"]
    assert attacked.accuracy == of_run[-1]["accuracy"]
    assert attacked.accuracy_fedavg == records["few.0.ipm 2.0.fedavg"][-1]["accuracy"]
    assert attacked.accuracy_unattacked == records["few.0.none.fedavg"][-1]["accuracy"]
    assert attacked.fnr == sum(record["false_negative_rate"] for record in of_run) / 2
    assert found["none", "first-half"].fpr == 0.5
    # one of several rounds is no whole run
    path = cell_folder(tmp_path, runs[1]) / METRICS
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert ("none", "skymask signed") not in {(one.attack, one.rule) for one in ended(board, tmp_path)}


def test_the_summary_of_whole_runs_counts_misses() -> None:
    one = Ended("few", 0, "ipm", "median", None, None, 0.80, 0.70, 0.81, None)
    low = replace(one, accuracy=0.795)
    lower = replace(one, accuracy=0.68, attack_success=0.25, fpr=0.1)
    alone = replace(one, accuracy_fedavg=None, accuracy_unattacked=None)
    assert (one.within, low.within, lower.within, alone.within) == (True, False, False, None)
    assert (low.worse_than_fedavg, lower.worse_than_fedavg, alone.worse_than_fedavg) == (False, True, None)
    assert trajectory_summary([one, low, lower, alone]) == [["median", "4", "1 of 3", "1 of 3", "25.0%", "10.0%", "-"]]


@pytest.mark.slow
def test_processes_side_by_side_make_the_same_sets_and_whole_runs(made: tuple[Board, Path], tmp_path: Path) -> None:
    board, folder = made
    toml = written(
        tmp_path, folder.parent, (folder.parent / "board.toml").read_text().replace("[data]", TRAJECTORIES + "[data]")
    )
    done = CliRunner().invoke(app, ["board", str(toml), "--out", str(tmp_path / "out"), "--jobs", "2"])
    assert done.exit_code == 0, done.output
    for key in board.set_keys():
        assert_same(MaskSet.read(tmp_path / "out" / SETS / key.file_name), MaskSet.read(folder / SETS / key.file_name))
    assert len((tmp_path / "out" / "trajectories.csv").read_text().splitlines()) == 1 + 4
    text = (tmp_path / "out" / "board.md").read_text()
    assert "## Whole runs" in text
    assert "## Whole runs" not in (folder / "board.md").read_text()


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert doctest.testmod(judging).failed == 0
    assert auc(torch.tensor([1.0]), torch.tensor([])) is None
    attackers, honest = torch.randn(7).round(), torch.randn(9).round()
    pairs: list[Tensor] = [a < h if a != h else torch.tensor(0.5) for a in attackers for h in honest]
    assert auc(attackers, honest) == pytest.approx(sum(map(float, pairs)) / 63)


def test_the_example_reads_and_names_most_attacks(checkout: Path) -> None:
    board = read_board(checkout / "examples" / "board.toml")
    assert list(board.recipes) == ["few", "noclip", "epoch", "momentum", "dirichlet", "iid"]
    whole_runs = {
        run.attack.name
        for name in ("arena_untargeted", "arena_backdoors")
        for run in read_grid(checkout / f"examples/{name}.toml")
    }
    named = {attack.name for attack in board.attacks.values()}
    assert named | whole_runs == {*ATTACKS} - {"layers"}
    assert len(list(board.set_keys())) == 6 * 3 * len(board.attacks)


def test_the_smaller_examples_read(checkout: Path) -> None:
    digits = read_board(checkout / "examples" / "board_digits.toml")
    assert {run.data.clients for run in digits.recipes.values()} == {10, 20, 50, 100}
    assert len(list(digits.set_keys())) == 16 * 10 * 4
    whole = read_board(checkout / "examples" / "board_trajectories.toml")
    assert whole.trajectories is not None
    assert whole.trajectories.rounds == 10
    assert len(whole.trajectories.attacks) == 24
    board = read_board(checkout / "examples" / "board.toml")
    for name, run in whole.recipes.items():
        assert (run.local, run.data) == (board.recipes[name].local, board.recipes[name].data)
    photos = read_board(checkout / "examples" / "board_cifar10.toml")
    assert len(list(photos.set_keys())) == 4 * 6
