"""Files outside of the tree add attacks, rules, data sets, models, solvers and transforms to a run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skymask_gpu.cli import app
from skymask_gpu.engine.registry import forget
from skymask_gpu.federation import plugins
from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.config import read_config, read_grid
from skymask_gpu.federation.run_folder import CONFIG, METRICS
from skymask_gpu.federation.sweep import cell_folder, play_cells

ATTACK = """
from dataclasses import dataclass

from skymask_gpu.federation.attacks import ATTACKS


@dataclass(frozen=True, kw_only=True)
class Tilt:
    angle: float = 0.5

    def __post_init__(self):
        if not self.angle > 0:
            raise ValueError(f"attack.angle must be above 0, got {self.angle!r}")


@ATTACKS.register("tilt", settings=Tilt)
def tilt(updates_NP, malicious_N, threat, settings):
    return -settings.angle * updates_NP[malicious_N]
"""

RULE = """
from dataclasses import dataclass

from skymask_gpu.federation.rules import RULES, RuleResult


@dataclass(frozen=True, kw_only=True)
class Power:
    power: int = 1


@RULES.register("running-mean", settings=Power)
class RunningMean:
    def __init__(self, context, settings):
        self._settings, self._state = settings, {}

    def __call__(self, updates_MP, info):
        mean_P = updates_MP.mean(0) / self._settings.power
        before_P = self._state.get("mean", mean_P)
        self._state = {"mean": (mean_P + before_P) / 2}
        return RuleResult(self._state["mean"], None, record={"length": float(mean_P.norm())},
                          tensors=lambda: ({"mean": self._state["mean"]}, {}))

    def state(self):
        return dict(self._state)

    def restore(self, state):
        self._state = dict(state)
"""

TRANSFORM = """
from skymask_gpu.federation.transforms import TRANSFORMS


@TRANSFORMS.register("sign-only")
def sign_only(rows_NP, generators, layers):
    return rows_NP.sign() * 0.01
"""

DATASET = """
import torch

from skymask_gpu.federation.datasets import Dataset, dataset


@dataset("two-moons", about="two classes of points in the plane")
def two_moons(folder):
    angles = torch.linspace(0, torch.pi, 200)
    upper = torch.stack([angles.cos(), angles.sin()], dim=1)
    inputs = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])
    labels = torch.arange(400) // 200
    return Dataset("two-moons", inputs[::2], labels[::2], inputs[1::2], labels[1::2], 2)
"""

MODEL = """
from torch import nn

from skymask_gpu.federation.models import MODELS


