"""Data sets read from their standard files, and the clean root set drawn from the training part."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Dataset", "load_dataset", "split_root"]


@dataclass(frozen=True)
class Dataset:
    """Images ``(n, channels, height, width)`` float32, standardised, and labels ``(n,)`` int64."""

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(
            self.name,
            self.train_inputs.to(device),
            self.train_labels.to(device),
            self.test_inputs.to(device),
            self.test_labels.to(device),
            self.num_classes,
        )


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Load ``"digits"`` (bundled with scikit-learn) or ``"mnist"`` (IDX files in ``data_dir``, plain or gzipped).

    Raises:
        ValueError: unknown name, or ``data_dir`` is missing or lacks a file.
    """
    if name not in DATASETS:
        raise ValueError(f"data.dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](data_dir)


def split_root(labels: Tensor, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of a root set with equally many samples of each class (as far as it divides), and of all the rest.

    Args:
        labels: ``(n,)`` labels of the training data.
        num_samples: of the root set, fewer than n.

    Raises:
        ValueError: ``num_samples`` is not between 1 and n - 1.
    """
    if not 1 <= num_samples < len(labels):
        raise ValueError(f"data.root_samples must be between 1 and {len(labels) - 1}, got {num_samples}")
    order = torch.randperm(len(labels), generator=generator)
    # deal the shuffled samples class by class: the k-th samples of all classes come before any (k+1)-th
    rank = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_label = order[labels[order] == label]
        rank[of_label] = torch.arange(len(of_label))
    dealt = order[rank[order].argsort(stable=True)]
    return dealt[:num_samples].sort().values, dealt[num_samples:].sort().values


def _load_digits(data_dir: Path | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError("data.dataset 'digits' needs scikit-learn: pip install 'skymask-gpu[run]'") from error

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    inputs = (inputs - inputs.mean()) / inputs.std()
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Dataset("digits", inputs[train], targets[train], inputs[test], targets[test], 10)


def _load_mnist(data_dir: Path | None) -> Dataset:
    def images(part: str) -> Tensor:
        pixels = torch.from_numpy(_read_idx(data_dir, f"{part}-images-idx3-ubyte"))
        return (pixels.float() / 255 - 0.1307).div_(0.3081).unsqueeze(1)  # mean and deviation of the training pixels

    def labels(part: str) -> Tensor:
        return torch.from_numpy(_read_idx(data_dir, f"{part}-labels-idx1-ubyte")).long()

    return Dataset("mnist", images("train"), labels("train"), images("t10k"), labels("t10k"), 10)


def _read_idx(data_dir: Path | None, name: str) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, the format of MNIST's distribution (Y. LeCun)."""
    if data_dir is None:
        raise ValueError(f"data.data_dir must name the folder that holds {name}(.gz); pass --data-dir")
    plain, zipped = data_dir / name, data_dir / f"{name}.gz"
    if plain.exists():
        raw = plain.read_bytes()
    elif zipped.exists():
        raw = gzip.decompress(zipped.read_bytes())
    else:
        raise ValueError(f"data.data_dir must hold {name} or {name}.gz, neither is in {data_dir}")
    zeros, kind, num_dims = struct.unpack_from(">HBB", raw)
    shape = struct.unpack_from(f">{num_dims}I", raw, 4)
    offset = 4 + 4 * num_dims
    if zeros != 0 or kind != 0x08 or len(raw) - offset != np.prod(shape):
        raise ValueError(f"data.data_dir: {name} is no whole IDX file of unsigned bytes")
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape).copy()


DATASETS = {"digits": _load_digits, "mnist": _load_mnist}
