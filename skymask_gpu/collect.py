"""From what clients sent to the rows the engine can take: parsing, and rejecting by name what cannot be used."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from skymask_gpu.engine import FlatModel

__all__ = ["Collected", "collect", "drives_loss_out_of_range", "far_out"]

Updates = Tensor | Sequence[Mapping[str, Tensor]]

# An honest update is far shorter than the model it changes; a longer one is looked at more closely.
_FAR_OUT = 1.0
# What a client's tensors may be stored in: kinds that every operation here supports.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Elements of a temporary made from rows of the updates.
_CHUNK_ELEMENTS = 2**24


@dataclass
class Collected:
    """Usable clients: ``rows`` ``(K, P)``, their ``norms`` ``(K,)``, and ``clients`` ``(K,)``, who sent each row."""

    rows: Tensor
    norms: Tensor
    clients: Tensor
    num_clients: int
    buffers: list[dict[str, Tensor]]  # one a row; empty dicts if the clients sent none
    rejected: dict[int, str] = field(default_factory=dict)

    def reject(self, reasons: dict[int, str]) -> None:
        """Drop rows (by position) with the reason for each."""
        if not reasons:
            return
        keep_K = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        keep_K[list(reasons)] = False
        self.rejected.update({int(self.clients[row]): reason for row, reason in reasons.items()})
        self.rows = self.rows[keep_K]
        self.norms = self.norms[keep_K]
        self.buffers = [buffers for row, buffers in enumerate(self.buffers) if row not in reasons]
        self.clients = self.clients[keep_K]


def collect(updates: Updates, model: FlatModel, module: nn.Module) -> Collected:
    """Rows from a stacked tensor or a list of state dicts; whatever is malformed or not finite is rejected by name.

    Raises:
        ValueError: the stacked tensor does not fit the model, there is no client, or no usable one is left.
    """
    if isinstance(updates, Tensor):
        _check_stacked(updates, model.num_params)
        rows, clients = updates.detach(), torch.arange(len(updates), device=updates.device)
        collected = Collected(rows, _row_norms(rows), clients, len(updates), [{}] * len(updates))
    else:
        collected = _from_state_dicts(updates, model, module)
    _reject_non_finite(collected)
    num_bad = len(collected.rejected)
    if num_bad == collected.num_clients:
        first = next(iter(collected.rejected.values()))
        raise ValueError(f"updates: none of {num_bad} clients sent a usable update; the first one: {first}")
    if 2 * num_bad > collected.num_clients:
        warnings.warn(f"{num_bad} of {collected.num_clients} clients sent an unusable update and were rejected", stacklevel=4)
    return collected


def _row_norms(rows_KP: Tensor) -> Tensor:
    """Euclidean norms in float32, ``(K,)``; NaN or Inf where a row has one, Inf also where the square overflows."""
    chunk = max(1, _CHUNK_ELEMENTS // rows_KP.shape[1])
    if len(rows_KP) == 0:
        return rows_KP.new_empty(0, dtype=torch.float32)
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in rows_KP.split(chunk)])


def far_out(collected: Collected, global_params_P: Tensor, direction_P: Tensor) -> list[int]:
    """Rows (by position) so long that their effect on the loss must be looked at one by one."""
    scale = torch.maximum(torch.linalg.vector_norm(global_params_P), torch.linalg.vector_norm(direction_P))
    return (collected.norms > _FAR_OUT * scale).nonzero().flatten().tolist()


def drives_loss_out_of_range(
    collected: Collected, candidates: list[int], global_params_P: Tensor, loss: FlatModel
) -> dict[int, str]:
    """Those of the candidate rows that alone make the root loss or its gradient Inf or NaN, with the reason."""
    reasons = {}
    for row in candidates:
        params_P = (global_params_P + collected.rows[row].to(global_params_P.dtype)).requires_grad_()
        value = loss(params_P)
        (grad_P,) = torch.autograd.grad(value, params_P)
        if not torch.isfinite(value):
            reasons[row] = f"its update drives the root loss to {value.item()}"
        elif not torch.isfinite(grad_P).all():
            reasons[row] = "its update drives the gradient of the root loss to NaN or Inf"
        elif not torch.isfinite(collected.norms[row]):
            reasons[row] = "its update is so large that its norm overflows float32"
    return reasons


def _check_stacked(updates: Tensor, num_params: int) -> None:
    if updates.dim() != 2 or len(updates) == 0 or updates.shape[1] != num_params:
        raise ValueError(
            f"updates must have shape (N, {num_params}) with N >= 1 clients, one column for each trainable parameter of the "
            f"module, got {tuple(updates.shape)}; stack the flattened updates (local minus global), or pass state dicts"
        )
    if updates.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"updates must be float32 or bfloat16, got {updates.dtype}; cast with updates.float()")


def _from_state_dicts(updates: Sequence[Mapping[str, Tensor]], model: FlatModel, module: nn.Module) -> Collected:
    if not isinstance(updates, Sequence) or isinstance(updates, str | bytes):
        raise ValueError(f"updates must be an (N, P) tensor or a list of state dicts, got {type(updates).__name__}")
    if len(updates) == 0:
        raise ValueError("updates must hold at least one client's state dict, got an empty list")
    known = module.state_dict()
    device = model.initial_params.device
    rows, clients, buffers, rejected = [], [], [], {}
    for client, state in enumerate(updates):
        reason = _state_dict_fault(state, model, known)
        if reason is not None:
            rejected[client] = reason
            continue
        rows.append(model.flatten({name: state[name].to(device, torch.float32) for name in model.shapes}))
        clients.append(client)
        names = {name for name, _ in module.named_buffers()}
        buffers.append({name: state[name].detach().to(device, known[name].dtype) for name in names if name in state})
    stacked = torch.stack(rows) if rows else torch.empty(0, model.num_params, device=device)
    return Collected(
        stacked, _row_norms(stacked), torch.tensor(clients, dtype=torch.long, device=device), len(updates), buffers, rejected
    )


def _state_dict_fault(state: Mapping[str, Tensor], model: FlatModel, known: Mapping[str, Tensor]) -> str | None:
    if not isinstance(state, Mapping):
        return f"sent a {type(state).__name__} instead of a state dict"
    missing = [name for name in model.shapes if name not in state]
    unknown = [str(name) for name in state if name not in known]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has unknown {', '.join(unknown[:3])}"] if unknown else []
        return f"its state dict {' and '.join(parts)}"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            return f"{name} is a {type(value).__name__} instead of a tensor"
        if value.shape != known[name].shape:
            return f"{name} must have shape {tuple(known[name].shape)}, got {tuple(value.shape)}"
        if value.layout != torch.strided or value.is_meta:
            return f"{name} must be a plain dense tensor, got a {'meta' if value.is_meta else value.layout} tensor"
        floating = known[name].is_floating_point()
        if value.dtype not in (_FLOATS if floating else _INTEGERS):
            return f"{name} must be {'floating point' if floating else 'an integer'}, got {value.dtype}"
        if floating and name not in model.shapes and not torch.isfinite(value.to(known[name].dtype)).all():
            return f"{name} contains NaN or Inf"
    return None


def _reject_non_finite(collected: Collected) -> None:
    # the norm is finite for almost every row; only the others are read a second time
    doubtful = (~torch.isfinite(collected.norms)).nonzero().flatten().tolist()
    reasons = {}
    for row in doubtful:
        num_bad = int((~torch.isfinite(collected.rows[row])).sum())
        if num_bad:
            reasons[row] = f"its update contains NaN or Inf ({num_bad} of {collected.rows.shape[1]} values)"
    collected.reject(reasons)
