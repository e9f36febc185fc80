"""The names of a sweep's cells, which are those of their folders, too."""

import os
from hashlib import blake2b
from typing import Any

__all__ = ["cell_name", "with_hash"]

# The most bytes that a folder's name has on common file systems.
_LONGEST = 255


def cell_name(chosen: dict[str, Any]) -> str:
    """The name of the cell that chooses these values of a grid, by dotted key.

    Example:
        >>> cell_name({"attack.name": "min-max", "defence.rule": "krum", "seed": 1})
        'attack=min-max,rule=krum,seed=1'
    """
    name = ",".join(f"{_short(key)}={value}" for key, value in chosen.items())
    name = "".join("_" if character in '/\\:*?"<>|' else character for character in name)
    return name if len(os.fsencode(name)) <= _LONGEST else with_hash(name, chosen)


def with_hash(name: str, chosen: dict[str, Any]) -> str:
    """A name that no cell with other values has: what fits of ``name``, and a hash of the values.

    Cells have the same plain name if only characters that no folder's name may have tell them
    apart. The hash depends on no other cell, so that a sweep with more values finds this
    cell's folder again.
    """
    text = repr(sorted(chosen.items(), key=lambda item: item[0]))
    digest = blake2b(text.encode(errors="backslashreplace"), digest_size=4).hexdigest()
    # A character of several bytes may be cut in the middle; what is left of it is dropped.
    kept = os.fsencode(name)[: _LONGEST - len(digest) - 1].decode(errors="ignore")
    return f"{kept},{digest}"


def _short(key: str) -> str:
    """A short name of a key: ``attack.name`` becomes attack, and ``defence.rule`` becomes rule."""
    *tables, last = key.split(".")
    return tables[-1] if last == "name" and tables else last
