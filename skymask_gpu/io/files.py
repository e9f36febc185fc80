"""Files that are whole or not there, and the lock on a folder.

A file is written under a temporary name and renamed, or it is appended to line by line.
"""

import errno
import json
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Windows has no fcntl.
try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "LOCK",
    "InUseError",
    "append_line",
    "check_regular",
    "check_tensors",
    "check_writable",
    "locked",
    "read_lines",
    "read_metadata",
    "read_tensors",
    "write_tensors",
    "write_text",
    "write_whole",
]

LOCK = ".lock"


class InUseError(ValueError):
    """Another process, or this one, holds the lock on a folder."""


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock ``folder`` against other processes that lock it, too.

    The folder is made if it is missing. The system gives the lock back when this process ends, in
    whatever way. The file ``.lock`` stays: if it were deleted, a process that has just opened it
    and one that makes it anew could both think that the folder is theirs. If the system or the file
    system has no such locks, a warning says so and nothing is locked.

    Args:
        folder: the folder.
        shared: several processes may hold the lock at the same time, as long as all of them share
            it.

    Raises:
        InUseError: another process, or this one, holds the lock already; a ValueError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is None:
            _warn_of_no_lock(folder, "this system has no fcntl.flock")
        else:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
                raise InUseError(
                    f"{folder} is in use by another run or sweep (process {holder}); wait until it ends, or name another folder"
                ) from None
            except OSError as error:
                _warn_of_no_lock(folder, str(error))
            else:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _warn_of_no_lock(folder: Path, why: str) -> None:
    warnings.warn(f"{folder} cannot be locked ({why}): do not start another run in it before this one ends", stacklevel=4)


def check_writable(option: str, path: Path) -> None:
    """Check before the work that :func:`write_whole` can write ``path`` after it.

    A file beside it is made and removed again.

    Args:
        option: what an error calls the setting, such as ``--out``.
        path: the file that will be written.

    Raises:
        ValueError: no file can be written there.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} must name a file, {path} is {_kind(path)}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {path} is write-protected; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = _beside(path)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        under_a_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "a folder of its path is a file" if under_a_file else error.strerror or error
        raise ValueError(f"{option}: {path} cannot be written: {why}; name another file") from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name beside ``path``, then rename it to ``path``.

    Readers therefore see either the old file or the new one.

    Args:
        path: the file.
        write: ``write(temporary)`` writes the contents to the path that it is given.

    Raises:
        OSError: the file cannot be written (the disk is full, or a folder is read-only); the error
            names ``path``.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        # The error of a write names the temporary file or none, and safetensors has an error of its
        # own for a full disk. The user gets one OSError that names ``path``.
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        # An error here means that its folder is a file or cannot be looked at. Then the temporary
        # file was never made.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file; see :func:`write_whole`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; see :func:`write_whole`."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ValueError: the file is missing or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; it raises what :func:`read_tensors` raises."""
    with _opened(path) as file:
        return file.metadata() or {}


def check_tensors(path: Path) -> None:
    """Check that :func:`read_tensors` can read the file; raise its errors.

    Values are not read: each tensor is mapped into memory, which fails for a dtype that PyTorch has
    not, such as ``F6_E2M3``. The header alone would not tell that.
    """
    read_tensors(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file. Opening a FIFO, for instance, would wait for ever.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    if not path.exists():
        raise ValueError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file, it is {_kind(path)}")


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write, and wait until it is on disk.

    Raises:
        OSError: the line, or (on a full disk) a part of it, cannot be written. The file is then as
            it was before.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path, key: str = "round") -> list[dict[str, Any]]:
    """The records in a file of JSON lines, one per round; an empty list if there is no file.

    If the power failed while the last line was written, that line is incomplete and left out.

    Args:
        path: the file.
        key: what numbers the records.

    Raises:
        ValueError: a line is no JSON object with a whole number ``key`` of at least 0; the message
            names the line.
    """
    if not path.exists():
        return []
    check_regular(path)
    *lines, last = path.read_bytes().split(b"\n")
    records = [_record(path, number, line, key) for number, line in enumerate(lines, 1) if line.strip()]
    # Each complete line ends with a newline, but an editor may have dropped the last one.
    if last.strip() and _is_json(last):
        records.append(_record(path, len(lines) + 1, last, key))
    return records


def _record(path: Path, number: int, line: bytes, key: str) -> dict[str, Any]:
    remedy = "mend the line, or play the run anew with --overwrite"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}; {remedy}") from error
    wanted = f'a JSON object with a whole number "{key}" of at least 0'
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} must be {wanted}, got {line[:60]!r}; {remedy}")
    if type(record.get(key)) is not int or record[key] < 0:
        got = f'"{key}": {json.dumps(record[key])}' if key in record else "none"
        raise ValueError(f"{path}, line {number} must be {wanted}, got {got}; {remedy}")
    return record


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
