"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their binary version: records of equal length."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.federation.datasets.spec import Dataset, Source, check_labels, dataset, standardised

__all__ = ["load_cifar10", "load_cifar100"]

_CIFAR10_FILES = (
    *(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
    "cifar-10-batches-bin/test_batch.bin",
)
_CIFAR100_FILES = ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin")
_PIXELS = 3 * 32 * 32


# The checksums are what other loaders of these files check, such as TensorFlow Datasets. The md5 of
# https://www.cs.toronto.edu/~kriz/cifar.html belong to the same files.
@dataset(
    "cifar10",
    about="photos, 3 x 32 x 32; 50,000 + 10,000; binary version",
    files=_CIFAR10_FILES,
    source=Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    ),
)
def load_cifar10(folder: Path) -> Dataset:
    """Ten classes; a record has one byte of label. The constants are those in common use."""
    pixels = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _load("cifar10", folder, _CIFAR10_FILES, 10, 1, pixels)


@dataset(
    "cifar100",
    about="photos, 3 x 32 x 32, 100 fine classes; 50,000 + 10,000; binary version",
    files=_CIFAR100_FILES,
    source=Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
    ),
)
def load_cifar100(folder: Path) -> Dataset:
    """A hundred classes; a record has a byte of coarse label, then one of fine label, used here."""
    pixels = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return _load("cifar100", folder, _CIFAR100_FILES, 100, 2, pixels)


def _load(
    name: str,
    folder: Path,
    files: tuple[str, ...],
    num_classes: int,
    label_bytes: int,
    pixels: tuple[tuple[float, ...], tuple[float, ...]],
) -> Dataset:
    """All files but the last are for training. The last byte of a record's label is used."""

    def part(files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        records = np.concatenate([_read_records(folder, file, label_bytes + _PIXELS) for file in files])
        labels = records[:, label_bytes - 1]
        check_labels(labels, num_classes, " or ".join(Path(file).name for file in files))
        # Each record holds the labels, then all red values row by row, then green, then blue.
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        return standardised(images, *pixels), torch.from_numpy(labels.astype(np.int64))

    return Dataset(name, *part(files[:-1]), *part(files[-1:]), num_classes)


def _read_records(folder: Path, file: str, size: int) -> np.ndarray:
    """The records ``(n, size)`` uint8 of a file, which may also lie in ``folder`` itself."""
    name = Path(file).name
    path = next((path for path in (folder / name, folder / file) if path.exists()), None)
    if path is None:
        raise ValueError(
            f"data.data_dir must hold {name} or {file} of the binary version (not the Python one), neither is in {folder}"
        )
    raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % size != 0:
        raise ValueError(f"data.data_dir: {path} must hold whole records of {size} bytes, it has {len(raw)} bytes")
    return raw.reshape(-1, size)
