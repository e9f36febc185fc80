"""DeepSight: estimates what data a client's model was trained on, and clusters similar models."""

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules.clustering import hdbscan_labels
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data
from skymask_gpu.federation.rules.last_layer import LastLayer
from skymask_gpu.federation.rules.rows import clipped_mean, cosine_distances, inner_products, row_norms

__all__ = ["DeepSight"]

_INPUT_SETS = 3
# The number of random inputs per set; the paper takes 20,000.
_INPUTS = 256
# The paper's tau: a cluster is kept if less than this share of its clients is suspicious.
_SHARE = 1 / 3
# HDBSCAN's min_cluster_size and min_samples; 5 is the default of the hdbscan package.
_CLUSTER = 5
_LARGEST_LOG_RATIO = 60.0


@RULES.register("deepsight")
@needs_root_data
class DeepSight:
    """DeepSight (Rieger et al., NDSS 2022).

    With C classes, G the global model and k a client, for the last layer's weights w and biases b:

    * energy of class i: E_ki = |b_ki - b_Gi| + sum_h |w_kih - w_Gih|; NEUP: C_ki = E_ki^2 / sum_j
      E_kj^2.
    * threshold exceedings: TE_k = the number of classes with C_ki > max(0.01, 1 / C) max_j C_kj. A
      client is suspicious if TE_k <= median(TE) / 2: it was trained on few classes.
    * DDifs: the mean over random inputs of the ratio of the probabilities that k and G give a
      class; for three sets of inputs.
    * cosine distance of the biases' updates.

    HDBSCAN clusters the clients by their cosine distances, by their NEUPs and by the DDifs of each
    set. Two clients are at distance 0 in a clustering if they are in the same cluster, else at 1.
    The mean of the three kinds, of which the DDifs' is the mean of its sets', is clustered by
    HDBSCAN again. A cluster is accepted if less than a third (tau) of it is suspicious. Accepted
    updates are clipped to the median length of all updates and averaged; if there is none, the
    update is zero.

    Where the paper leaves room: inputs are uniform in [0, 1) (integer ones uniform up to the
    largest in the root data), 256 a set instead of 20,000 and the same in every round; HDBSCAN has
    the defaults of the hdbscan package (5 and 5); a client that is noise is a cluster of its own.

    Raises:
        ValueError: the model's last layer has no weight or no bias.
    """

    def __init__(self, context: RuleContext) -> None:
        inputs = _random_inputs(context)
        labels = context.root_labels[:1].expand(len(inputs), *context.root_labels.shape[1:])
        self._log_probabilities = FlatModel(context.module, inputs, labels, loss_fn=_log_softmax)
        self._layer = LastLayer.of(self._log_probabilities, "deepsight")

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        neups_MC = _neups(self._layer, updates_MP)
        biases_MC = self._layer.bias(updates_MP)
        by_ddifs = [_apart(_euclidean(ddifs_MC)) for ddifs_MC in self._ddifs(updates_MP, info.global_params)]
        by_neups = _apart(_euclidean(neups_MC))
        by_cosine = _apart(cosine_distances(inner_products(biases_MC)))
        merged_MM = torch.stack([torch.stack(by_ddifs).mean(0), by_neups, by_cosine]).mean(0)
        kept_M = _accepted(_clusters(merged_MM), _suspicious(neups_MC))
        norms_M = row_norms(updates_MP)
        return RuleResult(clipped_mean(updates_MP, kept_M, norms_M, norms_M.quantile(0.5)), kept_M)

    @torch.no_grad()
    def _ddifs(self, updates_MP: Tensor, global_params_P: Tensor) -> Tensor:
        """The DDifs, ``(sets, M, outputs)`` float64; ratios are limited to exp(-60) to exp(60)."""
        log_probabilities = self._log_probabilities.to(updates_MP.device)
        before = log_probabilities(global_params_P)
        ddifs = []
        for update_P in updates_MP:
            log_ratio = (log_probabilities(global_params_P + update_P) - before).double()
            ratio = log_ratio.nan_to_num().clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
            ddifs.append(ratio.flatten(1).unflatten(0, (_INPUT_SETS, _INPUTS)).mean(1))
        return torch.stack(ddifs, 1)


def _random_inputs(context: RuleContext) -> Tensor:
    generator = torch.Generator().manual_seed(context.seed)
    root_inputs = context.root_inputs
    shape = (_INPUT_SETS * _INPUTS, *root_inputs.shape[1:])
    if root_inputs.is_floating_point():
        return torch.rand(shape, generator=generator).to(root_inputs)
    return torch.randint(int(root_inputs.max()) + 1, shape, generator=generator).to(root_inputs)


def _log_softmax(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.log_softmax(1)


def _neups(layer: LastLayer, updates_MP: Tensor) -> Tensor:
    """The NEUPs, ``(M, C)`` float64. Rows sum to 1; they are 0 if the layer did not change."""
    energy_MC = layer.bias(updates_MP).double().abs() + layer.weight(updates_MP).double().abs().sum(2)
    squares_MC = energy_MC.square()
    return squares_MC / squares_MC.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _suspicious(neups_MC: Tensor) -> Tensor:
    """``(M,)`` bool."""
    threshold_M1 = max(0.01, 1 / neups_MC.shape[1]) * neups_MC.amax(1, keepdim=True)
    exceedings_M = (neups_MC > threshold_M1).sum(1).double()
    return exceedings_M <= exceedings_M.quantile(0.5) / 2


def _clusters(distances_MM: Tensor) -> Tensor:
    """The cluster of each client, ``(M,)`` int64; a client that is noise has one of its own."""
    labels_M = hdbscan_labels(distances_MM, min_cluster_size=_CLUSTER, min_samples=_CLUSTER)
    own_M = torch.arange(len(labels_M), device=labels_M.device) + len(labels_M)
    return torch.where(labels_M >= 0, labels_M, own_M)


def _euclidean(values_MC: Tensor) -> Tensor:
    """Distances ``(M, M)``, computed from differences, so that equal rows are at exactly 0."""
    return torch.cdist(values_MC, values_MC, compute_mode="donot_use_mm_for_euclid_dist")


def _apart(distances_MM: Tensor) -> Tensor:
    """0 for two clients in the same cluster and 1 for all others, ``(M, M)`` float64."""
    clusters_M = _clusters(distances_MM)
    return (clusters_M[:, None] != clusters_M).double()


def _accepted(clusters_M: Tensor, suspicious_M: Tensor) -> Tensor:
    """``(M,)`` bool."""
    same_MM = clusters_M[:, None] == clusters_M
    return (same_MM & suspicious_M).sum(1) < _SHARE * same_MM.sum(1)
