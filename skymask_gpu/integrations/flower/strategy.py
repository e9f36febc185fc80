"""What both strategies share: a round from the replies to the new model, with any rule."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING, getLogger
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from skymask_gpu.integrations.flower.metrics import mean_metrics
from skymask_gpu.integrations.flower.replies import Decoded, SentModel, decode
from skymask_gpu.integrations.flower.verdict import RoundVerdict

__all__ = ["Judgement", "JudgingStrategy"]

# Flower's own logger, so that verdicts stand among the other lines of a round.
log = getLogger("flwr").log


@dataclass(frozen=True)
class Judgement:
    """What a rule says about the rows of one round.

    Attributes:
        update: ``(P,)``, the server's step.
        kept: for each row, whether the step is made of it.
        note: the rule's words about the round as a whole.
        reasons: row -> reason, for rows that are not kept.
        buffers: name -> the kept clients' mean.
    """

    update: Tensor
    kept: list[bool]
    note: str
    reasons: dict[int, str]
    buffers: dict[str, Tensor] = field(default_factory=dict)


class JudgingStrategy(FedAvg):
    """FedAvg's sampling and messages, with another aggregation: a rule judges the clients.

    Args:
        module: the model; its trainable parameters are averaged.
        fedavg: the arguments of Flower's ``FedAvg``.

    Attributes:
        verdicts: round -> whom the strategy kept, and why it rejected the others.
    """

    def __init__(self, module: nn.Module, **fedavg: Any) -> None:
        for name in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
            fedavg[name] = fedavg.get(name) or mean_metrics
        super().__init__(**fedavg)
        self.verdicts: dict[int, RoundVerdict] = {}
        self._module = module
        self._sent: SentModel | None = None
        self._asked: set[int] = set()
        # Kept between rounds, because fresh memory for all updates costs more than decoding them.
        self._memory = np.empty((0, 0), np.float32)

    @abstractmethod
    def judge(self, server_round: int, sent: SentModel, decoded: Decoded) -> Judgement:
        """Judge the rows of a round, of which there is at least one.

        Raises:
            ValueError: the clients sent nothing that can be judged. The model then stays.
        """

    def check_more(self, content: RecordDict) -> object:
        """Raise UnusableReplyError if a reply lacks something beside the arrays."""
        return None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Send the model to a sample of the nodes, as FedAvg does, and remember both.

        Raises:
            ValueError: ``arrays`` are not the state of the strategy's module.
        """
        self._sent = SentModel.of(arrays, self._module)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id for message in messages}
        shape = (len(self._asked), self._sent.num_params)
        if self._memory.shape != shape:
            self._memory = np.empty(shape, np.float32)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model, and the kept clients' mean metrics with the numbers of kept and rejected.

        If no reply can be used, the new model is the old one. If no node was asked, both are None.
        """
        if self._sent is None:
            raise ValueError("aggregate_train: no round was configured; call configure_train first, as start() does")
        if not self._asked:
            return None, None
        sent = self._sent
        decoded = decode(replies, self._asked, sent, self.arrayrecord_key, self._memory, self.check_more)
        judgement, note = self._judged(server_round, sent, decoded)
        unusable = {**decoded.malformed, **decoded.silent}
        if judgement is None:
            left = dict.fromkeys(decoded.nodes, "the round could not be judged")
            self._conclude(server_round, RoundVerdict((), {**left, **unusable}, note))
            return sent.arrays, self._metrics([], len(left) + len(unusable))
        rows = list(zip(decoded.nodes, judgement.kept, strict=True))
        reasons = {node: judgement.reasons[row] for row, (node, kept) in enumerate(rows) if not kept}
        verdict = RoundVerdict(tuple(node for node, kept in rows if kept), {**reasons, **unusable}, note)
        self._conclude(server_round, verdict)
        contents = [content for content, kept in zip(decoded.contents, judgement.kept, strict=True) if kept]
        return sent.plus(judgement.update, judgement.buffers), self._metrics(contents, len(verdict.rejected))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean metrics of the nodes that this round's verdict does not reject.

        It is None if none of them sent anything.
        """
        rejected = self.verdicts[server_round].rejected if server_round in self.verdicts else {}
        trusted = [message for message in replies if message.has_content() and message.metadata.src_node_id not in rejected]
        contents = [message.content for message in sorted(trusted, key=lambda message: message.metadata.src_node_id)]
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def _judged(self, server_round: int, sent: SentModel, decoded: Decoded) -> tuple[Judgement | None, str]:
        """The rule's judgement and its note; without a judgement, the note says why."""
        if not decoded.nodes:
            return None, "no node sent a usable reply; the model stays as it was"
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                judgement = self.judge(server_round, sent, decoded)
            except ValueError as error:
                return None, f"{error}; the model stays as it was"
            finally:
                for warning in heard:
                    log(WARNING, "aggregate_train: %s", warning.message)
        if not torch.isfinite(judgement.update).all():
            return None, "the rule's update contains NaN or Inf; the model stays as it was"
        return judgement, judgement.note

    def _conclude(self, server_round: int, verdict: RoundVerdict) -> None:
        """Remember and log a verdict."""
        self.verdicts[server_round] = verdict
        level = INFO if verdict.kept else WARNING
        log(level, "aggregate_train: kept %d of %d nodes", len(verdict.kept), len(verdict.kept) + len(verdict.rejected))
        if verdict.note:
            log(level, "\t> %s", verdict.note)
        for node, reason in sorted(verdict.rejected.items()):
            log(level, "\t> rejected node %d: %s", node, reason)

    def _metrics(self, contents: list[RecordDict], num_rejected: int) -> MetricRecord:
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key) if contents else MetricRecord()
        metrics["clients-kept"], metrics["clients-rejected"] = len(contents), num_rejected
        return metrics
