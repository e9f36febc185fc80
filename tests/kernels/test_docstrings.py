"""The examples in the kernels' docstrings run, and each public kernel has one."""

import doctest
import importlib

import pytest

MODULES = ("dispatch", "bins", "cuts", "hamming", "mask_step", "mean", "mixture", "tree")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"skymask_gpu.kernels.{name}")
    assert doctest.testmod(module).failed == 0
    own = [getattr(module, public) for public in module.__all__ if not public.endswith("_reference")]
    for function in own:
        if getattr(function, "__module__", None) == module.__name__ and function.__name__ not in ("compiled", "best_cut"):
            assert ">>>" in str(function.__doc__), f"{function.__name__} has no example"
