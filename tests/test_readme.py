"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import torch


def test_the_python_example_runs(checkout: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    assert names["result"].update.shape == (837,)
    assert names["result"].benign.shape == (50,)


def test_make_targets_and_configs_exist(checkout: Path) -> None:
    readme, makefile = (checkout / "README.md").read_text(), (checkout / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)\b", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for config in re.findall(r"examples/[\w-]+\.toml", readme):
        assert (checkout / config).is_file(), config
