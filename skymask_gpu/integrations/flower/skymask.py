"""``SkyMaskStrategy``: a Flower server that judges its clients with SkyMask."""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from threading import Thread
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from skymask_gpu.defence import Aggregation, ClientHistory, SkyMask, VerdictWarning
from skymask_gpu.integrations.flower.metrics import example_count
from skymask_gpu.integrations.flower.replies import Decoded, SentModel
from skymask_gpu.integrations.flower.strategy import Judgement, JudgingStrategy

__all__ = ["SkyMaskStrategy"]


class SkyMaskStrategy(JudgingStrategy):
    """SkyMask as a strategy of Flower's message API.

    In each round, malformed replies are rejected one by one, ``defence.aggregate`` judges the
    others, and the mean update of the benign ones is added to the model. ``verdicts[round]`` says
    who was rejected and why. What clients report about themselves is not trusted: all kept clients
    count alike, and metrics are averaged over them only.

    Args:
        defence: the model, the root data and all settings of SkyMask.
        use_example_counts: weigh the clients by the example counts that they report, as FedAvg
            does. The defence must then bound weights.
        fedavg: the arguments of Flower's ``FedAvg``, such as ``fraction_train``.

    Attributes:
        history: what is remembered of each node from earlier rounds, see :class:`ClientHistory`.

    Raises:
        ValueError: ``defence`` is no SkyMask, or example counts are used without a bound.

    Example:
        >>> from skymask_gpu import SkyMask
        >>> defence = SkyMask(torch.nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3)
        >>> strategy = SkyMaskStrategy(defence, fraction_train=0.5)
        >>> strategy.verdicts
        {}
    """

    def __init__(self, defence: SkyMask, *, use_example_counts: bool = False, **fedavg: Any) -> None:
        if not isinstance(defence, SkyMask):
            raise ValueError(f"defence must be a SkyMask, got a {type(defence).__name__}; pass SkyMask(module, inputs, labels)")
        if use_example_counts and defence.settings.norm_bound is None:
            raise ValueError(
                "use_example_counts must go with SkyMask(..., norm_bound='median'), got no bound; clients report these counts "
                "themselves, and one that claims enough examples would decide alone"
            )
        super().__init__(defence.settings.module, **fedavg)
        self._defence = defence
        self._use_example_counts = use_example_counts
        self.history = ClientHistory()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As FedAvg does; while the clients train, the server prepares the round."""
        messages = super().configure_train(server_round, arrays, config, grid)
        if self._sent is not None and self._asked:
            Thread(target=self._prepare, args=[self._params(self._sent)], name="skymask-prepare").start()
        return messages

    def check_more(self, content: RecordDict) -> object:
        return example_count(content, self.weighted_by_key) if self._use_example_counts else None

    def judge(self, server_round: int, sent: SentModel, decoded: Decoded) -> Judgement:
        weights = None
        if self._use_example_counts:
            weights = [example_count(content, self.weighted_by_key) for content in decoded.contents]
        with warnings.catch_warnings():
            # The note and the reasons say the same.
            warnings.simplefilter("ignore", VerdictWarning)
            result = self._aggregate(sent, decoded, weights)
        note = f"SkyMask, {result.verdict}: {result.clusters.reason}"
        reasons = {row: result.rejected[node] for row, node in enumerate(decoded.nodes) if node in result.rejected}
        return Judgement(result.update, result.benign.tolist(), note, reasons, result.buffers)

    def _params(self, sent: SentModel) -> Tensor:
        """The parameters that were sent, ``(P,)``, where the defence works."""
        return sent.params().to(self._defence.settings.flat.initial_params.device)

    def _prepare(self, params_P: Tensor) -> None:
        # The round comes to the same error by itself, where a strategy can say so.
        with suppress(ValueError):
            self._defence.prepare(params_P)

    def _aggregate(self, sent: SentModel, decoded: Decoded, weights: list[float] | None) -> Aggregation:
        params_P = self._params(sent)
        updates_KP = decoded.updates.to(params_P.device)
        if not sent.buffers:
            return self._defence.aggregate(
                updates_KP, params_P, weights=weights, client_ids=decoded.nodes, history=self.history
            )
        # Only state dicts hold buffers beside the updates; their parameters are views of the rows.
        states = [
            {name: row_P[columns].view(sent.values[name].shape) for name, columns in sent.columns.items()} | buffers
            for row_P, buffers in zip(updates_KP, decoded.buffers, strict=True)
        ]
        return self._defence.aggregate(states, params_P, weights=weights, client_ids=decoded.nodes, history=self.history)
