"""The TOML file of a run: overrides, and errors that help."""

from pathlib import Path

import pytest

from skymask_gpu.federation.config import read_config


def write(folder: Path, text: str) -> Path:
    path = folder / "trial.toml"
    path.write_text(text)
    return path


def test_a_file_without_variants_is_one_run_named_after_it(tmp_path: Path) -> None:
    (run,) = read_config(write(tmp_path, "rounds = 3\n[data]\nbias = 1\n[attack]\nname = 'sign-flip'\nmalicious = 4\n"))
    assert (run.name, run.rounds, run.data.bias, run.attack.malicious) == ("trial", 3, 1.0, 4)
    assert run.defence.training.full_step == 1.0


def test_variants_override_keys_of_the_file(checkout: Path) -> None:
    runs = read_config(checkout / "examples" / "demo.toml")
    assert [(r.name, r.defence.rule, r.attack.name, r.attack.malicious) for r in runs] == [
        ("no attack", "fedavg", "none", 0),
        ("FedAvg, attacked", "fedavg", "min-max", 20),
        ("SkyMask, attacked", "skymask", "min-max", 20),
    ]
    assert len({(r.seed, r.rounds, r.data, r.model, r.local) for r in runs}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("round = 3", r"unknown key round; did you mean rounds\?"),
        ("[data]\nbais = 0.5", r"unknown key data\.bais; did you mean data\.bias\?"),
        ("[attack]\nxyz = 1", r"unknown key attack\.xyz; known are name, malicious"),
        ("rounds = '3'", "rounds must be int, got '3'"),
        ("rounds = true", "rounds must be int, got True"),
        ("rounds = 0", "rounds must be at least 1, got 0"),
        ("data = 3", "data must be a table, got 3"),
        ("name = '../x'", "name must be usable as a folder's name"),
        ("[attack]\nname = 'min-mx'\nmalicious = 2", r"attack\.name must be one of .*; did you mean 'min-max'\?"),
        ("[attack]\nname = 'min-max'", r"attack\.malicious must be between 1 and 99 of 100 clients"),
        ("[attack]\nmalicious = -1", r"attack\.malicious must be at least 0"),
        ("[attack]\nmalicious = 3", r"attack\.malicious must be 0 for attack 'none', got 3"),
        ("server_lr = nan", "server_lr must be finite, got nan"),
        ("seed = 20240101000000", "seed must be between 0 and"),
        ("[local]\nlr = inf", r"local\.lr must be finite"),
        ("[defence]\nsolver = 'fusd'", r"defence\.solver must be one of .*; did you mean 'fused'\?"),
        ("[defence]\nmask_steps = 0", r"MaskTraining\.steps must"),
        ("[defence]\nclustering = 'dbscan'", r"Clustering\.rule must"),
        ("[local]\nlr = 0", r"local\.lr must be finite and above 0"),
        ("[[variants]]\nrounds = 2", "each with a name"),
        ("[[variants]]\nname = 'a'\n[[variants]]\nname = 'a'", "names of the variants must differ"),
        ("= 3", "is no TOML"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: no file .*absent\.toml"):
        read_config(tmp_path / "absent.toml")
