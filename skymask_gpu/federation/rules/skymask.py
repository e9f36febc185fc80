"""SkyMask among the rules, and its settings."""

import json
from dataclasses import dataclass

from torch import Tensor

from skymask_gpu.defence import Aggregation, ClientHistory, SkyMask
from skymask_gpu.defence.means import MEANS, NORM_BOUND_NAMES
from skymask_gpu.engine import SOLVERS, Clustering, MaskTraining
from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data, takes_any_row

__all__ = ["SkyMaskRule", "SkyMaskSettings"]


@dataclass(frozen=True, kw_only=True)
class SkyMaskSettings:
    """Settings of ``skymask``: how masks are trained and clustered.

    Attributes:
        solver: the solver of mask training.
        clustering: the rule that turns masks into a verdict.
        mask_steps: the number of steps of mask training.
        mask_lr: the learning rate of mask training.
        mask_grad_clip: the bound on each element of the masks' gradient.
        norm_bound: what bounds the updates that are averaged, see :class:`SkyMask`: ``"median"``,
            or ``"none"``, with which only those beyond ten medians are shortened.
        mean: what the kept updates become, see :class:`SkyMask`.
        history: whether clients are remembered from round to round, see :class:`ClientHistory`.
    """

    solver: str = "auto"
    clustering: str = "signed"
    mask_steps: int = 20
    mask_lr: float = 1e7
    mask_grad_clip: float = 1e-7
    norm_bound: str = "none"
    mean: str = "kept"
    history: bool = True

    def __post_init__(self) -> None:
        one_of("defence.solver", self.solver, ("auto", *SOLVERS))
        one_of("defence.norm_bound", self.norm_bound, NORM_BOUND_NAMES)
        one_of("defence.mean", self.mean, MEANS)
        # What is out of range raises an error now, not after the first round.
        _ = self.training, self.clustering_config

    @property
    def training(self) -> MaskTraining:
        return MaskTraining(steps=self.mask_steps, lr=self.mask_lr, grad_clip=self.mask_grad_clip)

    @property
    def clustering_config(self) -> Clustering:
        return Clustering(rule=self.clustering)  # type: ignore[arg-type]  # checked by Clustering


@RULES.register("skymask", settings=SkyMaskSettings)
@needs_root_data
@takes_any_row
class SkyMaskRule:
    """SkyMask (Yan et al., ECCV 2024) with its root model trained like a client.

    It rejects rows with NaN and Inf itself.
    """

    def __init__(self, context: RuleContext, settings: SkyMaskSettings) -> None:
        self._defence = SkyMask(
            context.module,
            context.root_inputs,
            context.root_labels,
            training=settings.training,
            clustering=settings.clustering_config,
            root_training=context.root_training,
            norm_bound=NORM_BOUND_NAMES[settings.norm_bound],
            mean=settings.mean,  # type: ignore[arg-type]  # checked by the settings
            solver=settings.solver,
        )
        self._history = ClientHistory() if settings.history else None

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        result = self._defence.aggregate(
            updates_MP,
            global_params=info.global_params,
            root_update=info.root_update,
            client_ids=info.clients.tolist(),
            history=self._history,
        )
        return RuleResult(
            result.update,
            result.benign,
            record={
                "num_clusters": result.clusters.num_clusters,
                "verdict": result.verdict,
                "reason": result.clusters.reason,
                "solver": result.masks.solver,
                "mask_steps": result.masks.steps,
                "root_losses": result.masks.losses,
                **_witnesses(result),
                "positions": _positions(result),
            },
            seconds=result.seconds,
            tensors=lambda: _tensors(result, info.clients),
        )

    def state(self) -> dict[str, Tensor]:
        """What is remembered of the clients; empty without a history."""
        return {} if self._history is None else self._history.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        if self._history is not None:
            self._history = ClientHistory.from_state(state)


def _witnesses(result: Aggregation) -> dict[str, list[float | None]]:
    """Keep share and agreement of each client that takes part, in their order, with four decimals.

    A client whose update cannot be used has neither.
    """
    lists: dict[str, list[float | None]] = {}
    rows = result.clients.tolist()
    for name, values_K in (("keep_share", result.keep_share), ("agreement", result.agreement)):
        lists[name] = [None] * len(result.benign)
        for row, value in zip(rows, values_K.tolist(), strict=True):
            lists[name][row] = round(value, 4)
    return lists


def _positions(result: Aggregation) -> list[list[float] | None]:
    """Where each participating client's mask lies in two principal components; the root's is last.

    Four digits are enough for a picture. A client without a mask has no position.
    """
    positions: list[list[float] | None] = [None] * len(result.benign)
    *scores, root = [[float(f"{value:.4g}") for value in point] for point in result.clusters.scores.tolist()]
    for row, point in zip(result.clients.tolist(), scores, strict=True):
        positions[row] = point
    return [*positions, root]


def _tensors(result: Aggregation, clients_M: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, a row per client that has a mask; scores have the root's row last."""
    evidence = result.evidence()
    tensors = {
        "evidence": evidence.shares,
        "keep_share": result.keep_share,
        "agreement": result.agreement,
        "clients": clients_M[result.clients.cpu()],
        "scores": result.clusters.scores,
        "benign": result.clusters.benign,
    }
    return tensors, {"layers": json.dumps(evidence.layers)}
