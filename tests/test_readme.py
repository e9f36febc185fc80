"""The README's Python runs as it stands, and its commands exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from skymask_gpu.cli import app
from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.federation.datasets.partition import PARTITIONS
from skymask_gpu.federation.models import MODELS
from skymask_gpu.federation.rules import RULES
from skymask_gpu.federation.tracking import TRACKERS
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS


def test_the_python_examples_run_one_after_the_other(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    exec(blocks[0], names)
    in_memory = names["result"]
    assert list(in_memory.rejected) == [0, 1, 2]
    assert in_memory.summary().startswith("SkyMask, judged: 47 of 50 clients kept, 3 rejected (0, 1, 2)")
    assert "# SkyMask, judged: 47 of 50 clients kept, 3 rejected (0, 1, 2) ..." in blocks[0]
    assert in_memory.clusters.separation > 2, "far from the limit of 1, so that it holds on every machine"
    capsys.readouterr()
    exec(blocks[1], names)
    assert capsys.readouterr().out == "['hospital 0', 'hospital 1', 'hospital 2']\n"
    exec(blocks[2], names)
    assert torch.equal(names["result"].update, in_memory.update)
    exec(blocks[3], names)
    assert torch.equal(names["result"].benign, in_memory.benign)
    assert names["result"].update.shape == (837,)
    assert names["result"].benign.shape == (50,)
    capsys.readouterr()
    exec(blocks[4], names)
    rounds = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [number for number, _ in rounds] == ["0", "1"]
    assert all(0 < float(accuracy) < 1 for _, accuracy in rounds)


def test_make_targets_and_configs_exist(checkout: Path) -> None:
    readme, makefile = (checkout / "README.md").read_text(), (checkout / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)\b", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page in ("README.md", "docs/collapsed.md", "docs/federation.md", "docs/results.md", "docs/performance.md"):
        for module in re.findall(r"-m\s+skymask_gpu\.(bench[.\w]*\w)", (checkout / page).read_text()):
            assert (checkout / f"{module.replace('.', '/')}.py").is_file(), module
    for config in re.findall(r"examples/[\w-]+\.toml", readme):
        assert (checkout / config).is_file(), config


def test_every_setting_and_name_is_in_the_docs(checkout: Path) -> None:
    page = (checkout / "docs" / "federation.md").read_text()
    keys = [
        f"{table}.{key}" if isinstance(content, dict) else table
        for table, content in RunConfig().to_dict().items()
        for key in (content if isinstance(content, dict) else [""])
    ]
    keys += [f"attack.{field.name}" for name in ATTACKS for field in dataclasses.fields(ATTACKS.settings_of(name))]
    keys += [f"defence.{field.name}" for name in RULES for field in dataclasses.fields(RULES.settings_of(name))]
    keys += [f"privacy.{field.name}" for name in OBFUSCATIONS for field in dataclasses.fields(OBFUSCATIONS.settings_of(name))]
    keys += [f"tracking.{field.name}" for name in TRACKERS for field in dataclasses.fields(TRACKERS.settings_of(name))]
    for key in keys:
        assert f"`{key}`" in page or key == "name", key
    for name in {*ATTACKS, *OBFUSCATIONS, *RULES, *PARTITIONS, *TRACKERS} - {"none"}:
        assert f"`{name}`" in page, name
    for name in {model.removesuffix("-gn") for model in MODELS}:
        assert re.search(rf"\b{name}\b", page), name


def test_the_table_of_data_sets_says_what_they_say_of_themselves(checkout: Path) -> None:
    page = (checkout / "docs" / "federation.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name, spec in DATASETS.items():
        about, where = f"| {spec.about} |", f"`skymask-gpu data {name} DIR` |" if spec.source else f"| {spec.origin} |"
        assert about in rows[name], name
        assert where in rows[name], name


def test_every_command_in_the_docs_exists(checkout: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for page in ("README.md", "docs/federation.md", "docs/results.md", "docs/performance.md"):
        for command, options in re.findall(r"skymask-gpu (\w+) (.*)", (checkout / page).read_text()):
            assert command in known, command
            declared = {option for parameter in known[command].params for option in parameter.opts}
            for option in re.findall(r"(?<!\w)(--[a-z-]+)", options.split("#")[0]):
                assert option in declared, f"{command} {option}"


def test_files_that_the_page_of_switches_names_exist(checkout: Path) -> None:
    files = set(re.findall(r"`([\w/.]+\.py)`", (checkout / "docs" / "process.md").read_text()))
    assert len(files) > 10
    for file in files:
        assert (checkout / file).is_file(), file
