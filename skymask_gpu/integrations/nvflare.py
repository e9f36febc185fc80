"""SkyMask as NVIDIA FLARE's ``ModelAggregator`` (https://nvflare.readthedocs.io; extra ``nvflare``).

Pass it to FLARE's FedAvg as ``aggregator=SkyMaskAggregator(defence)``. FLARE collects the clients'
models; this judges them, and gives back the mean of those that are kept.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from skymask_gpu.defence import Aggregation, ClientHistory, SkyMask, VerdictWarning
from skymask_gpu.defence.forms import Form, client_state, named_values, tensor_fault
from skymask_gpu.defence.tied import under_all_names

__all__ = ["SkyMaskAggregator"]


class SkyMaskAggregator(ModelAggregator):
    """Judges the clients of each round with SkyMask.

    Clients send their model's state dict (``ParamsType.FULL``), or what changed in its parameters
    (``DIFF``); each may do as it likes. What the server's model is, is read from FLARE in the first
    round, and followed from then on. If no client is usable, the model stays as it is.

    Args:
        defence: the model, the root data and all settings of SkyMask. Its module has the names of
            the server's model.

    Attributes:
        verdicts: per round, the reason for each rejected client, by the client's name.
        history: what is remembered of each client from earlier rounds, by its name, which FLARE's
            FedAvg gives it; see :class:`ClientHistory`.

    Raises:
        ValueError: ``defence`` is no SkyMask.

    Example:
        >>> module = torch.nn.Linear(4, 3)
        >>> defence = SkyMask(module, torch.randn(6, 4), torch.arange(6) % 3)
        >>> SkyMaskAggregator(defence).verdicts
        []
    """

    def __init__(self, defence: SkyMask) -> None:
        if not isinstance(defence, SkyMask):
            raise ValueError(f"defence must be a SkyMask, got a {type(defence).__name__}; pass SkyMask(module, inputs, labels)")
        super().__init__()
        self._defence = defence
        self._global: dict[str, Tensor] | None = None
        self._sent: list[FLModel] = []
        self.verdicts: list[dict[str, str]] = []
        self.history = ClientHistory()

    def accept_model(self, model: FLModel) -> None:
        self._sent.append(model)

    def reset_stats(self) -> None:
        self._sent = []

    def aggregate_model(self) -> FLModel:
        sent, self._sent = self._sent, []
        # What most clients send is what the server's controller expects. Each has one vote, however
        # many entries it sends.
        is_full = _most(model.params_type == ParamsType.FULL for model in sent)
        as_tensors = _most(_most(isinstance(value, Tensor) for value in values) for values in map(_values, sent) if values)
        self._global = before = self._global or self._first_global()
        params = self._defence.settings.flat.shapes
        after = dict(before)
        result, rejected = self._judged(sent, before)
        if result is not None:
            changes = self._defence.settings.flat.unflatten(result.update.cpu())
            moved = {name: before[name] + change.to(before[name].dtype) for name, change in changes.items()}
            buffers = {name: value.cpu() for name, value in result.buffers.items()}
            after |= under_all_names({**moved, **buffers}, result.other_names)
        self.verdicts.append(rejected)
        self._global = after
        # A difference leaves out buffers that nobody sent.
        changed = {name: after[name] - before[name] for name in before if name in params or after[name] is not before[name]}
        values = after if is_full else changed
        made: dict[str, Any] = values if as_tensors else {name: value.numpy() for name, value in values.items()}
        if is_full:
            # A client's load_state_dict needs what its module's get_extra_state made, too.
            state = self._defence.settings.module.state_dict()
            extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            made = made | {name: extra[name] for name in extra if _most(_has(model, name) for model in sent)}
        return FLModel(params_type=ParamsType.FULL if is_full else ParamsType.DIFF, params=made)

    def _judged(self, sent: list[FLModel], before: dict[str, Tensor]) -> tuple[Aggregation | None, dict[str, str]]:
        """The defence's result, None if nobody can be judged; and the reason for each rejection."""
        updates: dict[int | str, Form] = {}
        faults: dict[str, str] = {}
        names = _names(sent)
        for name, model in zip(names, sent, strict=True):
            # Whatever goes wrong here is this one client's doing, and must not reach the others.
            try:
                update = self._update(model, before)
            except Exception as error:
                update = f"its update cannot be read: {type(error).__name__}: {error}"
            if isinstance(update, str):
                faults[name] = update
            else:
                updates[name] = update
        result, reasons = None, faults
        try:
            if not updates:
                raise ValueError(f"none of {len(sent)} clients sent a usable update")
            with warnings.catch_warnings():
                # The log has the verdict.
                warnings.simplefilter("ignore", VerdictWarning)
                result = self._defence.aggregate(updates, before, history=self.history)
            reasons = {**faults, **{str(name): reason for name, reason in result.rejected.items()}}
        except ValueError as error:
            reasons = {**faults, **{name: str(error) for name in names if name in updates}}
            if self.fl_ctx is not None:
                self.error(f"nobody is judged, and the model stays as it is: {error}")
        if self.fl_ctx is not None:
            # FLARE also shows the logger ``skymask_gpu``, which says how many are kept.
            for name, reason in reasons.items():
                self.info(f"rejected {name}: {reason}")
        return result, {name: reasons[name] for name in names if name in reasons}

    def _first_global(self) -> dict[str, Tensor]:
        """The server's model before the first round: FLARE's, or else that of the defence."""
        state = self._defence.settings.module.state_dict()
        own = {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}
        held = None if self.fl_ctx is None else self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        weights = held.get("weights") if isinstance(held, dict) else None
        for name, value in (weights or {}).items():
            if name in own:
                own[name] = torch.as_tensor(np.array(value)).to(own[name])
        return own

    def _update(self, model: FLModel, before: dict[str, Tensor]) -> dict[str, Tensor] | str:
        """What the defence takes: differences of parameters, and buffers as they are.

        A string says why the client's model cannot be used.
        """
        if not isinstance(model.params, Mapping):
            return f"sent a {type(model.params).__name__} instead of a state dict"
        is_full, flat = model.params_type == ParamsType.FULL, self._defence.settings.flat
        known = {**self._defence.settings.module.state_dict(), **before}
        update = named_values(model.params, flat, known)
        if isinstance(update, str):
            return update
        for name, value in update.items():
            if name not in before or is_full != (name in flat.shapes):
                continue
            # What does not fit stays as it is, and client_state says why. The difference of a
            # counter may come as a floating-point number.
            own = before[name]
            if all(tensor_fault(name, value, wanted, True) for wanted in (own, own.double())):
                continue
            tensor = value.detach().cpu().double()
            update[name] = (tensor - own.double()) if is_full else (tensor + own.double()).to(own.dtype)
        return client_state(update, flat, known)


def _names(sent: list[FLModel]) -> list[str]:
    """Each client's name; with numbers if two have the same, which FLARE's FedAvg never gives."""
    names = [str((model.meta or {}).get("client_name", number)) for number, model in enumerate(sent)]
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names)]


def _values(model: FLModel) -> list[Any]:
    return list(model.params.values()) if isinstance(model.params, Mapping) else []


def _has(model: FLModel, name: str) -> bool:
    return isinstance(model.params, Mapping) and name in model.params


def _most(answers: Iterable[bool]) -> bool:
    found = list(answers)
    return 2 * sum(found) > len(found)
