"""``Registry``: a table of things by name, such as solvers, attacks, rules, models or data sets.

Each thing enters itself, in the file that defines it.
"""

import difflib
import sys
import weakref
from collections.abc import Callable, ItemsView, Iterable, Iterator
from typing import ClassVar, Generic, TypeVar

__all__ = ["Registry", "forget", "one_of"]

Thing = TypeVar("Thing")


def one_of(setting: str, value: object, known: Iterable[str]) -> None:
    """Refuse an unknown name, and say which known one is nearest.

    Args:
        setting: the setting or argument that has the value, as its user writes it.
        value: the name that was given.
        known: all names that exist.

    Raises:
        ValueError: ``value`` is not in ``known``.

    Example:
        >>> one_of("defence.rule", "mediann", ["mean", "median"])
        Traceback (most recent call last):
        ...
        ValueError: defence.rule must be one of mean, median, got 'mediann'; did you mean 'median'?
    """
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{setting} must be one of {', '.join(known)}, got {value!r}{hint}")


class Registry(Generic[Thing]):
    """Things by name. The file that defines one registers it, so nothing else has to be edited.

    Args:
        setting: the setting that chooses one, as its user writes it; errors name it.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("square")
        ... def square(side):
        ...     return side * side
        >>> shapes["square"](3)
        9
        >>> shapes["squares"]
        Traceback (most recent call last):
        ...
        ValueError: shape must be one of square, got 'squares'; did you mean 'square'?
    """

    _all: ClassVar["weakref.WeakSet[Registry]"] = weakref.WeakSet()

    def __init__(self, setting: str) -> None:
        Registry._all.add(self)
        self.setting = setting
        self._things: dict[str, Thing] = {}
        self._files: dict[str, str] = {}

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """A decorator that enters what it decorates under ``name``, and returns it unchanged.

        Raises:
            ValueError: there is one of this name already; the message names the file it is in.
        """
        caller = sys._getframe(1).f_code.co_filename

        def enter(thing: Thing) -> Thing:
            self.add(name, thing, caller)
            return thing

        return enter

    def add(self, name: str, thing: Thing, file: str) -> None:
        """Enter ``thing`` under ``name``.

        Args:
            name: its name.
            thing: what is registered.
            file: where it is defined; the error about a name that is taken twice names it.

        Raises:
            ValueError: there is one of this name already.
        """
        if name in self._things:
            raise ValueError(
                f"{self.setting}: {name!r} is registered already, by {self._files[name]}, and again by {file}; "
                "choose another name"
            )
        self._things[name] = thing
        self._files[name] = file

    def remove(self, name: str) -> None:
        """Remove the thing called ``name``; tests remove what they added."""
        del self._things[name], self._files[name]

    def check(self, name: object) -> None:
        """Refuse a name that is not registered.

        Raises:
            ValueError: it names the setting and the nearest registered name.
        """
        one_of(self.setting, name, self._things)

    def __getitem__(self, name: str) -> Thing:
        self.check(name)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        # A list or a table, which a file may hold in place of a name, cannot be looked up.
        return isinstance(name, str) and name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def items(self) -> ItemsView[str, Thing]:
        """Names and things, in the order of registration."""
        return self._things.items()


def forget(file: str) -> None:
    """Remove what ``file`` entered from every registry, so that it can be imported again."""
    for registry in list(Registry._all):
        for name in [name for name, where in registry._files.items() if where == file]:
            registry.remove(name)
