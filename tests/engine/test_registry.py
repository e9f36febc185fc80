"""The registry of solvers, attacks, rules, models and data sets."""

import pytest

from skymask_gpu.engine.registry import Registry, forget


def test_what_is_registered_is_found_and_listed_in_order() -> None:
    things: Registry[int] = Registry("thing")
    things.register("b")(2)
    things.register("a")(1)
    assert list(things) == ["b", "a"]
    assert len(things) == 2
    assert "a" in things
    assert "c" not in things
    assert things["a"] == 1


def test_a_name_taken_twice_is_refused_with_both_files() -> None:
    things: Registry[int] = Registry("thing")
    things.register("a")(1)
    with pytest.raises(ValueError, match=r"thing: 'a' is registered already, by .*test_registry\.py, and again by .*\.py"):
        things.register("a")(2)
    assert things["a"] == 1


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    things: Registry[int] = Registry("attack.name")
    things.register("min-max")(1)
    with pytest.raises(ValueError, match=r"attack\.name must be one of min-max, got 'minmax'; did you mean 'min-max'\?"):
        things["minmax"]


def test_what_is_removed_can_be_registered_again() -> None:
    things: Registry[int] = Registry("thing")
    things.register("a")(1)
    things.remove("a")
    things.register("a")(2)
    assert things["a"] == 2


def test_what_a_file_has_registered_is_forgotten_in_all_registries() -> None:
    things: Registry[int] = Registry("thing")
    others: Registry[int] = Registry("other")
    for registry_, name in ((things, "a"), (things, "b"), (others, "a")):
        registry_.add(name, 1, "mine.py")
    others.add("c", 2, "yours.py")
    forget("mine.py")
    assert (list(things), list(others)) == ([], ["c"])
