"""The TOML file of a run: overrides, and errors that help."""

import json
from pathlib import Path

import pytest

from skymask_gpu.federation.config import RunConfig, read_config, read_grid


def write(folder: Path, text: str) -> Path:
    path = folder / "trial.toml"
    path.write_text(text)
    return path


def test_a_file_without_variants_is_one_run_named_after_it(tmp_path: Path) -> None:
    (run,) = read_config(write(tmp_path, "rounds = 3\n[data]\nbias = 1\n[attack]\nname = 'sign-flip'\nshare = 0.04\n"))
    assert (run.name, run.rounds, run.data.bias, run.attack.num_malicious(100)) == ("trial", 3, 1.0, 4)
    assert run.defence.settings.training.full_step == 1.0


def test_variants_override_keys_of_the_file(checkout: Path) -> None:
    runs = read_config(checkout / "examples" / "demo.toml")
    assert [(r.name, r.defence.rule, r.attack.name, r.attack.share) for r in runs] == [
        ("no attack", "fedavg", "none", 0.0),
        ("FedAvg, attacked", "fedavg", "min-max", 0.2),
        ("SkyMask, attacked", "skymask", "min-max", 0.2),
    ]
    assert len({(r.seed, r.rounds, r.data, r.model, r.local) for r in runs}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("round = 3", r"unknown key round; did you mean rounds\?"),
        ("[data]\nbais = 0.5", r"unknown key data\.bais; did you mean data\.bias\?"),
        ("[attack]\nxyz = 1", r"unknown key attack\.xyz; known are name, share, first_round, last_round"),
        ("rule = 'krum'", r"unknown key rule; did you mean defence\.rule\?"),
        ("[data]\nlayers = ['fc2']", r"unknown key data\.layers; did you mean attack\.layers of attack\.name = 'layers'\?"),
        ("[attack]\nname = 'layers'\nlayers = 'fc2'", r"attack\.layers must be a list of strings, got 'fc2'"),
        ("rounds = '3'", "rounds must be int, got '3'"),
        ("rounds = true", "rounds must be int, got True"),
        ("rounds = 0", "rounds must be at least 1, got 0"),
        ("data = 3", "data must be a table, got 3"),
        ("name = '../x'", "name must be usable as a folder's name"),
        ("[attack]\nname = 'min-mx'\nshare = 0.2", r"attack\.name must be one of .*; did you mean 'min-max'\?"),
        ("[attack]\nname = 'min-max'", r"attack\.share must"),
        ("[attack]\nshare = 0.2", r"attack\.share must"),
        ("clients_per_round = 101", r"clients_per_round must be between 0 \(all\) and data\.clients = 100, got 101"),
        ("checkpoint_every = 0", "checkpoint_every must be at least 1, got 0"),
        ("[data]\npartition = 'dirichlt'", r"data\.partition must be one of .*; did you mean 'dirichlet'\?"),
        ("[grid]\nseed = [0]", r"has a \[grid\] table; play it with: skymask-gpu sweep"),
        ("server_lr = nan", "server_lr must be finite, got nan"),
        ("seed = 20240101000000", "seed must be between 0 and"),
        ("[local]\nlr = inf", r"local\.lr must be finite"),
        ("[defence]\nassumed_malicious = -2", r"defence\.assumed_malicious must be at least -1"),
        (
            "[data]\nclients = 10\n[defence]\nrule = 'krum'\nassumed_malicious = 9",
            r"defence\.assumed_malicious must be at most 3 for defence\.rule 'krum' and 10 clients a round .* got 9",
        ),
        (
            "clients_per_round = 10\n[defence]\nrule = 'bulyan'\nassumed_malicious = 2",
            r"defence\.assumed_malicious must be at most 1 for defence\.rule 'bulyan' and 10 clients a round .* got 2",
        ),
        ("[defence]\nsolver = 'fusd'", r"defence\.solver must be one of .*; did you mean 'fused'\?"),
        ("[defence]\nmask_steps = 0", r"MaskTraining\.steps must"),
        ("[defence]\nclustering = 'dbscan'", r"Clustering\.rule must"),
        ("[local]\nlr = 0", r"local\.lr must be finite and above 0"),
        ("[[transforms]]\nstd = 1.0", r"transforms\[0\]\.name is missing, and it has no default"),
        ("transforms = [3]", r"transforms must be a list of names or tables, got \[3\]"),
        ("plugins = 'mine.py'", r"plugins must be a list of strings, got 'mine\.py'"),
        ("[[variants]]\nrounds = 2", "each with a name"),
        ("[[variants]]\nname = 'a'\n[[variants]]\nname = 'a'", "names of the variants must differ"),
        ("= 3", "is no TOML"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name = 'ipm'\nipm_epsilon = 1.0",
            r"trial\.toml: unknown key attack\.ipm_epsilon; did you mean attack\.epsilon\? known are",
        ),
        (
            "name = 'noise'\nnoise_std = 1.0",
            r"attack\.noise_std; did you mean attack\.std\? known are name, share, first_round, last_round, std",
        ),
        (
            "name = 'trim'\nepsilon = 1.0",
            r"attack\.epsilon; did you mean attack\.epsilon of attack\.name = 'ipm'\? known are name",
        ),
        ("name = 'trim'\nipm_epsilon = 1.0", r"did you mean attack\.epsilon of attack\.name = 'ipm'\?"),
        (
            "name = 'min-max'\nsettings = {}",
            r"unknown key attack\.settings; .*known are name, share, first_round, last_round, direction",
        ),
        ("name = 'ipm'\nepsilon = '1'", r"attack\.epsilon must be float, got '1'"),
        ("name = 'sparse'\nbase = { name = 'ipm', std = 1.0 }", r"unknown key attack\.base\.std; .*known are name, epsilon"),
        ("name = 'sparse'\nbase = 'mimic'", r"attack\.base must be one of sign-flip, .*, got 'mimic'"),
        ("name = 'layers'\nlayers = [3]", r"attack\.layers must be a list of strings, got \[3\]"),
    ],
)
def test_only_the_chosen_attacks_own_keys_are_taken(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, f"[attack]\nshare = 0.2\n{text}"))


