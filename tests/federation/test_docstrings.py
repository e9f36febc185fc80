"""The examples in docstrings run."""

import doctest
from importlib import import_module

import pytest

MODULES = ("", ".attacks.interface", ".choices", ".transforms")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(import_module(f"skymask_gpu.federation{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_packages_names_are_imported_when_they_are_asked_for() -> None:
    import skymask_gpu.federation as federation

    assert set(federation.__all__) <= set(dir(federation))
    assert all(getattr(federation, name).__module__.startswith("skymask_gpu.federation") for name in federation.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Federatoin'"):
        _ = federation.Federatoin
