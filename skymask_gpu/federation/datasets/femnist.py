"""FEMNIST: handwritten digits and letters by writer, in LEAF's layout."""

from pathlib import Path
from typing import Any

import numpy as np

from skymask_gpu.federation.datasets.leaf import LEAF_FOLDERS, Converted, read_leaf
from skymask_gpu.federation.datasets.spec import Dataset, check_labels, dataset

__all__ = ["load_femnist"]

_SIDE, _CLASSES = 28, 62


@dataset(
    "femnist",
    about="handwritten digits and letters by writer, 28 x 28, 62 classes",
    files=LEAF_FOLDERS,
    origin="clone github.com/TalwalkarLab/leaf, and in data/femnist run ./preprocess.sh -s niid --sf 0.05 -k 0 -t sample",
)
def load_femnist(folder: Path) -> Dataset:
    """FEMNIST (Caldas et al., arXiv 1812.01097), standardised by its own training pixels.

    The writers are the subjects: with ``data.partition = "subject"``, each client is a writer.
    """
    train_inputs, train_labels, writers = read_leaf(folder, "train", _images)
    test_inputs, test_labels, _ = read_leaf(folder, "test", _images)
    mean, std = train_inputs.mean(), train_inputs.std().clamp_min(1e-6)
    train_inputs, test_inputs = ((inputs - mean) / std for inputs in (train_inputs, test_inputs))
    return Dataset("femnist", train_inputs, train_labels, test_inputs, test_labels, _CLASSES, writers)


def _images(x: list[Any], y: list[Any]) -> Converted:
    """Images ``(n, 1, 28, 28)`` float32 from lists of 784 grey values."""
    images, labels = np.asarray(x, np.float32), np.asarray(y)
    if images.shape != (len(x), _SIDE**2) or not np.isfinite(images).all():
        raise ValueError(f"x must hold {_SIDE**2} finite grey values per image, it has the shape {images.shape}")
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0:
        raise ValueError(f"y must hold whole numbers from 0 to {_CLASSES - 1}")
    check_labels(labels, _CLASSES, "y")
    return images.reshape(-1, 1, _SIDE, _SIDE), labels
