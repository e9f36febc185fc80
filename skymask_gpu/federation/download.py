"""Data sets fetched with torchvision, checked, and put where :func:`skymask_gpu.federation.data.load_dataset` reads them."""

import hashlib
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO

from skymask_gpu.federation.data import DATASETS
from skymask_gpu.io.files import write_whole

__all__ = ["download"]


@dataclass(frozen=True)
class _Source:
    """Where a data set's files are: ``url`` + name, with the md5 of each; of an archive, the members we read."""

    url: str
    md5: dict[str, str]
    members: tuple[str, ...] = ()


# md5 of MNIST and Fashion-MNIST as in torchvision.datasets.MNIST.resources and FashionMNIST.resources,
# of CIFAR's binary version as on https://www.cs.toronto.edu/~kriz/cifar.html
_SOURCES = {
    "mnist": _Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        (
            *(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
            "cifar-10-batches-bin/test_batch.bin",
        ),
    ),
    "cifar100": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
    ),
}


def download(name: str, folder: Path) -> list[Path]:
    """Fetch a data set's standard files into ``folder``, in the layout that ``load_dataset(name, folder)`` reads.

    Every file is checked against its known md5 before the first one is put in place, and then replaces what was there.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``cifar10`` or ``cifar100``.
        folder: made if it is not there.

    Returns:
        The files now in place.

    Raises:
        ValueError: unknown name or a data set that cannot be fetched, no working torchvision, no network, or a file that is not
            the known one; ``folder`` is then as it was.
    """
    if name == "digits":
        raise ValueError("data.dataset 'digits' comes with scikit-learn, there is nothing to download")
    if name == "har":
        raise ValueError(
            "data.dataset 'har' cannot be downloaded here: get train.csv and test.csv from Kaggle, "
            "uciml/human-activity-recognition-with-smartphones, and give their folder as --data-dir"
        )
    if name not in _SOURCES:
        raise ValueError(f"data.dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    try:
        from torchvision.datasets.utils import download_url
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        files = ", ".join(_SOURCES[name].md5)
        raise ValueError(
            f"downloading needs a torchvision that fits torch, import torchvision says: {error}. Nothing else here needs one: "
            f"fetch {files} from {_SOURCES[name].url} with a browser or curl and put {_place_of(name)} into {folder}. Or: "
            "pip install 'skymask-gpu[data]'; beside a CPU build of torch: pip install torchvision --index-url "
            "https://download.pytorch.org/whl/cpu"
        ) from error

    source = _SOURCES[name]
    with tempfile.TemporaryDirectory() as scratch:
        for file, md5 in source.md5.items():
            try:
                download_url(source.url + file, scratch, file)
            except (OSError, HTTPException, RuntimeError) as error:
                raise ValueError(
                    f"{source.url}{file} cannot be downloaded: {error}; try again, or put the files into {folder} yourself"
                ) from error
            _check_md5(Path(scratch, file), md5, source.url)
        if not source.members:
            for file in source.md5:
                with Path(scratch, file).open("rb") as whole:
                    _place(whole, folder / file)
            return [folder / file for file in source.md5]
        (archive,) = source.md5
        with tarfile.open(Path(scratch, archive)) as tar:
            for member in source.members:
                content = tar.extractfile(member)
                assert content is not None, f"{member} is a file in the archive of this md5"
                _place(content, folder / member)
        return [folder / member for member in source.members]


def _place_of(name: str) -> str:
    """What a user who fetches the files puts into place."""
    return f"what is in it ({', '.join(_SOURCES[name].members)})" if _SOURCES[name].members else "them as they are"


def _check_md5(path: Path, md5: str, url: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(f"{url}{path.name} must have md5 {md5}, what came has {found}; try again later")


def _place(content: IO[bytes], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file)

    write_whole(path, write)
