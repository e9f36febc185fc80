"""The check of a setting that is one of several names."""

import difflib
from collections.abc import Iterable

__all__ = ["one_of"]


def one_of(setting: str, value: str, known: Iterable[str]) -> None:
    """Refuse an unknown name, with the nearest known one.

    Raises:
        ValueError: ``value`` is not in ``known``.
    """
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{setting} must be one of {', '.join(known)}, got {value!r}{hint}")
