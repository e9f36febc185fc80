"""The defence of Tolpegin et al., which looks at principal components of the last layer's updates.

Malicious clients stand apart from the others there.
"""

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules.clustering import best_cut
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data
from skymask_gpu.federation.rules.last_layer import LastLayer
from skymask_gpu.federation.rules.rows import inner_products, mean_of_kept

__all__ = ["Tolpegin"]


@RULES.register("tolpegin")
@needs_root_data
class Tolpegin:
    """The defence of Tolpegin et al. (ESORICS 2020), with a verdict in place of a look at the plot.

    The updates of the last layer are standardised, which gives each parameter mean 0 and variance 1
    over the clients. Then their first two principal components are computed. The paper plots these
    for one source class over several rounds and leaves the verdict to the reader. Here, as in
    published comparisons, the components are those of the whole layer in one round. k-means divides
    the clients into two clusters by them, and the larger cluster is averaged. k-means always makes
    two clusters, so the rule also rejects clients when nobody attacks. It keeps all clients if
    there are fewer than three, if all are equal, or if the clusters are equally large.

    k-means starts from the best cut along the first component, so it needs no random numbers.

    Raises:
        ValueError: the model's last layer has no weight or no bias.
    """

    def __init__(self, context: RuleContext) -> None:
        self._layer = LastLayer.of(FlatModel(context.module, context.root_inputs, context.root_labels), "tolpegin")

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        kept_M = _larger_cluster(_principal_scores(self._layer.both(updates_MP)))
        return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)


def _principal_scores(layer_ML: Tensor) -> Tensor:
    """The first two principal component scores of the standardised columns, ``(M, 2)`` float64.

    There are fewer columns if there are fewer rows.
    """
    values_ML = layer_ML.double()
    centred_ML = values_ML - values_ML.mean(0)
    deviation_L = centred_ML.square().mean(0).sqrt()
    standard_ML = centred_ML / torch.where(deviation_L > 0, deviation_L, 1)
    values, vectors_MM = torch.linalg.eigh(inner_products(standard_ML))
    return (vectors_MM * values.clamp_min(0).sqrt())[:, -2:].flip(1)


def _larger_cluster(scores_M2: Tensor) -> Tensor:
    """Which clients are in the larger of two clusters, ``(M,)`` bool."""
    from sklearn.cluster import KMeans

    everyone_M = torch.ones(len(scores_M2), dtype=torch.bool, device=scores_M2.device)
    if len(scores_M2) < 3 or not scores_M2.any():
        return everyone_M
    upper_M = best_cut(scores_M2[:, 0][None])[0][0]
    centres = torch.stack([scores_M2[~upper_M].mean(0), scores_M2[upper_M].mean(0)])
    clusters = KMeans(n_clusters=2, init=centres.cpu().numpy(), n_init=1).fit_predict(scores_M2.cpu().numpy())
    upper_M = torch.from_numpy(clusters).to(scores_M2.device) == 1
    num_upper, num_lower = int(upper_M.sum()), int((~upper_M).sum())
    if num_upper == num_lower:
        return everyone_M
    return upper_M if num_upper > num_lower else ~upper_M
