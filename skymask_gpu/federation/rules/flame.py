"""FLAME: clusters models by their angles, clips the majority's updates and adds noise."""

import torch
from torch import Tensor

from skymask_gpu.federation.rules.clustering import hdbscan_labels
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult
from skymask_gpu.federation.rules.rows import clipped_mean, cosine_distances, inner_products, row_norms

__all__ = ["flame"]

_NOISE_FACTOR = 0.001


@RULES.register("flame")
def flame(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """FLAME (Nguyen et al., USENIX Security 2022, algorithm 1).

    HDBSCAN on the cosine distances of the local models (not of the updates) finds the one cluster
    of more than half of the n clients: min_cluster_size n // 2 + 1, min_samples 1, a single cluster
    allowed. With S the median length of all updates, the cluster's updates are clipped to length S
    and averaged, and noise of standard deviation lambda * S is added to each parameter; lambda =
    0.001, the paper's for image classification. The noise is drawn from ``info.generator``.

    This noise is the paper's own, as printed. Its length is about lambda * S * sqrt(P), so it grows
    with the model: it is 0.37 S with the 139,960 parameters of the paper's CNN, and 3.3 S with the
    11 million of ResNet-18, where it drowns the updates. Dividing the deviation by sqrt(P)
    would make the length lambda * S for every model; this is not done here.
    """
    distances_MM = cosine_distances(inner_products(updates_MP, info.global_params))
    labels_M = hdbscan_labels(
        distances_MM, min_cluster_size=max(2, len(updates_MP) // 2 + 1), min_samples=1, allow_single_cluster=True
    )
    kept_M = labels_M >= 0
    norms_M = row_norms(updates_MP)
    bound = norms_M.quantile(0.5)
    noise_P = torch.randn(updates_MP.shape[1], generator=info.generator).to(updates_MP)
    update_P = clipped_mean(updates_MP, kept_M, norms_M, bound) + _NOISE_FACTOR * bound.to(updates_MP.dtype) * noise_P
    return RuleResult(update_P, kept_M)
