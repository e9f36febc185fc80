"""What a data set is, what is known about it before it is loaded, and the registry of all of them.

The command ``skymask-gpu data``, its help, every remedy in an error and the table in
``docs/federation.md`` follow from the :class:`DatasetSpec` of a data set.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.engine.registry import Registry

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "Source", "check_labels", "dataset", "load_dataset", "standardised"]


@dataclass(frozen=True)
class Dataset:
    """A data set for classification, split into a training part and a test part.

    Attributes:
        name: its key in :data:`DATASETS`.
        train_inputs: ``(n, channels, height, width)`` float32 images, standardised per channel, or
            ``(n, features)`` float32, or sequences of whole numbers ``(n, length)`` int32.
        train_labels: ``(n,)`` int64, from 0 to ``num_classes - 1``.
        test_inputs: like ``train_inputs``.
        test_labels: like ``train_labels``.
        num_classes: the number of classes.
        train_subjects: ``(n,)`` int64 from 0 to S - 1, the person that each training sample comes
            from; None where the samples do not come from persons.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    train_subjects: Tensor | None = None

    def to(self, device: torch.device) -> "Dataset":
        """The same data set with all its tensors on ``device``."""
        tensors: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


Loader = Callable[[Path], Dataset]


@dataclass(frozen=True)
class Source:
    """Where the files of a data set can be downloaded.

    Attributes:
        url: the address of the folder that holds the files; it ends with a slash.
        sha256: the checksum of each file, by the file's name. A single ``.tar.gz`` is an archive:
            the files of the data set are taken out of it.
    """

    url: str
    sha256: dict[str, str]

    @property
    def is_archive(self) -> bool:
        """Whether the one file to download holds the files of the data set."""
        return len(self.sha256) == 1 and next(iter(self.sha256)).endswith(".tar.gz")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known about a data set before it is loaded.

    Attributes:
        load: reads the files in the given folder.
        about: what the samples are, in one line; the table of the documentation shows it.
        files: the files that the folder must hold, as paths within it; empty if the data set needs
            no folder.
        source: where ``skymask-gpu data`` downloads the files; None if it cannot.
        origin: where the data come from if they cannot be downloaded, as a sentence without its
            full stop.
    """

    load: Loader
    about: str
    files: tuple[str, ...] = ()
    source: Source | None = None
    origin: str = ""

    def remedy(self, name: str) -> str:
        """What to do if the files are missing; errors end with it."""
        return self.origin if self.source is None else f"to download it: skymask-gpu data {name} DIR"


DATASETS: Registry[DatasetSpec] = Registry("data.dataset")


def dataset(
    name: str, *, about: str, files: tuple[str, ...] = (), source: Source | None = None, origin: str = ""
) -> Callable[[Loader], Loader]:
    """A decorator that registers a loader as the data set ``name``, and returns it unchanged.

    Your own data set is one such function in a module that you import before a run is read. After
    that, ``data.dataset = "name"`` chooses it. The loader takes the folder of ``data.data_dir`` and
    returns a :class:`Dataset`. If a file is wrong, it raises a ValueError that says which file it
    is and what was wanted; :func:`load_dataset` adds where to get the files.

    Args:
        name: what ``data.dataset`` calls it.
        about: what the samples are, in one line.
        files: the files that the folder must hold; empty if the loader needs no folder.
        source: where they can be downloaded, if they can.
        origin: where they come from otherwise.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @dataset("two-moons", about="two classes of points in the plane")
        ... def two_moons(folder):
        ...     angles = torch.linspace(0, torch.pi, 50)
        ...     upper = torch.stack([angles.cos(), angles.sin()], dim=1)
        ...     inputs = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])
        ...     labels = torch.arange(100) // 50
        ...     return Dataset("two-moons", inputs[::2], labels[::2], inputs[1::2], labels[1::2], 2)
        >>> load_dataset("two-moons").train_inputs.shape
        torch.Size([50, 2])
        >>> DATASETS.remove("two-moons")
    """

    def enter(load: Loader) -> Loader:
        spec = DatasetSpec(load=load, about=about, files=files, source=source, origin=origin)
        DATASETS.add(name, spec, inspect.getfile(load))
        return load

    return enter


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set from its standard files.

    Args:
        name: a key of :data:`DATASETS`; ``docs/federation.md`` has a table of them.
        data_dir: the folder with the files; data sets without files need none.

    Raises:
        ValueError: the name is unknown, ``data_dir`` is missing or lacks a file, or a file is not
            what it should be. The message ends with where to get the files.

    Example:
        >>> load_dataset("digits").train_inputs.shape
        torch.Size([1437, 1, 8, 8])
    """
    spec = DATASETS[name]
    if spec.files and data_dir is None:
        raise ValueError(f"data.data_dir must name the folder that holds {', '.join(spec.files)}; pass --data-dir")
    try:
        return spec.load(data_dir or Path())
    except ValueError as error:
        if not spec.files or not spec.remedy(name):
            raise
        raise ValueError(f"{error}; {spec.remedy(name)}") from error


def check_labels(labels: np.ndarray, num_classes: int, file: str) -> None:
    """Refuse labels beyond the last class, and files without any.

    Raises:
        ValueError: it names ``file`` and the largest label.
    """
    if len(labels) == 0 or labels.max() >= num_classes:
        found = f"the label {labels.max()}" if len(labels) else "none"
        raise ValueError(f"data.data_dir: {file} must hold labels from 0 to {num_classes - 1}, it has {found}")


def standardised(images_NCHW: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images of bytes as float32, divided by 255, then standardised per channel.

    Args:
        images_NCHW: ``(n, channels, height, width)`` uint8.
        mean: mean of the training pixels divided by 255, per channel.
        std: their standard deviation, per channel.
    """
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return torch.from_numpy(images_NCHW.astype(np.float32)).div_(255).sub_(mean_C11).div_(std_C11)
