"""A copy of a module that shares all values that nobody changes, however large they are.

The copy has layers of its own, which hold the same tensors. It costs milliseconds and hardly any
memory, so that every round and every thread can have one.
"""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WrittenToError", "deep_copy", "module_copy", "nothing_written"]


class WrittenToError(Exception):
    """The module writes to one of its own tensors when it is called; ``name`` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def module_copy(
    module: nn.Module, *, device: torch.device | None, dtype: torch.dtype, own: Collection[str] | None
) -> nn.Module:
    """A copy of ``module`` with its tensors on ``device`` (None: where they are) and in ``dtype``.

    Trainable parameters hold no values, because the caller passes them in each call. Everything
    else is shared with ``module`` where device and dtype are the wanted ones already.

    Args:
        module: it is not modified.
        device: where the copy works.
        dtype: of all floating tensors; others stay as they are.
        own: the names of frozen parameters and buffers that are copied instead of shared. None
            means all buffers.

    Raises:
        ValueError: see :func:`deep_copy`.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 1))
        >>> twin = module_copy(module, device=None, dtype=torch.float32, own=())
        >>> twin[0].weight.data_ptr() == module[0].weight.data_ptr(), twin[1].weight.device
        (True, device(type='meta'))
    """
    memo: dict[int, Any] = {}
    for name, tensor, is_parameter in _tensors(module):
        if id(tensor) in memo:
            continue
        if is_parameter and tensor.requires_grad:
            memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"))
            continue
        copied = (not is_parameter) if own is None else name in own
        # Autograd cannot keep a tensor that was made under torch.inference_mode().
        copied = copied or tensor.is_inference()
        moved = tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        if copied and (_place(moved) == _place(tensor) or not _has_memory(moved)):
            moved = moved.clone()
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return deep_copy(module, memo)


def deep_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy(module, memo)``, also of a module that keeps results of autograd.

    Such results cannot be copied, only their values can. ``nn.utils.weight_norm`` keeps one, and
    makes it anew from the copy's own parameters before each forward pass.

    Raises:
        ValueError: a result is in a place where it is not found, such as an object of the user's.
    """
    memo = dict(memo or {})
    for tensor in _results(module):
        memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(module, dict(memo))
    except RuntimeError as error:
        name = _uncopied(module, memo)
        if name is None:
            raise
        raise ValueError(
            f"module: its attribute {name} must be something that copy.deepcopy can copy, got {error}; keep no result of "
            "autograd there (detach it), or use torch.nn.utils.parametrizations, such as its weight_norm"
        ) from error


def _results(module: nn.Module) -> Iterator[Tensor]:
    """The tensors among the attributes of the module and its parts that autograd has made."""

    def inside(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, list | tuple):
            for one in value:
                yield from inside(one)
        elif isinstance(value, dict):
            yield from inside(list(value.values()))

    for part in module.modules():
        yield from inside(vars(part))


def _uncopied(module: nn.Module, memo: dict[int, Any]) -> str | None:
    """The name of an attribute that cannot be copied; None if each of them alone can be."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            # The parts come later in this loop.
            if name != "_modules":
                try:
                    copy.deepcopy(value, dict(memo))
                except RuntimeError:
                    return f"{prefix}.{name}".lstrip(".")
    return None


def nothing_written(module: nn.Module) -> TorchDispatchMode:
    """A ``with`` block in which an operation that writes to a tensor of ``module`` is stopped.

    The operation raises a :class:`WrittenToError` before anything is written.
    """
    return _NothingWritten({_place(tensor): name for name, tensor, _ in _tensors(module) if not tensor.is_meta})


class _NothingWritten(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor) and tensor.numel() and _place(tensor) in self._names:
                    raise WrittenToError(self._names[_place(tensor)])
        return func(*args, **kwargs)


def _place(tensor: Tensor) -> int:
    """The address of the tensor's memory, which all its views share.

    A tensor of a class that only wraps others has none; it is known by its identity.
    """
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else id(tensor)


def _has_memory(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it is a parameter, also for tensors that have several names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield name, buffer, False
