"""Attacks, rules and transforms by name, each with its settings, and tables that choose one.

In a TOML file the settings of the chosen entry stand beside the keys that all entries share::

    [attack]
    name = "ipm"      # all attacks have a name and a share
    share = 0.2
    epsilon = 0.5     # only this attack has an epsilon
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from skymask_gpu.engine.registry import Registry, one_of

__all__ = ["Choice", "Choices", "NoSettings", "above_zero", "own_fields", "positive_share", "with_settings"]


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """The settings of an entry that has none."""


class Choices(Registry[Callable[..., Any]]):
    """Functions or classes by name, each with the dataclass of its own settings.

    Args:
        setting: the setting that chooses one, as its user writes it; errors name it.
        common: the keys that the table has for every entry; no entry's settings may have them, too.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Scaled:
        ...     factor: float = 2.0
        >>> shapes = Choices("shape.name")
        >>> @shapes.register("scaled", settings=Scaled)
        ... def scaled(side, settings):
        ...     return side * settings.factor
        >>> shapes.settings_of("scaled")()
        Scaled(factor=2.0)
    """

    def __init__(self, setting: str, common: Sequence[str] = ("name",)) -> None:
        super().__init__(setting)
        self._common = common
        self._settings: dict[str, type] = {}

    def register(self, name: str, *, settings: type = NoSettings) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator that enters what it decorates under ``name``, and returns it unchanged.

        Args:
            name: what users write.
            settings: a frozen dataclass whose fields are the entry's own keys; it checks their
                values in ``__post_init__``.

        Raises:
            ValueError: there is an entry of this name already; the message names the file that
                registered it.
            TypeError: ``settings`` is no dataclass, or has a key that all entries have.
        """
        caller = sys._getframe(1).f_code.co_filename
        if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
            raise TypeError(f"{self.setting} {name!r}: its settings must be a dataclass, got {settings!r}")
        for field in dataclasses.fields(settings):
            if field.name in (*self._common, "settings"):
                raise TypeError(f"{self.setting} {name!r}: its settings must not have a field {field.name!r}, choose another")

        def enter(thing: Callable[..., Any]) -> Callable[..., Any]:
            self.add(name, thing, caller)
            self._settings[name] = settings
            return thing

        return enter

    def remove(self, name: str) -> None:
        super().remove(name)
        del self._settings[name]

    def settings_of(self, name: str) -> type:
        """The dataclass of the settings of ``name``.

        Raises:
            ValueError: there is no such entry; it names the nearest one.
        """
        self.check(name)
        return self._settings[name]


def with_settings(thing: Callable[..., Any], settings: Any, *arguments: Any) -> Any:
    """Call an entry; its settings, where it has some, are the last argument."""
    return thing(*arguments) if isinstance(settings, NoSettings) else thing(*arguments, settings)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A table that chooses an entry of a registry, and holds the settings of that entry.

    Attributes:
        settings: an instance of the entry's own dataclass; None means its defaults.
    """

    registry: ClassVar[Choices]
    # The field that holds the entry's name, and what errors call the table.
    key: ClassVar[str] = "name"
    table: ClassVar[str]

    settings: Any = None

    def __post_init__(self) -> None:
        name = getattr(self, self.key)
        self.check_name(name)
        kind = self.registry.settings_of(name)
        if self.settings is None:
            for field in own_fields(kind):
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    raise ValueError(f"{self.table}.{field.name} must be given for {self.key} {name!r}, it has no default")
            object.__setattr__(self, "settings", kind())
        elif type(self.settings) is not kind:
            raise ValueError(
                f"{self.table}.{self.key} {name!r} has settings of the type {kind.__name__}, got {self.settings!r}; "
                "give None for its defaults"
            )

    @classmethod
    def check_name(cls, name: object) -> None:
        """Raise a ValueError unless the table may choose ``name``."""
        one_of(f"{cls.table}.{cls.key}", name, cls.registry)


def own_fields(kind: type) -> list[dataclasses.Field]:
    """The fields that are keys of a table: all but ``settings``, whose fields stand beside them."""
    hidden = {"settings"} if issubclass(kind, Choice) else set()
    return [field for field in dataclasses.fields(kind) if field.name not in hidden]


def above_zero(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def positive_share(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