def test_a_rule_takes_its_own_keys_only(tmp_path: Path) -> None:
    (run,) = read_config(write(tmp_path, "[defence]\nsolver = 'fused'\nmask_lr = 100000000"))
    assert (run.defence.settings.solver, run.defence.settings.mask_lr) == ("fused", 1e8)
    message = r"unknown key defence\.mask_lr; did you mean defence\.mask_lr of defence\.rule = 'skymask'\? known are rule"
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, "[defence]\nrule = 'krum'\nmask_lr = 1e8"))


def test_settings_are_read_written_and_read_again(tmp_path: Path) -> None:
    text = "[attack]\nshare = 0.2\nname = 'layers'\nlayers = ['fc2']\nbase = { name = 'min-max', direction = 'unit' }"
    (run,) = read_config(write(tmp_path, text))
    assert run.attack.settings.base.settings.direction == "unit"
    table = run.to_dict()
    base = {"name": "min-max", "direction": "unit", "jitter": 0.0}
    assert table["attack"] == {
        "name": "layers",
        "share": 0.2,
        "first_round": 0,
        "last_round": -1,
        "layers": ["fc2"],
        "base": base,
    }
    assert RunConfig.from_dict(json.loads(json.dumps(table))) == run
    (run,) = read_config(write(tmp_path, "[attack]\nshare = 0.2\nname = 'sparse'\nbase = 'min-max'"))
    assert run.to_dict()["attack"]["base"] == "min-max"
    assert RunConfig.from_dict(run.to_dict()) == run


