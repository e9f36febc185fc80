"""Plugins: a user's own files that register attacks, rules, transforms, models or data sets."""

from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

from skymask_gpu.engine.registry import forget
from skymask_gpu.io.user_files import import_file

__all__ = ["load_plugins"]

# The content of each imported file, by its resolved path.
_LOADED: dict[Path, bytes] = {}


def load_plugins(files: Iterable[str]) -> None:
    """Import each file, so that what it registers can be chosen by name.

    This **executes** the files. A file that was imported before is imported again only if its
    content has changed; what it registered is forgotten first.

    Raises:
        ValueError: a file is missing, cannot be imported, or registers a name that is taken; the
            error names the file and the reason. Nothing that it registered is left.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise ValueError(f"plugins: no file {path}; paths are relative to the TOML file")
        content = path.read_bytes()
        if _LOADED.get(path) == content:
            continue
        _LOADED.pop(path, None)
        forget(str(path))
        try:
            # The module's name holds the path, because two plugins may have the same file name.
            import_file("plugins", path, f"skymask_plugin_{path.stem}_{crc32(str(path).encode()):08x}")
        except ValueError:
            forget(str(path))
            raise
        _LOADED[path] = content
