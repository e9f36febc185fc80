"""Nearest-neighbour mixing, bucketing and FoundationFL, which prepare updates for another rule.

The first two mix the updates, the third one adds some.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.choices import Choice, Choices, above_zero
from skymask_gpu.federation.rules.building import build_rule
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, uses_root_data
from skymask_gpu.federation.rules.rows import squared_distances, squared_distances_to

__all__ = [
    "BaseRule",
    "Bucketing",
    "BucketingSettings",
    "Foundation",
    "FoundationFL",
    "Mixing",
    "NearestNeighbourMixing",
    "base_rule_names",
]

# The rules that FoundationFL strengthens.
_FOUNDATIONS = ("trimmed-mean", "median")


def base_rule_names() -> list[str]:
    """The rules that can be wrapped: those that remember nothing and wrap no other rule."""
    return [name for name, entry in RULES.items() if not hasattr(entry, "state") and not hasattr(entry, "mixes_rows")]


@dataclass(frozen=True, kw_only=True)
class BaseRule(Choice):
    """``defence.base``: the rule that aggregates what was mixed, a name or a table with settings.

    Attributes:
        name: one of :func:`base_rule_names`.
        settings: the rule's own keys; None means their defaults.
    """

    registry: ClassVar[Choices] = RULES
    table: ClassVar[str] = "defence.base"

    name: str = "trimmed-mean"

    @classmethod
    def check_name(cls, name: object) -> None:
        one_of("defence.base", name, base_rule_names())


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Settings of ``nnm``.

    Attributes:
        base: the rule that aggregates the mixed updates.
    """

    base: BaseRule = field(default_factory=BaseRule)


@dataclass(frozen=True, kw_only=True)
class BucketingSettings:
    """Settings of ``bucketing``.

    Attributes:
        bucket_size: the number of clients in a bucket, s in the paper; the last bucket may have
            fewer.
        base: the rule that aggregates the buckets' means.
    """

    bucket_size: int = 2
    base: BaseRule = field(default_factory=BaseRule)

    def __post_init__(self) -> None:
        if self.bucket_size < 1:
            raise ValueError(f"defence.bucket_size must be at least 1, got {self.bucket_size!r}")


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """Settings of ``foundation-fl``.

    Attributes:
        synthetic: the number of synthetic updates per client, m / n in the paper.
        base: ``"trimmed-mean"`` or ``"median"``.
    """

    synthetic: float = 0.5
    base: BaseRule = field(default_factory=BaseRule)

    def __post_init__(self) -> None:
        above_zero("defence.synthetic", self.synthetic)
        one_of("defence.base", self.base.name, _FOUNDATIONS)


class _Before:
    """A rule that mixes the rows and gives the mixed ones to its base rule.

    Raises:
        ValueError: the base rule needs the server's samples, and there are none.
    """

    mixes_rows = True

    def __init__(self, context: RuleContext, settings: Mixing | BucketingSettings | Foundation) -> None:
        base = settings.base
        if uses_root_data(base.name) and len(context.root_inputs) == 0:
            raise ValueError(f"defence.base {base.name!r} needs the server's samples, got none; use another base rule")
        self._base = build_rule(base.name, context, base.settings)


@RULES.register("nnm", settings=Mixing)
class NearestNeighbourMixing(_Before):
    """Nearest-neighbour mixing, NNM (Allouah et al., AISTATS 2023).

    Each update is replaced by the mean of the n - f updates that are nearest to it, itself
    included. The base rule then aggregates the n means, with the same f. If updates are equally
    near, the first ones are taken. A mean of many clients is nobody's own, so no client is judged.
    """

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        num_near = max(1, len(updates_MP) - info.num_malicious)
        # The distance -1 puts a row itself before the rows that equal it.
        nearest = squared_distances(updates_MP).fill_diagonal_(-1).argsort(dim=1, stable=True)[:, :num_near]
        mixed_MP = torch.empty_like(updates_MP)
        for row, near in enumerate(nearest):
            mixed_MP[row] = updates_MP[near].mean(0)
        return dataclasses.replace(self._base(mixed_MP, info), kept=None, tensors=None)


@RULES.register("bucketing", settings=BucketingSettings)
class Bucketing(_Before):
    """Bucketing (Karimireddy, He & Jaggi, ICLR 2022).

    The clients are shuffled and divided into buckets of s, and the base rule aggregates the
    buckets' means. Up to f buckets hold an attacker, so the base rule assumes the same f, but at
    most half of the buckets. A base rule that rejects buckets rejects all clients in them. The
    clients' numbers mean nothing to the base rule here; it gets those of the first in each bucket.
    """

    def __init__(self, context: RuleContext, settings: BucketingSettings) -> None:
        super().__init__(context, settings)
        self._size = settings.bucket_size

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        order_M = torch.randperm(len(updates_MP), generator=info.generator)
        buckets = order_M.split(self._size)
        means_BP = torch.stack([updates_MP[bucket.to(updates_MP.device)].mean(0) for bucket in buckets])
        clients_B = info.clients[torch.stack([bucket[0] for bucket in buckets]).to(info.clients.device)]
        num_malicious = min(info.num_malicious, (len(buckets) - 1) // 2)
        result = self._base(means_BP, dataclasses.replace(info, clients=clients_B, num_malicious=num_malicious))
        if result.kept is None:
            return dataclasses.replace(result, tensors=None)
        kept_M = torch.zeros(len(updates_MP), dtype=torch.bool, device=updates_MP.device)
        for bucket, kept in zip(buckets, result.kept, strict=True):
            kept_M[bucket.to(updates_MP.device)] = kept
        return dataclasses.replace(result, kept=kept_M, tensors=None)


@RULES.register("foundation-fl", settings=Foundation)
class FoundationFL(_Before):
    """FoundationFL (Fang et al., NDSS 2025, arXiv 2501.17381).

    Let a and b be the largest and the smallest value of each parameter among the clients. A
    client's score is min(|u - a|, |u - b|), and u* the update with the largest score, which is
    furthest from both extremes. The base rule, the trimmed mean or the median, then aggregates the
    n updates together with m copies of u*, with the same f. As these rules do, it judges nobody.
    Attackers at opposite extremes are far from the other's one: then u* may be an attacker's.
    """

    def __init__(self, context: RuleContext, settings: Foundation) -> None:
        super().__init__(context, settings)
        self._synthetic = settings.synthetic

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        extremes = (updates_MP.amax(0), updates_MP.amin(0))
        scores_M = torch.minimum(*(squared_distances_to(updates_MP, extreme_P) for extreme_P in extremes))
        chosen = scores_M.argmax()
        num_rows, num_copies = len(updates_MP), round(self._synthetic * len(updates_MP))
        # Both base rules treat each parameter by itself, so parts of the columns save memory.
        parts = updates_MP.split(max(1, updates_MP.shape[1] * num_rows // (num_rows + num_copies)), dim=1)
        steps = [self._base(torch.cat([part, part[chosen].expand(num_copies, -1)]), info).update for part in parts]
        return RuleResult(torch.cat(steps), None)
