"""``skymask-gpu data``: fetch the files of a data set, check them, and put them into place."""

import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO

from skymask_gpu.federation.datasets import DATASETS, DatasetSpec, Source
from skymask_gpu.io.files import write_whole

__all__ = ["download"]


def download(name: str, folder: Path) -> list[Path]:
    """Fetch the standard files of a data set into ``folder``.

    ``load_dataset(name, folder)`` reads them there. Every file is checked against its known md5
    before the first one is put into place, where it replaces what was there.

    Args:
        name: a key of :data:`DATASETS` whose data set has a source.
        folder: made if it does not exist.

    Returns:
        The files that are now in place.

    Raises:
        ValueError: the name is unknown, the data set cannot be downloaded, no torchvision works
            here, there is no network, or a file is not the known one; ``folder`` is then as it was.
    """
    spec = DATASETS[name]
    if spec.source is None and spec.files:
        raise ValueError(f"data.dataset {name!r} cannot be downloaded here: {spec.origin}; give their folder as --data-dir")
    if spec.source is None:
        raise ValueError(f"data.dataset {name!r} needs no download: {spec.origin or 'it has no files'}")
    download_url = _torchvision(spec, spec.source, folder)
    with tempfile.TemporaryDirectory() as scratch:
        fetched = [_fetch(download_url, spec.source, file, Path(scratch), folder) for file in spec.source.md5]
        return _unpack(fetched[0], spec.files, folder) if spec.source.is_archive else _copy(fetched, folder)


def _torchvision(spec: DatasetSpec, source: Source, folder: Path) -> Callable[..., None]:
    """torchvision's ``download_url``, or an error that says how to do without it."""
    try:
        from torchvision.datasets.utils import download_url
    # torchvision raises a RuntimeError if it was built for another version of torch
    except (ImportError, RuntimeError) as error:
        what = f"what is in it ({', '.join(spec.files)})" if source.is_archive else "them as they are"
        raise ValueError(
            f"downloading needs a torchvision that fits torch, import torchvision says: {error}. Nothing else here needs one: "
            f"fetch {', '.join(source.md5)} from {source.url} with a browser or curl and put {what} into {folder}. Or: "
            "pip install 'skymask-gpu[data]'; beside a CPU build of torch: pip install torchvision --index-url "
            "https://download.pytorch.org/whl/cpu"
        ) from error
    return download_url


def _fetch(download_url: Callable[..., None], source: Source, file: str, scratch: Path, folder: Path) -> Path:
    """Download one file into ``scratch``, and check it."""
    try:
        download_url(source.url + file, str(scratch), file)
    except (OSError, HTTPException, RuntimeError) as error:
        raise ValueError(
            f"{source.url}{file} cannot be downloaded: {error}; try again, or put the files into {folder} yourself"
        ) from error
    with (scratch / file).open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != source.md5[file]:
        raise ValueError(f"{source.url}{file} must have md5 {source.md5[file]}, what came has {found}; try again later")
    return scratch / file


def _copy(fetched: list[Path], folder: Path) -> list[Path]:
    for path in fetched:
        with path.open("rb") as content:
            _place(content, folder / path.name)
    return [folder / path.name for path in fetched]


def _unpack(archive: Path, members: tuple[str, ...], folder: Path) -> list[Path]:
    with tarfile.open(archive) as tar:
        for member in members:
            content = tar.extractfile(member)
            assert content is not None, f"{member} is a file in the archive of this md5"
            _place(content, folder / member)
    return [folder / member for member in members]


def _place(content: IO[bytes], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file)

    write_whole(path, write)
