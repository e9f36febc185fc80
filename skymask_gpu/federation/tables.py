"""TOML tables to dataclasses and back; an unknown key is refused with the nearest known one.

A table that is a :class:`~skymask_gpu.federation.choices.Choice` holds the settings of the entry
that it chooses beside its own keys. Where a file makes several runs that choose differently,
:func:`applied` keeps a key where it applies.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from skymask_gpu.federation.choices import Choice, own_fields

__all__ = ["Table", "applied", "as_table", "dotted", "merged", "read_table"]

Table = dict[str, Any]


def read_table(kind: type, table: Table, source: str, prefix: str = "", tables: type | None = None) -> Any:
    """An instance of a dataclass from a TOML table.

    Args:
        kind: the dataclass.
        table: what the file holds.
        source: the file, which errors name.
        prefix: what errors write before a key of the table, such as ``"data."``.
        tables: the dataclass whose fields are all tables of the file. If a key stands in the wrong
            table, the error says where it belongs.

    Raises:
        ValueError: an unknown key, a value of another type, or one that the dataclass refuses.
    """
    tables = tables or kind
    shared, own = _fields(kind), {}
    if issubclass(kind, Choice):
        name = _chosen(kind, table)
        if name is dataclasses.MISSING:
            raise ValueError(f"config: {source}: {prefix}{kind.key} is missing, and it has no default")
        if not isinstance(name, str):
            hint = _grid_hint(f"{prefix}{kind.key}", name)
            raise ValueError(f"config: {source}: {prefix}{kind.key} must be a string, got {name!r}{hint}")
        kind.check_name(name)
        own = _own(kind, table)
    values: Table = {}
    settings: Table = {}
    for key, value in table.items():
        if key in shared:
            values[key] = _value(f"{prefix}{key}", value, shared[key], source, tables)
        elif key in own:
            settings[key] = _value(f"{prefix}{key}", value, own[key], source, tables)
        else:
            raise _unknown(key, prefix, [*shared, *own], source, tables)
    if issubclass(kind, Choice) and settings:
        values["settings"] = _made(kind.registry.settings_of(_chosen(kind, table)), settings, source, prefix)
    return _made(kind, values, source, prefix)


def _made(kind: type, values: Table, source: str, prefix: str) -> Any:
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"config: {source}: {prefix}{field.name} is missing, and it has no default")
    return kind(**values)


def _value(name: str, value: Any, wanted: Any, source: str, tables: type) -> Any:
    """Convert a TOML value to a field's type: an integer to a float, a list to a tuple."""
    if isinstance(wanted, UnionType):
        # The field takes a string or a list. The dataclass checks which strings it knows.
        (wanted,) = (one for one in get_args(wanted) if one is not str)
        if isinstance(value, str):
            return value
    if get_origin(wanted) is tuple:
        (item, *_) = get_args(wanted)
        if not isinstance(value, list) or (isinstance(item, type) and not all(_fits(one, item) for one in value)):
            raise ValueError(f"config: {source}: {name} must be a list of {_plural(item)}, got {value!r}")
        return tuple(_value(f"{name}[{number}]", one, item, source, tables) for number, one in enumerate(value))
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        # For a table or a list within the table, the key's name alone is enough.
        if issubclass(wanted, Choice) and isinstance(value, str) and name not in _fields(tables):
            value = {wanted.key: value}
        if not isinstance(value, dict):
            raise ValueError(f"config: {source}: {name} must be a table, got {value!r}")
        return read_table(wanted, value, source, f"{name}.", tables)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not _fits(value, wanted):
        hint = _grid_hint(name, value)
        raise ValueError(f"config: {source}: {name} must be {getattr(wanted, '__name__', wanted)}, got {value!r}{hint}")
    return value


def _grid_hint(name: str, value: Any) -> str:
    """The remedy for a list in place of one value; no grid reaches into a list of tables."""
    if not isinstance(value, list) or "[" in name:
        return ""
    return f'; for one run with each of several values, write "{name}" = {value!r} under [grid], and play it with sweep'


def _fits(value: Any, wanted: type) -> bool:
    if dataclasses.is_dataclass(wanted):
        return isinstance(value, dict | str)
    if wanted is float and isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _plural(item: Any) -> str:
    if dataclasses.is_dataclass(item):
        return "names or tables"
    return {str: "strings", int: "integers", float: "numbers", bool: "booleans"}.get(item, str(item))


