"""SkyMask as NVIDIA FLARE's ``ModelAggregator`` (https://nvflare.readthedocs.io; extra ``nvflare``).

Pass it to FLARE's FedAvg as ``aggregator=SkyMaskAggregator(defence)``. FLARE collects the clients'
models; this judges them, and gives back the mean of those that are kept.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from skymask_gpu.defence import ClientHistory, SkyMask, VerdictWarning

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
        names = _names(sent)
        # What most clients send is what the server's controller expects.
        is_full = _most(model.params_type == ParamsType.FULL for model in sent)
        as_tensors = _most(isinstance(value, Tensor) for model in sent for value in _values(model))
        self._global = before = self._global or self._first_global()
        params = self._defence.settings.flat.shapes
        after, rejected = dict(before), {}
        try:
            with warnings.catch_warnings():
                # The log has the verdict.
                warnings.simplefilter("ignore", VerdictWarning)
                updates = [self._update(model, before) for model in sent]
                result = self._defence.aggregate(updates, before, client_ids=names, history=self.history)
        except ValueError as error:
            rejected = dict.fromkeys(names, str(error))
            if self.fl_ctx is not None:
                self.error(f"nobody is judged, and the model stays as it is: {error}")
        else:
            rejected = {str(name): reason for name, reason in result.rejected.items()}
            for name, change in self._defence.settings.flat.unflatten(result.update.cpu()).items():
                after[name] = before[name] + change.to(before[name].dtype)
            after |= {name: value.cpu() for name, value in result.buffers.items()}
            if self.fl_ctx is not None:
                # FLARE also shows the logger ``skymask_gpu``, which says how many are kept.
                for name, reason in rejected.items():
                    self.info(f"rejected {name}: {reason}")
        self.verdicts.append(rejected)
        self._global = after
        # A difference leaves out buffers that nobody sent.
        changed = {name: after[name] - before[name] for name in before if name in params or after[name] is not before[name]}
        values = after if is_full else changed
        made: dict[str, Any] = values if as_tensors else {name: value.numpy() for name, value in values.items()}
        return FLModel(params_type=ParamsType.FULL if is_full else ParamsType.DIFF, params=made)

    def _first_global(self) -> dict[str, Tensor]:
        """The server's model before the first round: FLARE's, or else that of the defence."""
        own = {name: value.detach().cpu().clone() for name, value in self._defence.settings.module.state_dict().items()}
        held = None if self.fl_ctx is None else self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        weights = held.get("weights") if isinstance(held, dict) else None
        for name, value in (weights or {}).items():
            if name in own:
                own[name] = torch.as_tensor(np.array(value)).to(own[name])
        return own

    def _update(self, model: FLModel, before: dict[str, Tensor]) -> Any:
        """What the defence takes: differences of parameters, and buffers as they are.

        What does not fit is left as it is; the defence rejects it by name.
        """
        if not isinstance(model.params, dict):
            return model.params
        is_full, params = model.params_type == ParamsType.FULL, self._defence.settings.flat.shapes
        update = {}
        for name, value in model.params.items():
            known = before.get(name)
            fits = isinstance(value, np.ndarray | Tensor) and known is not None and tuple(value.shape) == tuple(known.shape)
            numeric = fits and (value.dtype.kind in "fiu" if isinstance(value, np.ndarray) else not value.is_complex())
            if numeric and known is not None and is_full == (name in params):
                tensor = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value.detach().cpu())
                value = (tensor.double() - known.double()) if is_full else (tensor.double() + known.double()).to(known.dtype)
            update[name] = value
        return update


def _names(sent: list[FLModel]) -> list[str]:
    """Each client's name; with numbers if two have the same, which FLARE's FedAvg never gives."""
    names = [str((model.meta or {}).get("client_name", number)) for number, model in enumerate(sent)]
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names)]


def _values(model: FLModel) -> list[Any]:
    return list(model.params.values()) if isinstance(model.params, dict) else []


def _most(answers: Iterable[bool]) -> bool:
    found = list(answers)
    return 2 * sum(found) > len(found)
