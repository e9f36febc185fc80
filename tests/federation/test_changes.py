"""``--set key=value``: what a change does to the tables of a file, and to its runs."""

import json
from pathlib import Path

import pytest

from skymask_gpu.federation.changes import changed, changed_keys
from skymask_gpu.federation.config import RunConfig, read_config, read_grid
from skymask_gpu.federation.leak.config import read_audit

RUN = """
rounds = 3
[data]
clients = 20
[attack]
name = "min-max"
share = 0.2
direction = "sign"
"""
VARIANTS = RUN + '[[variants]]\nname = "a"\ndefence = { rule = "fedavg" }\n[[variants]]\nname = "b"\n'
GRID = RUN.replace('name = "min-max"\n', "") + '[grid]\n"attack.name" = ["min-max", "ipm"]\nseed = [0, 1]\n'


def write(folder: Path, text: str) -> Path:
    (folder / "file.toml").write_text(text)
    return folder / "file.toml"


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("a.b=3", 3),
        ("a.b = 3.5", 3.5),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ('a.b="3"', "3"),
        ("a.b=min-max", "min-max"),
        ("a.b=x = y", "x = y"),
        ("a.b=", ""),
        ("a.b=1\nc = 2", "1\nc = 2"),
        ('a."b"=3', 3),
    ],
)
def test_values_are_toml_or_else_strings(change: str, value: object) -> None:
    assert changed({"a": {"c": 1}, "d": 2}, [change], "x.toml") == {"a": {"c": 1, "b": value}, "d": 2}
    assert changed_keys([change]) == ["a.b"]


@pytest.mark.parametrize(
    ("change", "message"), [("rounds", "must be key=value"), ("=3", "must be key=value"), ("a b=3", "no dotted key")]
)
def test_what_is_no_change_is_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--set.*{message}"):
        changed({}, [change], "x.toml")


def test_the_last_change_wins_and_the_file_is_left_alone() -> None:
    content = {"seed": 1, "data": {"clients": 5}}
    assert changed(content, ["seed=2", "seed=3", "data.clients=6"], "x.toml") == {"seed": 3, "data": {"clients": 6}}
    assert content == {"seed": 1, "data": {"clients": 5}}


def test_a_run_reads_as_if_the_file_said_it(tmp_path: Path) -> None:
    (run,) = read_config(write(tmp_path, RUN), ["data.clients=30", "attack.direction=unit", "local.lr=1"])
    said = RUN.replace("clients = 20", "clients = 30").replace('"sign"', '"unit"') + "[local]\nlr = 1.0\n"
    assert [run] == read_config(write(tmp_path, said))
    with pytest.raises(ValueError, match=r"data\.clients must be int, got 'many'"):
        read_config(tmp_path / "file.toml", ["data.clients=many"])
    with pytest.raises(ValueError, match=r"unknown key data\.client; did you mean data\.clients"):
        read_config(tmp_path / "file.toml", ["data.client=3"])


def test_another_attack_needs_none_of_the_settings_of_the_files_own(tmp_path: Path) -> None:
    (run,) = read_config(write(tmp_path, RUN), ["attack.name=ipm", "attack.epsilon=2"])
    assert (run.attack.name, run.attack.share, run.attack.settings.epsilon) == ("ipm", 0.2, 2.0)
    (run,) = read_config(tmp_path / "file.toml", ["attack.name=none"])
    assert (run.attack.name, run.attack.share) == ("none", 0.0)
    with pytest.raises(ValueError, match=r"--set attack\.direction: no run of .* chooses an attack"):
        read_config(tmp_path / "file.toml", ["attack.name=ipm", "attack.direction=unit"])


def test_a_change_wins_over_variants(tmp_path: Path) -> None:
    path = write(tmp_path, VARIANTS)
    assert [run.defence.rule for run in read_config(path, ["defence.rule=median"])] == ["median", "median"]
    assert [run.defence.rule for run in read_config(path, ["rounds=2"])] == ["fedavg", "skymask"]
    # It applies to the variants whose rule has the setting, as a key of the file does.
    solvers = [getattr(run.defence.settings, "solver", None) for run in read_config(path, ["defence.solver=vmap"])]
    assert solvers == [None, "vmap"]


def test_a_grid_is_changed_by_its_own_keys(tmp_path: Path) -> None:
    path = write(tmp_path, GRID)
    names = [cell.name for cell in read_grid(path, ["grid.seed=[7]", 'grid."attack.name"=["trim"]', "rounds=9"])]
    assert names == ["attack=trim,seed=7"]
    assert [cell.name for cell in read_grid(path, ['grid.attack.name=["trim"]', "grid.seed=[7]"])] == names
    assert {cell.rounds for cell in read_grid(path, ["rounds=9"])} == {9}
    with pytest.raises(ValueError, match=r"--set seed: .* in its \[grid\]; give a list: --set 'grid\.seed=\[\.\.\.\]'"):
        read_grid(path, ["seed=3"])


def test_an_audit_takes_changes_too(tmp_path: Path) -> None:
    path = write(tmp_path, "[leak]\nvictims = 4\n")
    assert read_audit(path, ["leak.victims=2", "privacy.mask=[0.5]"]).leak.victims == 2
    assert json.loads(json.dumps(RunConfig().to_dict()))["tracking"] == {"tracker": "none"}