def test_variants_with_other_attacks_go_without_the_files_settings(tmp_path: Path) -> None:
    text = """
[attack]
name = "ipm"
share = 0.2
epsilon = 2
[[variants]]
name = "a"
[[variants]]
name = "b"
attack = { name = "none", share = 0 }
"""
    first, second = read_config(write(tmp_path, text))
    assert (first.attack.settings.epsilon, second.attack.name) == (2.0, "none")
    with pytest.raises(ValueError, match=r"unknown key attack\.epsilom; did you mean attack\.epsilon\?"):
        read_config(write(tmp_path, text.replace("epsilon", "epsilom")))


def test_krum_takes_as_many_malicious_clients_as_its_definition(tmp_path: Path) -> None:
    text = "[data]\nclients = 10\n[defence]\nrule = 'multi-krum'\nassumed_malicious = 3"
    assert read_config(write(tmp_path, text))[0].defence.assumed_malicious == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: no file .*absent\.toml"):
        read_config(tmp_path / "absent.toml")


GRID = """
rounds = 2
[attack]
name = "trim"
[grid]
"attack.name" = ["none", "min-max"]
"attack.share" = [0.2, 0.4]
"defence.rule" = ["fedavg", "krum"]
seed = [0, 1]
"""


def test_a_grid_is_every_combination_and_no_attack_is_one_share(tmp_path: Path) -> None:
    cells = read_grid(write(tmp_path, GRID))
    assert len(cells) == 2 * 2 + 2 * 2 * 2
    assert cells[0].name == "attack=none,rule=fedavg,seed=0"
    assert cells[-1].name == "attack=min-max,share=0.4,rule=krum,seed=1"
    last = cells[-1]
    assert (last.attack.name, last.attack.share, last.defence.rule, last.seed, last.rounds) == ("min-max", 0.4, "krum", 1, 2)
    assert all(cell.attack.share == 0 for cell in cells if cell.attack.name == "none")
    assert len({cell.name for cell in cells}) == len(cells)


def test_keys_of_a_table_change_together(tmp_path: Path) -> None:
    text = """
[grid]
privacy = [{ obfuscation = "none" }, { obfuscation = "mask", strength = 0.9 }, { obfuscation = "clip", strength = 0.5 }]
defence = [{ rule = "median" }, { rule = "median", skip_zeros = true }]
"""
    cells = {cell.name: cell for cell in read_grid(write(tmp_path, text))}
    assert list(cells) == [
        "obfuscation=none,rule=median",
        "obfuscation=none,rule=median,skip_zeros=True",
        "obfuscation=mask,strength=0.9,rule=median",
        "obfuscation=mask,strength=0.9,rule=median,skip_zeros=True",
        "obfuscation=clip,strength=0.5,rule=median",
        "obfuscation=clip,strength=0.5,rule=median,skip_zeros=True",
    ]
    last = cells["obfuscation=clip,strength=0.5,rule=median,skip_zeros=True"]
    assert (last.privacy.settings.strength, last.defence.settings.skip_zeros) == (0.5, True)
    assert not cells["obfuscation=mask,strength=0.9,rule=median"].defence.settings.skip_zeros


