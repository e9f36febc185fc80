"""``--set key=value``: settings that the command line changes in a file's tables."""

import tomllib
from collections.abc import Iterable
from typing import Any

from skymask_gpu.federation.tables import Table, dotted, merged

__all__ = ["changed", "changed_keys"]

# Lists of tables in which each table overrides keys of the file.
_OVERRIDING = ("variants", "recipes")


def changed(content: Table, changes: Iterable[str], source: str) -> Table:
    """The tables of a file after changes of the form ``key=value``, the last of which wins.

    A change also wins over a variant or a recipe that overrides the key. A key of the grid is
    changed by its name there: ``grid.seed=[0, 1]``.

    Args:
        content: the tables; left as they are.
        changes: dotted keys with TOML values; a value that is no TOML is a string.
        source: the file, which errors name.

    Raises:
        ValueError: a change has no key or no ``=``, or the grid has its key.

    Example:
        >>> file = {"seed": 1, "attack": {"name": "ipm"}}
        >>> changed(file, ["attack.name=trim", "seed=2"], "a.toml")
        {'seed': 2, 'attack': {'name': 'trim'}}
    """
    for change in changes:
        table = _parsed(change)
        content = merged(content, table)
        for name in _OVERRIDING:
            if isinstance(content.get(name), list) and name not in table:
                content[name] = [_overridden(one, table) if isinstance(one, dict) else one for one in content[name]]
    grid = content.get("grid")
    for key in changed_keys(changes):
        if isinstance(grid, dict) and key in grid:
            raise ValueError(f"--set {key}: {source} has this key in its [grid]; give a list: --set 'grid.{key}=[...]'")
    return content


def changed_keys(changes: Iterable[str]) -> list[str]:
    """The dotted keys that the changes name, without those of the grid.

    Example:
        >>> changed_keys(["attack.share=0.2", "grid.seed=[1, 2]"])
        ['attack.share']
    """
    tables = [_parsed(change) for change in changes]
    return [key for table in tables if "grid" not in table for key in dotted(table)]


def _parsed(change: str) -> Table:
    """One change as nested tables."""
    key, equals, text = (part.strip() for part in change.partition("="))
    if not equals or not key:
        raise ValueError(f"--set must be key=value, such as rounds=5 or attack.name=trim, got {change!r}")
    try:
        table = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--set: {key!r} is no dotted key, as attack.share is: {error}") from error
    try:
        given = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        given = {}
    table = _with_leaf(table, given["value"] if given.keys() == {"value"} else text)
    # The keys of a grid are dotted themselves.
    if isinstance(table.get("grid"), dict):
        table["grid"] = dotted(table["grid"])
    return table


def _with_leaf(table: Table, value: Any) -> Table:
    return {key: _with_leaf(inner, value) if isinstance(inner, dict) else value for key, inner in table.items()}


def _overridden(table: Table, change: Table) -> Table:
    """``table`` with the values of ``change`` in the keys that both have."""
    result = dict(table)
    for key in change.keys() & table.keys():
        both = isinstance(change[key], dict) and isinstance(table[key], dict)
        result[key] = _overridden(table[key], change[key]) if both else change[key]
    return result
