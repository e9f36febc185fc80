"""Shakespeare: the next character in the lines of each role, in LEAF's layout."""

from pathlib import Path
from typing import Any

import numpy as np

from skymask_gpu.federation.datasets.leaf import LEAF_FOLDERS, Converted, read_leaf
from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["LETTERS", "encoded", "load_shakespeare"]

# The characters of LEAF's text, in its order. Their number stands for every other character.
LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_LENGTH = 80
_NUMBER_OF = np.full(128, len(LETTERS), np.int32)
_NUMBER_OF[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))


@dataset(
    "shakespeare",
    about="80 characters of a role's lines and the next one, 81 classes, by role",
    files=LEAF_FOLDERS,
    origin="clone github.com/TalwalkarLab/leaf, and in data/shakespeare run ./preprocess.sh -s niid --sf 0.2 -k 0 -t sample",
)
def load_shakespeare(folder: Path) -> Dataset:
    """Shakespeare (McMahan et al., AISTATS 2017; Caldas et al., arXiv 1812.01097).

    The inputs are the numbers of 80 characters, int32, and the label is that of the next one. The
    roles are the subjects: with ``data.partition = "subject"``, each client is a role of a play.
    """
    train_inputs, train_labels, roles = read_leaf(folder, "train", _sequences)
    test_inputs, test_labels, _ = read_leaf(folder, "test", _sequences)
    return Dataset("shakespeare", train_inputs, train_labels, test_inputs, test_labels, len(LETTERS) + 1, roles)


def encoded(text: str) -> np.ndarray:
    """The numbers of a text's characters, ``(n,)`` int32.

    Example:
        >>> encoded("a !").tolist(), encoded("\\t").tolist()
        ([53, 1, 2], [80])
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.where(codes < len(_NUMBER_OF), _NUMBER_OF[np.minimum(codes, len(_NUMBER_OF) - 1)], np.int32(len(LETTERS)))


def _sequences(x: list[Any], y: list[Any]) -> Converted:
    """Numbers ``(n, 80)`` int32 of characters, and the number of the character after them."""
    if not all(isinstance(text, str) and len(text) == _LENGTH for text in x):
        raise ValueError(f"x must hold texts of {_LENGTH} characters")
    if not all(isinstance(text, str) and len(text) == 1 for text in y):
        raise ValueError("y must hold one character per text")
    return encoded("".join(x)).reshape(-1, _LENGTH), encoded("".join(y))
