"""Data sets read from their standard files, and the clean root data set drawn from the training part."""

import csv
import dataclasses
import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Dataset", "load_dataset", "split_root"]

# Mean and standard deviation of the training pixels, divided by 255 first, per channel; the constants in common use.
_MNIST_PIXELS = ((0.1307,), (0.3081,))
_FASHION_MNIST_PIXELS = ((0.2860,), (0.3530,))
_CIFAR10_PIXELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_PIXELS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_HAR_FEATURES = 561

_Pixels = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Dataset:
    """A data set for classification, split into a training and a test part.

    Attributes:
        name: key of :data:`DATASETS`.
        train_inputs: ``(n, channels, height, width)`` float32 images, standardised, or ``(n, features)`` float32.
        train_labels: ``(n,)`` int64, 0 to ``num_classes - 1``.
        test_inputs: as ``train_inputs``.
        test_labels: as ``train_labels``.
        num_classes: how many there are.
        train_subjects: ``(n,)`` int64, the person a training sample is of, 0 to S - 1; None where samples are of nobody.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    train_subjects: Tensor | None = None

    def to(self, device: torch.device) -> "Dataset":
        """The same on ``device``."""
        tensors: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set from its standard files.

    ==================== =======================================================================================================
    ``digits``           bundled with scikit-learn; 1,437 + 360 images of 8x8
    ``mnist``            four IDX files, plain or gzipped
    ``fashion-mnist``    the same names (Xiao et al. 2017, arXiv 1708.07747)
    ``cifar10``          binary version: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, in ``data_dir`` or
                         in its folder ``cifar-10-batches-bin``
    ``cifar100``         binary version: ``train.bin`` and ``test.bin``, there or in ``cifar-100-binary``; fine labels
    ``har``              human activity recognition with smartphones (UCI): ``train.csv`` and ``test.csv`` with 561 feature
                         columns, ``subject`` and ``Activity``; of each subject's samples in both files 75% are for training and
                         25% for testing, as in FLTrust (Cao et al., NDSS 2021), drawn with a fixed seed
    ==================== =======================================================================================================

    Args:
        name: one of the above.
        data_dir: folder with the files; not needed for ``digits``.

    Raises:
        ValueError: unknown name, ``data_dir`` is missing or lacks a file, or a file is not what it should be.
    """
    if name not in DATASETS:
        raise ValueError(f"data.dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](data_dir)


def split_root(labels: Tensor, num_samples: int, generator: torch.Generator, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Indices of a root data set drawn without replacement, and of all the rest, both ascending.

    Args:
        labels: ``(n,)`` int64 labels of the training data.
        num_samples: of the root data set, fewer than n.
        generator: source of randomness.
        bias: 0: equally many samples of each class, as far as it divides. Else the bias probability of FLTrust (Cao et al.,
            NDSS 2021), the share of one class, here class 0: ``round(bias * num_samples)`` samples are of class 0, the others
            are equally many of each other class, as far as it divides. One over the number of classes is no bias.

    Returns:
        ``(num_samples,)`` and ``(n - num_samples,)`` int64.

    Raises:
        ValueError: ``num_samples`` is not between 1 and n - 1, ``bias`` is not between 0 and 1, or there are too few samples of
            class 0 or of the others.
    """
    if not 1 <= num_samples < len(labels):
        raise ValueError(f"data.root_samples must be between 1 and {len(labels) - 1}, got {num_samples}")
    if not 0 <= bias <= 1:
        raise ValueError(f"data.root_bias must be between 0 (all classes alike) and 1, got {bias}")
    order = torch.randperm(len(labels), generator=generator)
    # deal the shuffled samples class by class: the k-th samples of all classes come before any (k+1)-th
    rank = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_label = order[labels[order] == label]
        rank[of_label] = torch.arange(len(of_label))
    dealt = order[rank[order].argsort(stable=True)]
    if bias > 0:
        dealt = _biased_first(dealt, labels, num_samples, bias)
    return dealt[:num_samples].sort().values, dealt[num_samples:].sort().values


def _biased_first(dealt: Tensor, labels: Tensor, num_samples: int, bias: float) -> Tensor:
    """``dealt`` in an order whose first ``num_samples`` have the share ``bias`` of class 0."""
    is_first = labels[dealt] == 0
    first, others = dealt[is_first], dealt[~is_first]
    wanted_first = round(bias * num_samples)
    for kind, wanted, found in (
        ("class 0", wanted_first, len(first)),
        ("the other classes", num_samples - wanted_first, len(others)),
    ):
        if wanted > found:
            raise ValueError(
                f"data.root_bias = {bias} asks for {wanted} root samples of {kind}, there are {found}; "
                f"lower data.root_samples, {num_samples} now, or change data.root_bias"
            )
    return torch.cat([first[:wanted_first], others, first[wanted_first:]])


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
    return _load_idx("mnist", data_dir, _MNIST_PIXELS)


def _load_fashion_mnist(data_dir: Path | None) -> Dataset:
    return _load_idx("fashion-mnist", data_dir, _FASHION_MNIST_PIXELS)


def _load_idx(name: str, data_dir: Path | None, pixels: _Pixels) -> Dataset:
    def part(prefix: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(name, data_dir, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(name, data_dir, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(
                f"data.data_dir: {prefix}-images-idx3-ubyte holds {len(images)} images and {prefix}-labels-idx1-ubyte "
                f"{len(labels)} labels in {data_dir}, they must be as many; {_remedy(name)}"
            )
        _check_labels(name, labels, 10, f"{prefix}-labels-idx1-ubyte")
        return _standardised(images[:, None], pixels), torch.from_numpy(labels.astype(np.int64))

    return Dataset(name, *part("train"), *part("t10k"), 10)


def _read_idx(dataset: str, data_dir: Path | None, name: str, num_dims: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, the format of MNIST's distribution (Y. LeCun)."""
    folder = _needed(data_dir, f"{name}(.gz)")
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        raw = plain.read_bytes()
    elif zipped.exists():
        try:
            raw = gzip.decompress(zipped.read_bytes())
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"data.data_dir: {zipped} is no whole gzip file: {error}; {_remedy(dataset)}") from error
    else:
        raise ValueError(f"data.data_dir must hold {name} or {name}.gz, neither is in {folder}; {_remedy(dataset)}")
    header = struct.calcsize(f">HBB{num_dims}I")
    zeros, kind, dims, *shape = struct.unpack_from(f">HBB{num_dims}I", raw.ljust(header, b"\xff"))
    if zeros != 0 or kind != 0x08 or dims != num_dims or len(raw) - header != np.prod(shape, dtype=object):
        raise ValueError(
            f"data.data_dir: {name} is no whole IDX file of unsigned bytes in {num_dims} dimensions ({folder}); "
            f"{_remedy(dataset)}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _load_cifar10(data_dir: Path | None) -> Dataset:
    names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    return _load_cifar("cifar10", data_dir, "cifar-10-batches-bin", names, "test_batch.bin", 10, _CIFAR10_PIXELS)


def _load_cifar100(data_dir: Path | None) -> Dataset:
    return _load_cifar("cifar100", data_dir, "cifar-100-binary", ["train.bin"], "test.bin", 100, _CIFAR100_PIXELS)


def _load_cifar(
    name: str, data_dir: Path | None, folder: str, train: list[str], test: str, num_classes: int, pixels: _Pixels
) -> Dataset:
    """CIFAR's binary version: records of label bytes (the last one is ours), then 32x32 red, green and blue planes."""
    label_bytes = 2 if num_classes == 100 else 1  # CIFAR-100 has the coarse label before the fine one

    def part(files: list[str]) -> tuple[Tensor, Tensor]:
        records = np.concatenate([_read_records(name, data_dir, folder, file, label_bytes + 3072) for file in files])
        labels = records[:, label_bytes - 1]
        _check_labels(name, labels, num_classes, " or ".join(files))
        return _standardised(records[:, label_bytes:].reshape(-1, 3, 32, 32), pixels), torch.from_numpy(labels.astype(np.int64))

    return Dataset(name, *part(train), *part([test]), num_classes)


def _read_records(dataset: str, data_dir: Path | None, folder: str, name: str, size: int) -> np.ndarray:
    given = _needed(data_dir, f"{folder}/{name}")
    path = next((path for path in (given / name, given / folder / name) if path.exists()), None)
    if path is None:
        raise ValueError(
            f"data.data_dir must hold {name} or {folder}/{name} of the binary version (not the Python one), "
            f"neither is in {given}; {_remedy(dataset)}"
        )
    raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % size != 0:
        raise ValueError(
            f"data.data_dir: {path} must hold whole records of {size} bytes, it has {len(raw)} bytes; {_remedy(dataset)}"
        )
    return raw.reshape(-1, size)


def _load_har(data_dir: Path | None) -> Dataset:
    features, subjects, activities = zip(*(_read_har(data_dir, name) for name in ("train.csv", "test.csv")), strict=True)
    names = sorted(set(activities[0]))
    if names != sorted(set(activities[1])):
        raise ValueError(
            f"data.data_dir: train.csv and test.csv in {data_dir} must have the same activities, they have {', '.join(names)} "
            f"and {', '.join(sorted(set(activities[1])))}; {_remedy('har')}"
        )
    inputs = torch.from_numpy(np.concatenate(features))
    labels = torch.from_numpy(np.searchsorted(names, np.concatenate(activities)))
    subject_n = torch.from_numpy(np.unique(np.concatenate(subjects), return_inverse=True)[1])
    is_train = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for subject in range(int(subject_n.max()) + 1):
        of_subject = (subject_n == subject).nonzero().flatten()
        order = torch.randperm(len(of_subject), generator=generator)
        is_train[of_subject[order[: round(0.75 * len(of_subject))]]] = True
    train, test = is_train, ~is_train
    return Dataset("har", inputs[train], labels[train], inputs[test], labels[test], len(names), subject_n[train])


def _read_har(data_dir: Path | None, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features ``(n, 561)`` float32, subjects ``(n,)`` int64 and activities ``(n,)`` str of one file."""
    folder = _needed(data_dir, name)
    path = folder / name
    if not path.exists():
        raise ValueError(f"data.data_dir must hold {name}, it is not in {folder}; {_remedy('har')}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
            wanted = [i for i, column in enumerate(columns) if column not in ("subject", "Activity")]
            if len(wanted) != _HAR_FEATURES or len(columns) != _HAR_FEATURES + 2:
                raise ValueError(
                    f"it must have {_HAR_FEATURES} feature columns, 'subject' and 'Activity', it has {len(wanted)} columns "
                    f"of other names out of {len(columns)}"
                )
            subject, activity = columns.index("subject"), columns.index("Activity")
            lines = file.readlines()
            if not lines:
                raise ValueError("it has no rows")
            rows = np.loadtxt(
                lines,
                dtype=[("features", np.float32, (_HAR_FEATURES,)), ("subject", np.int64), ("activity", "U64")],
                delimiter=",",
                quotechar='"',
                comments=None,
                usecols=[*wanted, subject, activity],
                ndmin=1,
            )
        if not np.isfinite(rows["features"]).all():
            raise ValueError("a feature is not finite")
    except ValueError as error:  # UnicodeDecodeError, and what NumPy says of rows that are cut short, are among these
        raise ValueError(f"data.data_dir: {path} is no CSV file of the HAR data: {error}; {_remedy('har')}") from error
    return rows["features"], rows["subject"], rows["activity"]


def _needed(data_dir: Path | None, file: str) -> Path:
    if data_dir is None:
        raise ValueError(f"data.data_dir must name the folder that holds {file}; pass --data-dir")
    return data_dir


def _remedy(dataset: str) -> str:
    if dataset == "har":
        return "train.csv and test.csv are on Kaggle, uciml/human-activity-recognition-with-smartphones"
    return f"to download it: skymask-gpu data {dataset} DIR"


def _check_labels(dataset: str, labels: np.ndarray, num_classes: int, file: str) -> None:
    if len(labels) == 0 or labels.max() >= num_classes:
        found = f"the label {labels.max()}" if len(labels) else "none"
        raise ValueError(
            f"data.data_dir: {file} must hold labels from 0 to {num_classes - 1}, it has {found}; {_remedy(dataset)}"
        )


def _standardised(images_NCHW: np.ndarray, pixels: _Pixels) -> Tensor:
    """Bytes as float32 with mean 0 and standard deviation 1 per channel over the training part."""
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in pixels)
    return torch.from_numpy(images_NCHW.astype(np.float32)).div_(255).sub_(mean_C11).div_(std_C11)


DATASETS = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
    "cifar100": _load_cifar100,
    "har": _load_har,
}
