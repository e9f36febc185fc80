"""The examples in the product's docstrings run and print what they say; each public kernel has one."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parent.parent
# folder -> the package that it ships as
PACKAGES = {"kernels": "skymask_gpu.kernels", "engine": "skymask_gpu.engine", "skymask_gpu": "skymask_gpu"}


def modules_with_examples() -> list[str]:
    found = []
    for folder, package in PACKAGES.items():
        for file in sorted((CHECKOUT / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                parts = file.relative_to(CHECKOUT / folder).with_suffix("").parts
                found.append(".".join([package, *parts]).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str) -> None:
    if name.startswith("skymask_gpu.integrations.flower"):
        pytest.importorskip("flwr", reason="Flower is not installed here; `make test-flower` runs this where it is")
    if name.startswith("skymask_gpu.integrations.nvflare"):
        pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed here")
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    # The examples draw random numbers; a seed makes them the same in every run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=flags)
    assert result.attempted > 0
    assert result.failed == 0


def test_modules_are_found_in_every_part() -> None:
    names = modules_with_examples()
    assert {"skymask_gpu.kernels.mean", "skymask_gpu.engine.masks", "skymask_gpu.defence.skymask"} <= set(names)


@pytest.mark.parametrize("name", ["bins", "cuts", "hamming", "mask_step", "mean", "mixture", "ones", "tree"])
def test_each_public_kernel_has_an_example(name: str) -> None:
    module = importlib.import_module(f"skymask_gpu.kernels.{name}")
    for public in module.__all__:
        function = getattr(module, public)
        is_own = getattr(function, "__module__", None) == module.__name__
        if is_own and not public.endswith("_reference") and public != "best_cut":
            assert ">>>" in str(function.__doc__), f"{public} has no example"
