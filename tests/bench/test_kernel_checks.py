"""The quick check of each kernel finds a kernel that is a little wrong."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu import kernels
from skymask_gpu.bench import kernel_checks

CPU = torch.device("cpu")


def test_every_kernel_with_a_twin_is_checked() -> None:
    modules = [importlib.import_module(f"skymask_gpu.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    twins = {name for module in modules for name in getattr(module, "__all__", ()) if name.endswith("_reference")}
    assert {twin.removesuffix("_reference") for twin in twins} == set(kernel_checks.CHECKS)


def spoilt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What the kernel returns, or else the last tensor that it writes, is off by a little in its first column or byte."""

    def spoil(tensor: Tensor) -> Tensor:
        first = tensor.flatten() if tensor.is_contiguous() else tensor[0]
        if not tensor.is_floating_point():
            first[: max(1, len(first) // 100)] += 1
        else:
            first[: max(1, len(first) // 100)] *= 1.01
        return tensor

    def run(*arguments: Any, **settings: Any) -> Any:
        result = kernel(*arguments, **settings)
        if result is None:
            spoil(arguments[-1])
            return None
        return (*result[:-1], spoil(result[-1])) if isinstance(result, tuple) else spoil(result)

    return run


@pytest.mark.parametrize("name", kernel_checks.CHECKS)
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "_SIZES", ((9, 1031),))
    assert kernel_checks.wrong_with(name, CPU) is None
    (module,) = {value for value in vars(kernel_checks).values() if hasattr(value, f"{name}_reference")}
    monkeypatch.setattr(module, name, spoilt(getattr(module, name)))
    assert kernel_checks.wrong_with(name, CPU) is not None
