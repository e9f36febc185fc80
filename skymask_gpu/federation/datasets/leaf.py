"""LEAF's JSON layout (Caldas et al., arXiv 1812.01097): what each of many people wrote.

LEAF's preprocessing writes files into the folders ``train`` and ``test``. Each is a JSON object
with ``users``, a list of names, and ``user_data``, which has lists ``x`` and ``y`` for each of
them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["LEAF_FOLDERS", "read_leaf"]

LEAF_FOLDERS = ("train", "test")

# From a user's lists x and y to arrays of the same length; a ValueError says what is wrong.
Converted = tuple[np.ndarray, np.ndarray]


def read_leaf(folder: Path, part: str, convert: Callable[[list[Any], list[Any]], Converted]) -> tuple[Tensor, Tensor, Tensor]:
    """All samples of one part, user by user in the order of the files.

    Args:
        folder: the folder that holds ``train`` and ``test``.
        part: one of the two.
        convert: makes the inputs ``(n, ...)`` and labels ``(n,)`` of one user.

    Returns:
        Inputs ``(n, ...)``, labels ``(n,)`` int64, and the number of each sample's user, ``(n,)``
        int64 from 0. A user without samples has no number.

    Raises:
        ValueError: there is no file, or one has another layout; it names the file and the user.
    """
    files = sorted((folder / part).glob("*.json"))
    if not files:
        raise ValueError(f"data.data_dir must hold {part}/*.json, there is none in {folder}")
    samples: dict[str, list[Converted]] = {}
    for path in files:
        for user, lists in _users(path):
            x, y = lists.get("x"), lists.get("y")
            if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
                raise ValueError(f"data.data_dir: {path}: user {user!r} must have lists x and y of the same length")
            if not x:
                continue
            try:
                samples.setdefault(user, []).append(convert(x, y))
            except (ValueError, TypeError) as error:
                raise ValueError(f"data.data_dir: {path}: user {user!r}: {error}") from error
    if not samples:
        raise ValueError(f"data.data_dir: {folder / part} holds no sample")
    sizes = [sum(len(labels) for _, labels in parts) for parts in samples.values()]
    inputs, labels = (
        np.concatenate(arrays) for arrays in zip(*(one for parts in samples.values() for one in parts), strict=True)
    )
    users = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)), users


def _users(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.data_dir: {path} is no JSON file: {error}") from error
    users, data = (content.get(key) for key in ("users", "user_data")) if isinstance(content, dict) else (None, None)
    if not isinstance(users, list) or not isinstance(data, dict) or not all(isinstance(data.get(user), dict) for user in users):
        raise ValueError(f"data.data_dir: {path} must have users, and x and y of each in user_data, as LEAF writes them")
    return [(str(user), data[user]) for user in users]
