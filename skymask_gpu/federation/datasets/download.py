"""``skymask-gpu data``: fetch the files of a data set, check them, and put them into place.

`pooch <https://www.fatiando.org/pooch>`_ fetches each file, tries again after a fault, and compares
its SHA-256.
"""

import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO

import pooch

from skymask_gpu.federation.datasets import DATASETS, Source
from skymask_gpu.io.files import write_whole

__all__ = ["download"]

# How often a file is asked for again; pooch waits one second longer before each further attempt.
_RETRIES = 3


def download(name: str, folder: Path) -> list[Path]:
    """Fetch the standard files of a data set into ``folder``.

    ``load_dataset(name, folder)`` reads them there. Every file is checked against its known SHA-256
    before the first one is put into place, where it replaces what was there.

    Args:
        name: a key of :data:`DATASETS` whose data set has a source.
        folder: made if it does not exist.

    Returns:
        The files that are now in place.

    Raises:
        ValueError: the name is unknown, the data set cannot be downloaded, there is no network, or
            a file is not the known one; ``folder`` is then as it was.
    """
    spec = DATASETS[name]
    if spec.source is None and spec.files:
        raise ValueError(f"data.dataset {name!r} cannot be downloaded here: {spec.origin}; give their folder as --data-dir")
    if spec.source is None:
        raise ValueError(f"data.dataset {name!r} needs no download: {spec.origin or 'it has no files'}")
    with tempfile.TemporaryDirectory() as scratch:
        fetched = _fetch(spec.source, Path(scratch), folder)
        return _unpack(fetched[0], spec.files, folder) if spec.source.is_archive else _copy(fetched, folder)


def _fetch(source: Source, scratch: Path, folder: Path) -> list[Path]:
    """Download all files into ``scratch``, and check them."""
    server = pooch.create(path=scratch, base_url=source.url, registry=source.sha256, retry_if_failed=_RETRIES)
    fetched = []
    # Pooch would print a line per file that names the scratch folder.
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        for file in source.sha256:
            fetched.append(Path(server.fetch(file)))
    # OSError: what requests raises. ValueError: another SHA-256 than the known one.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.url}{file} cannot be downloaded: {error}; try again, or put the files into {folder} yourself"
        ) from error
    finally:
        logger.setLevel(level)
    return fetched


def _copy(fetched: list[Path], folder: Path) -> list[Path]:
    for path in fetched:
        with path.open("rb") as content:
            _place(content, folder / path.name)
    return [folder / path.name for path in fetched]


def _unpack(archive: Path, members: tuple[str, ...], folder: Path) -> list[Path]:
    with tarfile.open(archive) as tar:
        for member in members:
            content = tar.extractfile(member)
            assert content is not None, f"{member} is a file in the archive of this SHA-256"
            _place(content, folder / member)
    return [folder / member for member in members]


def _place(content: IO[bytes], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file)

    write_whole(path, write)
