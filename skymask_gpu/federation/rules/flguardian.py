"""FLGuardian: a client's trust is the weight of the layers in which it is in both majorities."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero
from skymask_gpu.federation.rules.clustering import two_means
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.federation.rules.layers import Layers
from skymask_gpu.federation.rules.rows import cosine_distances, inner_products, mean_of_kept

__all__ = ["FLGuardian", "FLGuardianSettings"]

# Squared distances below this share of the two squared lengths come from rounding.
_ROUNDING = 1e-13

_euclidean = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True, kw_only=True)
class FLGuardianSettings:
    """Settings of ``flguardian``.

    Attributes:
        depth_weight: a layer weighs this many times as much as the one before it; beta.
    """

    depth_weight: float = 2.0

    def __post_init__(self) -> None:
        above_zero("defence.depth_weight", self.depth_weight)


@RULES.register("flguardian", settings=FLGuardianSettings)
class FLGuardian:
    """FLGuardian (Zhou et al., IEEE TIFS 2025).

    In each layer, the clients are divided into two clusters by their cosine distances to each
    other, and again by their Euclidean distances. Who is in the larger cluster both times is benign
    in this layer. The trust of a client is the sum of beta^l over the layers l = 1, ..., L in which
    it is benign, so that deeper layers weigh more. The mean of the k clients with the highest trust
    is the result.

    Where the accounts of the paper that we have read leave room: k-means clusters the rows of the
    distance matrix, from the two rows that are furthest apart. If both clusters are equally large,
    or all rows are equal, all clients are in the larger one. k is n - f. Clients who tie for the
    last of these places with others who would get none are not kept, unless nobody has a higher
    trust; then all of them are. A layer is a module with its weight and its bias.

    Raises:
        ValueError: the model has no parameters, or others than the updates.
    """

    def __init__(self, context: RuleContext, settings: FLGuardianSettings) -> None:
        self._layers, self._depth_weight = Layers.of(context.module, "flguardian"), settings.depth_weight

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        trust_M = self._trust(updates_MP)
        kept_M = _most_trusted(trust_M, max(1, len(updates_MP) - info.num_malicious))
        return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)

    def _trust(self, updates_MP: Tensor) -> Tensor:
        """The trust of each client as a share of what all layers give, ``(M,)`` float64."""
        layers = self._layers.modules(updates_MP)
        # The deepest layer weighs 1, so that no power of beta is too large for a float.
        weights = [self._depth_weight ** (depth - len(layers)) for depth in range(1, len(layers) + 1)]
        trust_M = updates_MP.new_zeros(len(updates_MP), dtype=torch.float64)
        for weight, part_Mp in zip(weights, layers, strict=True):
            by_angle_MM, by_length_MM = _distances(part_Mp)
            trust_M += weight * (_larger_cluster(by_angle_MM) & _larger_cluster(by_length_MM))
        return trust_M / sum(weights)


def _distances(part_Mp: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine and the Euclidean distances of each two clients in a layer, ``(M, M)`` float64."""
    products_MM = inner_products(part_Mp)
    squares_M = products_MM.diagonal()
    both_MM = squares_M[:, None] + squares_M
    squared_MM = both_MM - 2 * products_MM
    return cosine_distances(products_MM), torch.where(squared_MM > _ROUNDING * both_MM, squared_MM, 0).sqrt()


def _most_trusted(trust_M: Tensor, num_kept: int) -> Tensor:
    """The clients with the highest trust, ``(M,)`` bool."""
    if num_kept >= len(trust_M):
        return torch.ones_like(trust_M, dtype=torch.bool)
    kept_M = trust_M > trust_M.sort(descending=True).values[num_kept]
    return kept_M if kept_M.any() else trust_M == trust_M.max()


def _larger_cluster(distances_MM: Tensor) -> Tensor:
    """Who is in the larger of two clusters of the rows, ``(M,)`` bool; everyone in a tie."""
    second_M = two_means(distances_MM, _euclidean)
    num_second, num_first = int(second_M.sum()), int((~second_M).sum())
    if num_first == num_second:
        return torch.ones_like(second_M)
    return second_M if num_second > num_first else ~second_M