@MODELS.register("tiny")
class Tiny(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
"""

SOLVER = """
from skymask_gpu.engine.solvers.reference import train as reference
from skymask_gpu.engine.solvers.solver import solver


@solver("once-more")
def train(updates_RP, global_params_P, loss, config, keep_logits):
    return reference(updates_RP, global_params_P, loss, config, keep_logits)
"""

RUN = """
plugins = ["{file}"]
rounds = 2
[data]
clients = 10
root_samples = 30
[local]
steps = 2
[attack]
name = "sign-flip"
share = 0.2
[defence]
rule = "median"
"""

# what the plugin's file holds, and what a run's file says to choose it
KINDS = {
    "attack": (ATTACK, RUN.replace('"sign-flip"', '"tilt"\nangle = 2')),
    "rule": (RULE, RUN.replace('"median"', '"running-mean"\npower = 2')),
    "data set": (DATASET, RUN.replace("[data]", '[data]\ndataset = "two-moons"') + '[model]\nname = "logreg"\n'),
    "model": (MODEL, RUN + '[model]\nname = "tiny"\n'),
    "solver": (SOLVER, RUN.replace('"median"', '"skymask"\nsolver = "once-more"')),
    "transform": (TRANSFORM, RUN + '[[transforms]]\nname = "sign-only"\n'),
}


@pytest.fixture(autouse=True)
def forgotten(tmp_path: Path) -> Iterator[None]:
    """The registries hold nothing of this test afterwards."""
    yield
    for path in [path for path in plugins._LOADED if path.is_relative_to(tmp_path.resolve())]:
        forget(str(path))
        del plugins._LOADED[path]


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_outside_of_the_tree_is_played_from_the_command_line(kind: str, tmp_path: Path) -> None:
    """Its path is relative to the run's file; another run in the same process names the same file again."""
    plugin, run = KINDS[kind]
    write(tmp_path, plugin, "extras/mine.py")
    config = write(tmp_path, run.format(file="extras/mine.py"), "trial.toml")
    command = ["run", str(config), "--out", str(tmp_path / "out")]
    played = CliRunner().invoke(app, command)
    assert played.exit_code == 0, played.output
    again = CliRunner().invoke(app, [*command, "--overwrite"])
    assert again.exit_code == 0, again.output
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert len(lines) == 2
    assert kind != "rule" or all(line["length"] > 0 for line in lines)
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert settings["plugins"] == [str((tmp_path / "extras" / "mine.py").resolve())]
    write(tmp_path, run.format(file="extras/mine.py").replace("rounds = 2", "rounds = 3"), "trial.toml")
    resumed = CliRunner().invoke(app, [*command, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert len((tmp_path / "out" / METRICS).read_text().splitlines()) == 3


@pytest.mark.long
def test_cells_in_processes_of_their_own_import_the_plugin(tmp_path: Path) -> None:
    write(tmp_path, ATTACK)
    text = KINDS["attack"][1].format(file="mine.py").replace("angle = 2", "")
    cells = read_grid(write(tmp_path, text + '[grid]\n"attack.angle" = [1, 2]\n', "grid.toml"))
    states = list(play_cells(cells, tmp_path / "out", jobs=2))
    assert not [state.error for state in states if state.error]
    assert {state.config.name for state in states if state.state == "done"} == {"angle=1", "angle=2"}
    first, second = ((cell_folder(tmp_path / "out", cell) / METRICS).read_text() for cell in cells)
    assert first != second


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (None, r"plugins: no file .*mine\.py; paths are relative to the TOML file"),
        (
            "import nowhere\n",
            r"plugins: .*mine\.py cannot be imported: ModuleNotFoundError: .*nowhere.* \(.*mine\.py, line 1\)",
        ),
        ("def f(:\n", r"plugins: .*mine\.py cannot be imported: SyntaxError: .* line 1\)"),
        (
            ATTACK.replace('"tilt"', '"min-max"'),
            r"mine\.py cannot be .*'min-max' is registered already, by .*shifts\.py, and again",
        ),
        (ATTACK + ATTACK, r"mine\.py cannot be .*'tilt' is registered already, by .*mine\.py, and again by .*mine\.py"),
        (ATTACK.replace("settings=Tilt", "settings=3"), r"mine\.py cannot be .*its settings must be a dataclass, got 3"),
        (ATTACK.replace("angle: float", "share: float"), r"mine\.py cannot be .*its settings must not have a field 'share'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_error_and_leaves_nothing(
    plugin: str | None, message: str, tmp_path: Path
) -> None:
    if plugin is not None:
        write(tmp_path, plugin)
    config = write(tmp_path, KINDS["attack"][1].format(file="mine.py"), "trial.toml")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            read_config(config)
        assert "tilt" not in ATTACKS
    write(tmp_path, ATTACK)
    assert read_config(config)[0].attack.settings.angle == 2


def test_a_plugin_that_has_changed_is_imported_anew(tmp_path: Path) -> None:
    write(tmp_path, ATTACK)
    config = write(tmp_path, KINDS["attack"][1].format(file="mine.py").replace("angle = 2", ""), "trial.toml")
    assert read_config(config)[0].attack.settings.angle == 0.5
    write(tmp_path, ATTACK.replace("= 0.5", "= 0.75"))
    assert read_config(config)[0].attack.settings.angle == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("angle = 2", "angle = -2"), r"attack\.angle must be above 0, got -2\.0"),
        (
            ("angle = 2", "angel = 2"),
            r"unknown key attack\.angel; did you mean attack\.angle\? known are name, share, .*, angle",
        ),
        (('"mine.py"]', '"mine.py", 3]'), r"plugins must be a list of strings, got \['mine\.py', 3\]"),
        (("[defence]", '[grid]\nplugins = ["mine.py"]\n[defence]'), r"plugins must stand at the top of the file, not in"),
        (('"tilt"', '"tlit"'), r"attack\.name must be one of .*, got 'tlit'; did you mean 'tilt'\?"),
    ],
)
def test_mistakes_beside_a_plugin_are_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, ATTACK)
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, KINDS["attack"][1].format(file="mine.py").replace(*change), "trial.toml"))
