"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import torch


def test_the_python_examples_run_one_after_the_other(checkout: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names: dict = {}
    exec(blocks[0], names)
    in_memory = names["result"]
    exec(blocks[1], names)
    assert torch.equal(names["result"].benign, in_memory.benign)
    assert names["result"].update.shape == (837,)
    assert names["result"].benign.shape == (50,)


def test_make_targets_and_configs_exist(checkout: Path) -> None:
    readme, makefile = (checkout / "README.md").read_text(), (checkout / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)\b", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page in ("README.md", "docs/collapsed.md"):
        for module in re.findall(r"-m\s+skymask_gpu\.(bench\.\w+)", (checkout / page).read_text()):
            assert (checkout / f"{module.replace('.', '/')}.py").is_file(), module
    for config in re.findall(r"examples/[\w-]+\.toml", readme):
        assert (checkout / config).is_file(), config
