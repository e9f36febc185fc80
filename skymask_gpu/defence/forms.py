"""The forms in which clients' updates and the server's own vectors may come.

Whatever each client sent is turned into a state dict of tensors, so that one check and one copy
into rows serve all forms. Nothing that a client sent is converted before its shape was compared
with the wanted one: an array of a forged shape may stand for more memory than there is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel

__all__ = ["Form", "Sent", "array_as_tensor", "client_state", "named_values", "stacked_rows", "tensor_fault"]

# What one client may send: a state dict, a (P,) row, or the arrays of its parameters in order.
Sent = Mapping[str, Any] | Tensor | np.ndarray | Sequence[Any]
# What the server's own vectors may be.
Form = Tensor | np.ndarray | Mapping[str, Any] | Sequence[Any]

# The dtypes that a client's tensors may have. Every operation of parsing supports them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# PEFT puts the name of the adapter into a module's names, and leaves it out of the state dicts that
# it saves: lora_A.default.weight becomes lora_A.weight, and a layer that is trained as a whole,
# classifier.modules_to_save.default.weight, becomes classifier.weight.
_ADAPTER = re.compile(r"(\.lora_[^.]+)\.[^.]+|\.modules_to_save\.[^.]+")


def stacked_rows(name: str, array: np.ndarray) -> Tensor:
    """An array of rows as a float32 tensor, also if it is float64 as NumPy's arrays are by default.

    A float32 array that lies in memory row by row and can be written to is not copied.

    Args:
        name: what errors call it.
        array: any shape.

    Raises:
        ValueError: it does not hold floating-point numbers.
    """
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must be an array of floating-point numbers, got dtype {array.dtype}; cast it with astype")
    return array_as_tensor(array.astype(np.float32, copy=False))


def client_state(sent: object, model: FlatModel, known: Mapping[str, Tensor]) -> dict[str, Tensor] | str:
    """What one client sent as a state dict of tensors; a string says why it cannot be used.

    The values of parameters are not looked at, those of buffers are.

    Args:
        sent: a state dict of tensors or arrays, in the module's names or in those that PEFT saves;
            a ``(P,)`` tensor or array; or a list of tensors or arrays, one for each trainable
            parameter in the order of ``named_parameters()``, or one for each entry of the module's
            state dict in its order, as Flower's clients send them.
        model: it tells names and shapes of the parameters.
        known: the module's state dict. Entries of it that are no tensors, which ``get_extra_state``
            may give, are ignored, also in what the client sent.

    Example:
        >>> module = torch.nn.Linear(2, 3)
        >>> model = FlatModel(module, torch.randn(6, 2), torch.arange(6) % 3)
        >>> client_state([np.ones((3, 2)), np.ones(3)], model, module.state_dict())["bias"]
        tensor([1., 1., 1.], dtype=torch.float64)
        >>> client_state([np.ones((3, 2))], model, module.state_dict())
        'sent a list of 1 arrays instead of 2, one for each trainable parameter in order'
    """
    values = named_values(sent, model, known)
    if isinstance(values, str):
        return values
    return _state_dict_fault(values, model, known) or values


def named_values(sent: object, model: FlatModel, known: Mapping[str, Tensor]) -> dict[str, Any] | str:
    """Any of the forms as a dict from names to values, in which arrays have become tensors.

    Names and tensors are not checked yet. A string says why this is none of the forms, or which
    array cannot become a tensor.
    """
    if isinstance(sent, Tensor | np.ndarray):
        row = _checked("its update", sent, model.initial_params)
        if not isinstance(row, Tensor):
            return str(row)
        return tensor_fault("its update", row, model.initial_params, True) or model.unflatten(row)
    # A module's own get_extra_state may put anything into its state dict. It is no part of an
    # update, and the form in which a client sends it says nothing about the client.
    extra = {name for name, value in known.items() if not isinstance(value, Tensor)}
    known = {name: value for name, value in known.items() if name not in extra} if extra else known
    if isinstance(sent, Mapping):
        wanted = {name: value for name, value in sent.items() if name not in extra} if extra else sent
        named = _with_known_names(wanted, model, known)
    elif isinstance(sent, Sequence) and not isinstance(sent, str | bytes):
        names = next((names for names in (model.shapes, known) if len(names) == len(sent)), None)
        if names is None:
            whole = "" if len(known) == len(model.shapes) else f", or {len(known)}, one for each entry of its state dict"
            return (
                f"sent a {type(sent).__name__} of {len(sent)} arrays instead of {len(model.shapes)}, one for each trainable "
                f"parameter in order{whole}"
            )
        named = dict(zip(names, sent, strict=True))
    else:
        return f"sent a {type(sent).__name__} instead of a state dict"
    for name, value in named.items():
        if isinstance(value, np.ndarray | np.generic) and name in known:
            named[name] = _checked(name, value, known[name])
            if isinstance(named[name], str):
                return str(named[name])
    return named


def _state_dict_fault(state: Mapping[Any, Any], model: FlatModel, known: Mapping[str, Tensor]) -> str | None:
    """Why a client's state dict of tensors cannot be used; None if it can.

    The values of parameters are not looked at, those of buffers are.
    """
    missing = [name for name in model.shapes if name not in state]
    unknown = [str(name) for name in state if name not in known]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has unknown {', '.join(unknown[:3])}"] if unknown else []
        return f"its state dict {' and '.join(parts)}"
    faults = (tensor_fault(name, value, known[name], name in model.shapes) for name, value in state.items())
    return next((fault for fault in faults if fault is not None), None)


def tensor_fault(name: str, value: object, wanted: Tensor, is_parameter: bool) -> str | None:
    """Why one entry of a client's state dict cannot be used; None if it can.

    Args:
        name: what the reason calls it.
        value: what the client sent.
        wanted: the module's own tensor, for its shape and the kind of its dtype.
        is_parameter: whether its values are left alone; those of anything else must be finite.
    """
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__} instead of a tensor"
    if value.is_nested:
        return f"{name} must be a plain dense tensor, got a nested tensor"
    if value.shape != wanted.shape:
        return f"{name} must have shape {tuple(wanted.shape)}, got {tuple(value.shape)}"
    if value.layout != torch.strided or value.is_meta:
        return f"{name} must be a plain dense tensor, got a {'meta' if value.is_meta else value.layout} tensor"
    floating = wanted.is_floating_point()
    if value.dtype not in (_FLOATS if floating else _INTEGERS):
        return f"{name} must be {'floating point' if floating else 'an integer'}, got {value.dtype}"
    if floating and not is_parameter and not torch.isfinite(value.to(wanted.dtype)).all():
        return f"{name} contains NaN or Inf"
    # The model takes its square root.
    if floating and not is_parameter and name.endswith("running_var") and (value < 0).any():
        return f"{name} contains variances below 0"
    return None


def _checked(name: str, value: object, wanted: Tensor) -> object:
    """A NumPy array as a tensor, or a string that says why not; everything else is unchanged."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    if value.shape != tuple(wanted.shape):
        return f"{name} must have shape {tuple(wanted.shape)}, got {value.shape}"
    try:
        return array_as_tensor(np.asarray(value))
    except TypeError:
        return f"{name} must be {'floating point' if wanted.is_floating_point() else 'an integer'}, got {value.dtype}"


def array_as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy where torch can use its memory and may write to it.

    Raises:
        TypeError: torch has no such dtype.
    """
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(native, requirements=["C", "A", "W"]))


def _with_known_names(state: Mapping[Any, Any], model: FlatModel, known: Mapping[str, Tensor]) -> dict[Any, Any]:
    """The same values under the module's names, if they come under those that PEFT saves."""
    if all(name in known for name in state):
        return dict(state)
    names: dict[str, str | None] = {}
    for name in model.shapes:
        saved = _ADAPTER.sub(lambda match: match[1] or "", name)
        # Two adapters would be saved under one name, which then stands for neither.
        names[saved] = None if saved in names else name
    renamed: dict[Any, Any] = {}
    for name, value in state.items():
        own = names.get(name) if name not in known else None
        renamed[name if own is None or own in state else own] = value
    return renamed
