"""The files that a user brings to ``skymask-gpu aggregate``; nothing is ever unpickled.

They are a model's class, state dicts, updates and root data.
"""

import importlib.util
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.defence.forms import tensor_fault
from skymask_gpu.engine import FlatModel
from skymask_gpu.io.files import check_regular, check_tensors, read_tensors

__all__ = ["UserUpdates", "build_module", "flat_model", "import_file", "load_module", "load_root", "load_updates"]


@dataclass(frozen=True)
class UserUpdates:
    """Updates in a form that :meth:`skymask_gpu.SkyMask.aggregate` takes, and the clients' names.

    Attributes:
        updates: one row or state dict per client.
        names: what to call each client.
        unreadable: file -> why it cannot be read.
    """

    updates: Tensor | Sequence[Mapping[str, Tensor]]
    names: list[str]
    unreadable: dict[str, str]


def import_file(option: str, path: Path, name: str) -> ModuleType:
    """Import a user's Python file under ``name``. This **executes** the file.

    Args:
        option: what errors call the setting that names the file.
        path: the file.
        name: the module's name in ``sys.modules``.

    Raises:
        ValueError: the file is no Python file, or it cannot be imported; the error names its line.
    """
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{option}: {path} is no Python file")
    python_module = importlib.util.module_from_spec(module_spec)
    # The same state as under `python file.py`: dataclasses look up their module in sys.modules, and
    # the file can import its neighbours.
    sys.modules[module_spec.name] = python_module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(python_module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option}: {path} cannot be imported: {_what_and_where(error, path)}") from error
    finally:
        sys.path.pop(0)
    return python_module


def build_module(option: str, spec: str) -> nn.Module:
    """Make an instance of the user's class, without arguments.

    This executes the user's file.

    Args:
        option: what errors call the setting, such as ``--model``.
        spec: ``"file.py:Class"``.

    Raises:
        ValueError: the file or the class is missing, it needs arguments, or it is no ``nn.Module``.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"{option} must be file.py:Class with an existing file, got {spec!r}")
    python_module = import_file(option, path, f"skymask_user_{path.stem}")
    if not hasattr(python_module, name):
        raise ValueError(f"{option}: {path} has no {name!r}")
    try:
        module = getattr(python_module, name)()
    except (Exception, SystemExit) as error:
        # If no line of the file is in the traceback, the call itself failed, not something in the
        # class.
        if isinstance(error, TypeError) and _line_in(path, error) is None:
            raise ValueError(f"{option}: {name}() must be callable without arguments: {error}") from error
        raise ValueError(f"{option}: {name}() cannot be made: {_what_and_where(error, path)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{option}: {name}() must return a torch.nn.Module, got {type(module).__name__}")
    return module


def _what_and_where(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the user's file that it comes from."""
    line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
    where = "" if line is None else f" ({path}, line {line})"
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{where}"


def _line_in(path: Path, error: BaseException) -> int | None:
    """The innermost line of the file in the error's traceback; None if there is none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def flat_model(spec: str, module: nn.Module, root_inputs: Tensor, root_labels: Tensor) -> FlatModel:
    """The :class:`FlatModel` of the user's module.

    It evaluates the module once, so that a fault in the module shows before any work.

    Raises:
        ValueError: the module or the loss raises an error; the message names the line of the user's
            file.
    """
    try:
        return FlatModel(module, root_inputs, root_labels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause, path = error.__cause__ or error, Path(spec.rpartition(":")[0])
        if isinstance(error, ValueError) and _line_in(path, cause) is None:
            raise
        what = _what_and_where(cause, path)
        raise ValueError(f"--model: {spec} cannot be evaluated on the root data (--root): {what}") from error


def load_module(spec: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Make the user's module with :func:`build_module`, and load ``state`` into it.

    Raises:
        ValueError: ``build_module`` raises it, or the state dict does not fit the module.
    """
    module = build_module("--model", spec)
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"--global does not fit {type(module).__name__}: {error}") from error
    return module


