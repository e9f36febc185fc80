"""MNIST and Fashion-MNIST: four IDX files of the same names, plain or gzipped."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.federation.datasets.spec import Dataset, Source, check_labels, dataset, standardised

__all__ = ["load_fashion_mnist", "load_mnist"]

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataset(
    "mnist",
    about="handwritten digits, 28 x 28; 60,000 + 10,000",
    files=_FILES,
    # the checksums of torchvision.datasets.MNIST.resources
    source=Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
)
def load_mnist(folder: Path) -> Dataset:
    """MNIST (LeCun et al., Proc. IEEE 1998), standardised by the constants in common use."""
    return _load("mnist", folder, mean=0.1307, std=0.3081)


@dataset(
    "fashion-mnist",
    about="photos of clothes, 28 x 28; 60,000 + 10,000",
    files=_FILES,
    # the checksums of torchvision.datasets.FashionMNIST.resources
    source=Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
)
def load_fashion_mnist(folder: Path) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), standardised by its usual constants."""
    return _load("fashion-mnist", folder, mean=0.2860, std=0.3530)


def _load(name: str, folder: Path, *, mean: float, std: float) -> Dataset:
    def part(prefix: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(
                f"data.data_dir: {prefix}-images-idx3-ubyte holds {len(images)} images and {prefix}-labels-idx1-ubyte "
                f"{len(labels)} labels in {folder}, there must be one label per image"
            )
        check_labels(labels, 10, f"{prefix}-labels-idx1-ubyte")
        return standardised(images[:, None], (mean,), (std,)), torch.from_numpy(labels.astype(np.int64))

    return Dataset(name, *part("train"), *part("t10k"), 10)


def _read_idx(folder: Path, name: str, num_dims: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, the format of MNIST's distribution (Y. LeCun)."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        raw = plain.read_bytes()
    elif zipped.exists():
        try:
            raw = gzip.decompress(zipped.read_bytes())
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"data.data_dir: {zipped} is no whole gzip file: {error}") from error
    else:
        raise ValueError(f"data.data_dir must hold {name} or {name}.gz, neither is in {folder}")
    header = struct.calcsize(f">HBB{num_dims}I")
    # A file that is shorter than the header is filled up with bytes that no valid header has.
    zeros, kind, dims, *shape = struct.unpack_from(f">HBB{num_dims}I", raw.ljust(header, b"\xff"))
    # Python's integers: a damaged header may announce more bytes than 64 bits can count.
    if zeros != 0 or kind != 0x08 or dims != num_dims or len(raw) - header != np.prod(shape, dtype=object):
        raise ValueError(f"data.data_dir: {name} is no whole IDX file of unsigned bytes in {num_dims} dimensions ({folder})")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
