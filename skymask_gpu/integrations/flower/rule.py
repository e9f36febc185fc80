"""``RuleStrategy``: a Flower server with any of this package's aggregation rules."""

from typing import Any

import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining, mean_buffers, root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, build_rule
from skymask_gpu.federation.rules.interface import uses_root_data
from skymask_gpu.integrations.flower.replies import Decoded, SentModel
from skymask_gpu.integrations.flower.strategy import Judgement, JudgingStrategy

__all__ = ["RuleStrategy"]


class RuleStrategy(JudgingStrategy):
    """One of :data:`skymask_gpu.federation.rules.RULES` as a strategy of Flower's message API.

    Malformed replies, metrics and verdicts are treated as :class:`SkyMaskStrategy` treats them. A
    rule that judges nobody, such as a median, keeps every node whose update is finite. All clients
    count alike.

    Args:
        name: the rule, such as ``"multi-krum"``.
        module: the model; its trainable parameters are averaged.
        assumed_malicious: the number of malicious clients per round that the rule assumes. Each
            malformed reply counts as one of them. Rules that assume no number ignore it.
        root_inputs: ``(n, ...)``, clean samples of the server, for the rules that use some.
        root_labels: ``(n, ...)``, their labels.
        root_training: how the server trains on these samples.
        num_clients: for a rule that remembers something from round to round, the largest number of
            different nodes that may ever take part; further ones are rejected. None: no limit. A
            rule such as ``"fldetector"`` keeps P numbers for each node that ever took part.
        settings: the rule's own settings, an instance of ``RULES.settings_of(name)``.
        seed: the seed of rules that draw random numbers.
        fedavg: the arguments of Flower's ``FedAvg``, such as ``fraction_train``.

    Raises:
        ValueError: there is no such rule, or it needs an argument that is missing.

    Example:
        >>> strategy = RuleStrategy("multi-krum", torch.nn.Linear(4, 3), assumed_malicious=2)
        >>> strategy.verdicts
        {}
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        assumed_malicious: int,
        root_inputs: Tensor | None = None,
        root_labels: Tensor | None = None,
        root_training: RootTraining = RootTraining(),
        num_clients: int | None = None,
        settings: Any = None,
        seed: int = 0,
        **fedavg: Any,
    ) -> None:
        # Only a class can remember something, and only with state() can it be restored.
        self._remembers = hasattr(RULES[name], "state")
        if not isinstance(assumed_malicious, int) or assumed_malicious < 0:
            raise ValueError(f"assumed_malicious must be a whole number of at least 0, got {assumed_malicious!r}")
        if uses_root_data(name) and (root_inputs is None or root_labels is None):
            raise ValueError(
                f"root_inputs and root_labels must be given for the rule {name!r}, which uses the server's samples"
            )
        if num_clients is not None and (not isinstance(num_clients, int) or num_clients < 1):
            raise ValueError(f"num_clients must be a whole number of at least 1, or None for no limit, got {num_clients!r}")
        super().__init__(module, **fedavg)
        self._name, self._assumed_malicious, self._seed = name, assumed_malicious, seed
        self._root_training, self._num_clients = root_training, num_clients
        self._device = next(module.parameters()).device
        self._loss = None
        if uses_root_data(name) and root_inputs is not None and root_labels is not None:
            self._loss = FlatModel(module, root_inputs, root_labels).to(torch.float32)
        context = RuleContext(
            module=module,
            root_inputs=torch.empty(0) if root_inputs is None else root_inputs,
            root_labels=torch.empty(0) if root_labels is None else root_labels,
            num_clients=num_clients or 0,
            root_training=root_training,
            seed=seed,
        )
        self._rule = build_rule(name, context, settings)
        self._numbers: dict[int, int] = {}

    def judge(self, server_round: int, sent: SentModel, decoded: Decoded) -> Judgement:
        finite_K = torch.isfinite(decoded.updates).all(1).tolist()
        reasons = {row: "its update contains NaN or Inf" for row, is_finite in enumerate(finite_K) if not is_finite}
        num_malicious = max(0, self._assumed_malicious - len(decoded.malformed) - len(reasons))
        reasons |= self._strangers(decoded.nodes)
        rows = [row for row in range(len(decoded.nodes)) if row not in reasons]
        if not rows:
            raise ValueError(f"no row is left for the rule, for such reasons as this: {next(iter(reasons.values()))}")
        info = self._info(server_round, sent.params().to(self._device), [decoded.nodes[row] for row in rows], num_malicious)
        result = self._rule(decoded.updates[rows].to(self._device), info)
        kept_by_rule = [True] * len(rows) if result.kept is None else result.kept.tolist()
        reasons |= {row: f"{self._name} does not keep it" for row, kept in zip(rows, kept_by_rule, strict=True) if not kept}
        kept_K = torch.tensor([row not in reasons for row in range(len(decoded.nodes))])
        return Judgement(result.update, kept_K.tolist(), "", reasons, mean_buffers(decoded.buffers, kept_K))

    def _strangers(self, nodes: list[int]) -> dict[int, str]:
        """Row -> reason, for nodes beyond the number that a rule with a memory may remember."""
        if not self._remembers:
            return {}
        for node in nodes:
            self._numbers.setdefault(node, len(self._numbers))
        if self._num_clients is None:
            return {}
        reason = f"{self._name} remembers {self._num_clients} clients, and this is another one; raise num_clients"
        return {row: reason for row, node in enumerate(nodes) if self._numbers[node] >= self._num_clients}

    def _info(self, server_round: int, params_P: Tensor, nodes: list[int], num_malicious: int) -> RoundInfo:
        # Without root data, no rule is admitted that looks at the root update.
        root_update_P = torch.full_like(params_P, torch.nan)
        if self._loss is not None:
            root_update_P = root_direction(self._loss, params_P, self._root_training)
        return RoundInfo(
            global_params=params_P,
            root_update=root_update_P,
            clients=torch.tensor([self._numbers.get(node, row) for row, node in enumerate(nodes)]),
            num_malicious=num_malicious,
            generator=torch.Generator().manual_seed(self._seed * 1_000_003 + server_round),
        )