def load_root(path: Path) -> tuple[Tensor, Tensor]:
    """The arrays ``inputs`` and ``labels`` of an npz file, as tensors.

    Raises:
        ValueError: there is no such file, or it is damaged, lacks one of the two arrays, or holds
            Python objects or single numbers.
    """
    try:
        check_regular(path)
    except ValueError as error:
        raise ValueError(f"--root: {error}") from error
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file}
    except MemoryError as error:
        raise ValueError(f"--root: {path} says that it holds more than fits in memory: {error}") from error
    except (OSError, EOFError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        what = str(error) or type(error).__name__
        raise ValueError(f"--root: {path} is no npz file of plain arrays: {what}") from error
    if not {"inputs", "labels"} <= arrays.keys():
        raise ValueError(f"--root: {path} must hold arrays 'inputs' and 'labels', it has {', '.join(arrays) or 'none'}")
    inputs, labels = arrays["inputs"], arrays["labels"]
    if inputs.dim() == 0 or labels.dim() == 0:
        shapes = f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"--root: 'inputs' and 'labels' of {path} must have one entry for each sample, got shapes {shapes}")
    return inputs.float() if inputs.is_floating_point() else inputs, labels if labels.is_floating_point() else labels.long()


def load_updates(path: Path, model: FlatModel, global_state: Mapping[str, Tensor], *, local_models: bool) -> UserUpdates:
    """Load the clients' updates.

    Args:
        path: a folder with one safetensors state dict per client, or a file with one stacked
            ``(N, P)`` tensor.
        model: it tells names and shapes of the parameters.
        global_state: the global model's state dict.
        local_models: whether the files hold the clients' models after training; the global model is
            then subtracted.

    Raises:
        ValueError: there is no file that can be read, or a stacked file does not hold exactly one
            2-D tensor.
    """
    if path.is_dir():
        return _from_folder(path, model, global_state, local_models)
    tensors, _ = _read("--updates", path)
    if len(tensors) != 1 or next(iter(tensors.values())).dim() != 2:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"--updates: {path} must hold one (N, P) tensor, it holds {shapes or 'none'}; or give a folder")
    (stacked_NP,) = tensors.values()
    # Any other dtype is refused later, with a remedy; PyTorch cannot convert each of them.
    subtractable = stacked_NP.dtype in (torch.float32, torch.bfloat16) and stacked_NP.shape[1] == model.num_params
    if local_models and subtractable:
        stacked_NP = (stacked_NP.float() - model.initial_params).to(stacked_NP.dtype)
    return UserUpdates(stacked_NP, [str(row) for row in range(len(stacked_NP))], {})


class _StateDictFiles(Sequence[Mapping[str, Tensor]]):
    """The clients' state dicts, each read from its file when it is asked for.

    They need not fit in memory together.
    """

    def __init__(self, files: list[Path], model: FlatModel, global_state: Mapping[str, Tensor], local_models: bool) -> None:
        self._files, self._model = files, model
        self._global_state, self._local_models = global_state, local_models

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, client: Any) -> Any:
        state, _ = _read("--updates", self._files[client])
        if not self._local_models:
            return state
        params = {name: self._global_state[name] for name in self._model.shapes}
        # What cannot be used stays as it is, and the defence rejects its client by name. Converting
        # it here would end the round: PyTorch cannot convert every dtype that a file may have.
        return {
            name: value.double() - params[name].double()
            if name in params and tensor_fault(name, value, params[name], True) is None
            else value
            for name, value in state.items()
        }


def _from_folder(folder: Path, model: FlatModel, global_state: Mapping[str, Tensor], local_models: bool) -> UserUpdates:
    found = sorted(folder.glob("*.safetensors"))
    # An upload that was broken off may leave a hidden file behind. It is no client of its own: it
    # would be a copy of the one whose upload succeeded, and copies are suspicious.
    hidden = [file.name for file in found if file.name.startswith(".")]
    files = [file for file in found if not file.name.startswith(".")]
    if hidden:
        names = ", ".join(hidden[:3]) + (", ..." if len(hidden) > 3 else "")
        warnings.warn(f"--updates: {len(hidden)} hidden files in {folder} were passed over: {names}", stacklevel=4)
    if not files:
        raise ValueError(f"--updates: no *.safetensors file in {folder} that is not hidden")
    readable, unreadable = [], {}
    for file in files:
        try:
            check_tensors(file)
            readable.append(file)
        except ValueError as error:
            unreadable[file.stem] = str(error)
    if not readable:
        raise ValueError(f"--updates: none of {len(files)} files in {folder} can be read; {next(iter(unreadable.values()))}")
    states = _StateDictFiles(readable, model, global_state, local_models)
    return UserUpdates(states, [file.stem for file in readable], unreadable)


def _read(option: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
