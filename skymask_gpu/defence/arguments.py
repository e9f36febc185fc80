"""Checks of ``SkyMask``'s arguments before any work; errors name the argument and the remedy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.defence.forms import array_as_tensor, named_values, stacked_rows
from skymask_gpu.defence.history import ClientHistory
from skymask_gpu.engine import FlatModel

__all__ = ["check_kind", "check_loss", "check_same_device", "checked_ids", "checked_weights", "flat_vector", "usable_device"]


def check_kind(name: str, setting: object, kind: type) -> None:
    """Refuse a setting that is not an instance of ``kind``."""
    if not isinstance(setting, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {setting!r}; pass {kind.__name__}(...)")


def usable_device(device: torch.device | str) -> torch.device:
    """The device under the name that its tensors give it: with an index, if it has one.

    Raises:
        ValueError: PyTorch cannot use it here, or it holds no values (``meta``).
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"device must be one that PyTorch can use here, got {device!r}: {str(error).splitlines()[0]}"
        ) from error
    if found.type == "meta":
        raise ValueError("device must be one that holds values, got 'meta'; use 'cpu', 'cuda' or None")
    return found


def check_loss(loss: FlatModel) -> None:
    """Refuse a loss that is not one differentiable number."""
    with torch.enable_grad():
        value: object = loss(loss.initial_params.clone().requires_grad_())
    if not isinstance(value, Tensor):
        raise ValueError(f"loss_fn must return a tensor of shape (), got a {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss_fn must return one number, shape (), got shape {tuple(value.shape)}; use reduction='mean'")
    if not value.requires_grad:
        raise ValueError("loss_fn must be differentiable in the outputs, got a value without a gradient; no .item(), .detach()")


def flat_vector(name: str, given: object, loss: FlatModel, module: nn.Module) -> Tensor:
    """Parameters or an update as one ``(P,)`` vector, in the dtype and on the device of ``loss``.

    Args:
        name: what errors call it.
        given: a ``(P,)`` tensor or array, a state dict, of which only the trainable parameters are
            taken, or a list of arrays in the order of these parameters.
        loss: it tells names and shapes.
        module: the module of ``loss``.

    Raises:
        ValueError: it is none of these forms, or a parameter is missing, has another shape or is no
            tensor.
    """
    if not isinstance(given, Mapping | list | tuple):
        if not isinstance(given, Tensor | np.ndarray) or tuple(given.shape) != (loss.num_params,):
            got = tuple(given.shape) if isinstance(given, Tensor | np.ndarray) else type(given).__name__
            raise ValueError(f"{name} must have shape ({loss.num_params},), one value per trainable parameter, got {got}")
        row = given if isinstance(given, Tensor) else stacked_rows(name, given)
        return row.detach().to(loss.initial_params)
    values = named_values(given, loss, module.state_dict())
    if isinstance(values, str):
        raise ValueError(f"{name}: {values}")
    strangers = [key for key in loss.shapes if key in values and not isinstance(values[key], Tensor)]
    if strangers:
        raise ValueError(f"{name}: {strangers[0]} must be a tensor, got a {type(values[strangers[0]]).__name__}")
    try:
        return loss.flatten({key: values[key].to(loss.initial_params) for key in loss.shapes if key in values})
    except ValueError as error:
        raise ValueError(f"{name} as a state dict: {error}") from error


def checked_weights(weights: object, num_clients: int) -> Tensor:
    """One weight per client as an ``(N,)`` float64 tensor on the CPU.

    Raises:
        ValueError: they are not N finite numbers of at least 0, or all of them are 0.
    """
    if not isinstance(weights, Tensor | np.ndarray | Sequence) or isinstance(weights, str | bytes):
        raise ValueError(f"weights must be a tensor, an array or a list of one number per client, got {type(weights).__name__}")
    try:
        weights = array_as_tensor(weights) if isinstance(weights, np.ndarray) else weights
        weights_N = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"weights must be one number per client: {str(error).splitlines()[0]}") from error
    if weights_N.shape != (num_clients,):
        raise ValueError(f"weights must have shape ({num_clients},), one number per client, got {tuple(weights_N.shape)}")
    wrong = (~torch.isfinite(weights_N) | (weights_N < 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"weights must be finite and at least 0, got {weights_N[wrong[0]]:g} for client {wrong[0]}; leave such a client out"
        )
    if not weights_N.any():
        raise ValueError("weights must not all be 0; pass the sizes of the clients' data sets, or None for equal weights")
    return weights_N


def checked_ids(ids: object, num_clients: int, history: object) -> list[int | str] | None:
    """The names of the N clients as a list; None if the caller gave none.

    Integers of NumPy become Python's, because a history is stored as JSON.

    Raises:
        ValueError: they are not N different strings or integers, or a history lacks them.
    """
    if history is not None and not isinstance(history, ClientHistory):
        raise ValueError(f"history must be a ClientHistory, got a {type(history).__name__}; pass ClientHistory() or None")
    if ids is None:
        if history is not None:
            raise ValueError("client_ids must be given with a history, which tells clients apart by them, got None")
        return None
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise ValueError(f"client_ids must be a list of strings or integers, got {type(ids).__name__}; a tensor has .tolist()")
    strangers = [one for one in ids if not isinstance(one, Integral | str)]
    if strangers:
        raise ValueError(f"client_ids must be a list of strings or integers, got {strangers[0]!r} among them")
    if len(ids) != num_clients:
        raise ValueError(f"client_ids must have one id per client, {num_clients}, got {len(ids)}")
    if len(set(ids)) < num_clients:
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise ValueError(f"client_ids must differ from each other, got {twice!r} twice; reject one of the two before")
    return [one if isinstance(one, int | str) else int(one) for one in ids]


def check_same_device(name: str, tensor: Tensor, loss: FlatModel, asked_for: torch.device | None) -> None:
    """Refuse a tensor on another device, unless the caller chose one (it is then moved there)."""
    device = loss.initial_params.device
    if asked_for is None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like updates, got {tensor.device}; move it with .to({str(device)!r})")