def _fields(kind: type) -> dict[str, Any]:
    """The types of the keys that the table itself has."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in own_fields(kind)}


def _chosen(kind: type[Choice], table: Table) -> Any:
    """The name that a table chooses; MISSING if it chooses none and there is no default."""
    (field,) = (field for field in dataclasses.fields(kind) if field.name == kind.key)
    return table.get(kind.key, field.default)


def _own(kind: type[Choice], table: Table) -> dict[str, Any]:
    """The types of the keys of the entry that a table chooses."""
    name = _chosen(kind, table)
    # An unknown name is refused later, when the run is read.
    return _fields(kind.registry.settings_of(name)) if name in kind.registry else {}


def applied(kind: type, contents: Sequence[Table], source: str) -> list[set[str]]:
    """Take settings of attacks and rules out of those runs of a file that they do not apply to.

    A key that belongs to the attack or rule of some run is kept in the runs that choose this attack
    or rule, and taken out of the others. A key that belongs to none stays, and is refused when the
    run is read.

    Args:
        kind: the dataclass of a run.
        contents: the runs' tables; changed in place.
        source: the file, which errors name.

    Returns:
        The dotted keys that were taken out, for each run.
    """
    dropped: list[set[str]] = [set() for _ in contents]
    for table, wanted in _choices(kind).items():
        inner = [content.get(table) for content in contents]
        chosen = [(number, part) for number, part in enumerate(inner) if isinstance(part, dict)]
        known = {key for _, part in chosen for key in _own(wanted, part)}
        for number, part in chosen:
            foreign = [key for key in part if key in known and key not in {**_own(wanted, part), **_fields(wanted)}]
            contents[number][table] = {key: value for key, value in part.items() if key not in foreign}
            dropped[number].update(f"{table}.{key}" for key in foreign)
    return dropped


def _choices(kind: type) -> dict[str, type[Choice]]:
    """The tables of a run that choose an entry of a registry."""
    return {name: wanted for name, wanted in _fields(kind).items() if isinstance(wanted, type) and issubclass(wanted, Choice)}


def merged(base: Table, override: Table) -> Table:
    """``base`` with the keys of ``override``, table by table."""
    result = dict(base)
    for key, value in override.items():
        inner = result.get(key, {})
        result[key] = merged(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
    return result


def dotted(table: Table, prefix: str = "") -> Table:
    """Nested tables as one table with dotted keys.

    Example:
        >>> dotted({"seed": 1, "data": {"clients": 5}})
        {'seed': 1, 'data.clients': 5}
    """
    flat: Table = {}
    for key, value in table.items():
        flat.update(dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def as_table(value: Any, *, short: bool = False) -> Any:
    """The tables that :func:`read_table` makes the same dataclass from.

    Args:
        value: a dataclass, or a value of one.
        short: an entry whose settings are the defaults is written as its name.
    """
    if isinstance(value, Choice):
        table = {field.name: as_table(getattr(value, field.name)) for field in own_fields(type(value))}
        settings = {
            field.name: as_table(getattr(value.settings, field.name), short=True)
            for field in dataclasses.fields(value.settings)
        }
        is_plain = short and table.keys() == {value.key} and _is_default(value.settings)
        return table[value.key] if is_plain else table | settings
    if dataclasses.is_dataclass(value):
        return {field.name: as_table(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [as_table(item) for item in value]
    return value


def _is_default(settings: Any) -> bool:
    """Whether every field of a dataclass has its default."""
    for field in dataclasses.fields(settings):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(settings, field.name) != default:
            return False
    return True


def _unknown(key: str, prefix: str, known: list[str], source: str, tables: type) -> ValueError:
    hint = _nearest(key, known)
    places = [f"{prefix}{hint}"] if hint else _elsewhere(key, prefix, tables)
    guess = f"did you mean {' or '.join(places)}? " if places else ""
    return ValueError(f"config: {source}: unknown key {prefix}{key}; {guess}known are {', '.join(known)}")


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """The most similar known key, or one that the key ends with: ``std`` in ``noise_std``."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1) or [one for one in known if key.endswith(f"_{one}")]
    return near[0] if near else None


def _elsewhere(key: str, prefix: str, tables: type) -> list[str]:
    """For a key in the wrong table, or with the wrong attack or rule: where it belongs.

    If it belongs to another attack or rule of the table that it stands in, no other is named.
    """
    places = []
    for table, wanted in _fields(tables).items():
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and key in _fields(wanted):
            places.append(f"{table}.{key}")
    owners: dict[str, list[str]] = {}
    for table, choice in _choices(tables).items():
        for name in choice.registry:
            if near := _nearest(key, _fields(choice.registry.settings_of(name))):
                owners.setdefault(f"{table}.{near}", []).append(f"{table}.{choice.key} = {name!r}")
    own = {place: names for place, names in owners.items() if place.startswith(prefix)} if prefix else {}
    return places or [f"{place} of {', '.join(names)}" for place, names in (own or owners).items()]