def test_a_grid_keeps_settings_where_they_apply(tmp_path: Path) -> None:
    """Without them, cells that differ in nothing else are one."""
    text = """
[attack]
share = 0.2
direction = "unit"
[defence]
mask_steps = 5
[grid]
"attack.name" = ["ipm", "min-max", "trim"]
"attack.epsilon" = [0.5, 2.0]
"defence.rule" = ["fedavg", "skymask"]
"""
    cells = {cell.name: cell for cell in read_grid(write(tmp_path, text))}
    assert list(cells) == [
        "attack=ipm,epsilon=0.5,rule=fedavg",
        "attack=ipm,epsilon=0.5,rule=skymask",
        "attack=ipm,epsilon=2.0,rule=fedavg",
        "attack=ipm,epsilon=2.0,rule=skymask",
        "attack=min-max,rule=fedavg",
        "attack=min-max,rule=skymask",
        "attack=trim,rule=fedavg",
        "attack=trim,rule=skymask",
    ]
    assert cells["attack=ipm,epsilon=2.0,rule=fedavg"].attack.settings.epsilon == 2
    assert cells["attack=min-max,rule=skymask"].attack.settings.direction == "unit"
    assert cells["attack=min-max,rule=skymask"].defence.settings.mask_steps == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds = 2", r"must have a \[grid\] table of lists"),
        ("attack = 3\n[grid]\nseed = [0]", r"attack must be a table, got 3"),
        ("[grid]\nseed = 3", r"grid\.seed must be a list of different values, got 3"),
        ("[grid]\nseed = []", r"grid\.seed must be a list of different values"),
        ("[grid]\nseed = [1, 1]", r"grid\.seed must be a list of different values"),
        ("[grid]\n'defence.rul' = ['krum']", r"unknown key defence\.rul; did you mean defence\.rule\?"),
        (
            "[attack]\nshare = 0.2\n[grid]\n'attack.name' = ['trim', 'lie']\n'attack.epsilon' = [1]",
            r"unknown key attack\.epsilon",
        ),
        ("[grid]\n'defence.rule' = ['crum']", r"defence\.rule must be one of .*; did you mean 'krum'\?"),
    ],
)
def test_mistakes_in_grids_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[attack]\nname = ['ipm', 'trim']\nshare = 0.2",
            r"attack\.name must be a string, got \['ipm', 'trim'\]; .*\"attack\.name\" = \['ipm', 'trim'\] under \[grid\]",
        ),
        ("[defence]\nrule = ['krum']", r"defence\.rule must be a string, got \['krum'\]; .* under \[grid\]"),
        ("[privacy.obfuscation]", r"privacy\.obfuscation must be a string, got \{\}$"),
        ("[tracking]\ntracker = []", r"tracking\.tracker must be a string, got \[\]"),
        ("[model]\nname = ['mlp', 'cnn']", r"model\.name must be str, got .*\"model\.name\" = \['mlp', 'cnn'\] under \[grid\]"),
        ("[[transforms]]\nname = ['a']", r"transforms\[0\]\.name must be a string, got \['a'\]$"),
    ],
)
def test_a_list_in_place_of_a_name_is_refused_and_pointed_to_the_grid(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, text))


def test_cells_whose_names_become_the_same_are_all_played(tmp_path: Path) -> None:
    text = "[grid]\n'model.name' = ['n/a.py:Net', 'n_a.py:Net', 'n:a.py:Net']\nseed = [0, 1]\n"
    cells = read_grid(write(tmp_path, text))
    assert [cell.model.name for cell in cells] == [name for name in ("n/a.py:Net", "n_a.py:Net", "n:a.py:Net") for _ in "01"]
    names = [cell.name for cell in cells]
    assert names[:2] == ["model=n_a.py_Net,seed=0", "model=n_a.py_Net,seed=1"]
    assert len(set(names)) == 6
    assert all(name.startswith(f"model=n_a.py_Net,seed={number % 2},") for number, name in enumerate(names[2:]))
    # A sweep of fewer values finds the same folders.
    fewer = read_grid(write(tmp_path, text.replace(", 'n:a.py:Net'", "")))
    assert [cell.name for cell in fewer] == names[:4]


def test_names_of_cells_fit_a_file_system(tmp_path: Path) -> None:
    long = ["/".join(["ä" * 100] * 3) + f"/{name}.py:Net" for name in "ab"]
    cells = read_grid(write(tmp_path, f"[grid]\n'model.name' = {long}\n"))
    assert [cell.model.name for cell in cells] == long
    assert len({cell.name for cell in cells}) == 2
    for cell in cells:
        (tmp_path / cell.name).mkdir()
    fits = read_grid(write(tmp_path, f"[grid]\n'model.name' = ['{'n' * 242}.py:Net']\n"))
    assert (fits[0].name, len(fits[0].name)) == (f"model={'n' * 242}.py_Net", 255)
