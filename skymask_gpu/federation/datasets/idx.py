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
    # The hashes are those that other loaders check, such as TensorFlow Datasets.
    source=Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
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
    # The hashes are those that other loaders check, such as TensorFlow Datasets.
    source=Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
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
