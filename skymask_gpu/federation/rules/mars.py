"""MARS: clusters models by the Lipschitz constants of their neurons, which a backdoor raises."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero, positive_share
from skymask_gpu.federation.rules.clustering import two_means
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.federation.rules.layers import Layers
from skymask_gpu.federation.rules.rows import mean_of_kept

__all__ = ["Mars", "MarsSettings"]

# A layer's models are made in float64 for as many clients at once as have this many parameters.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class MarsSettings:
    """Settings of ``mars``.

    Attributes:
        energy_share: the share of each layer's neurons, those with the highest backdoor energies,
            that describe a model; kappa.
        cluster_distance: if the two clusters are nearer to each other than this Wasserstein
            distance, everyone is kept; epsilon. It is in the units of the model's weights.
    """

    energy_share: float = 0.05
    cluster_distance: float = 0.03

    def __post_init__(self) -> None:
        positive_share("defence.energy_share", self.energy_share)
        above_zero("defence.cluster_distance", self.cluster_distance)


@RULES.register("mars", settings=MarsSettings)
class Mars:
    """MARS (Wan et al., NeurIPS 2025, arXiv 2509.20383, algorithm 1).

    * The backdoor energy of a neuron is the Lipschitz constant of its own layer alone: the norm of
      its weights in a linear layer, the largest singular value of its weights, as a matrix (inputs,
      window), in a convolution, and |gamma| in a normalisation layer.
    * A model's concentrated backdoor energy (CBE) is the list of the kappa percent highest energies
      of each layer, at least one of each.
    * The CBEs are divided into two clusters by k-means with Wasserstein's distance, which for lists
      of E numbers is the mean of |a_(e) - b_(e)| over the sorted values. A centre is the mean of
      the CBEs as they are, the highest value of each layer first.
    * If the centres are nearer than epsilon, everyone is kept, and else the cluster whose centre
      has the smaller sum, be it the smaller cluster or not. The kept models are averaged.

    Where the paper leaves room: k-means starts from the two CBEs that are furthest apart. A neuron
    is an index of the first dimension of a parameter of two or more dimensions, or of one named
    ``weight`` of one dimension; biases have no energy. The paper divides gamma by the running
    deviation of batch norm, which is no part of an update; it is taken as 1 here. Kappa percent of
    a layer is rounded to the nearest number.

    Raises:
        ValueError: the model has no such parameter, or other parameters than the updates.
    """

    def __init__(self, context: RuleContext, settings: MarsSettings) -> None:
        self._layers, self._settings = Layers.of(context.module, "mars"), settings
        if not any(_has_energy(name, shape) for name, shape in self._layers.shapes.items()):
            got = ", ".join(f"{name} {tuple(shape)}" for name, shape in self._layers.shapes.items())
            raise ValueError(
                "defence.rule 'mars' needs a model with a weight, whose rows are the neurons that have a Lipschitz constant, "
                f"got {got} as its parameters; use another rule"
            )

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        kept_M = _trusted(self._energies(updates_MP, info.global_params), self._settings.cluster_distance)
        return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)

    def _energies(self, updates_MP: Tensor, global_params_P: Tensor) -> Tensor:
        """The concentrated backdoor energy of each client's model, ``(M, E)`` float64."""
        starts = dict(self._layers.parameters(global_params_P[None]))
        highest = []
        for name, part_Mp in self._layers.parameters(updates_MP):
            shape = self._layers.shapes[name]
            if not _has_energy(name, shape):
                continue
            num_highest = max(1, round(self._settings.energy_share * shape[0]))
            blocks = part_Mp.split(max(1, _BLOCK_ELEMENTS // part_Mp.shape[1]))
            weights = ((block.double() + starts[name]).unflatten(1, shape) for block in blocks)
            highest.append(torch.cat([_lipschitz(block).topk(num_highest).values for block in weights]))
        return torch.cat(highest, 1)


def _has_energy(name: str, shape: torch.Size) -> bool:
    return shape.numel() > 0 and (len(shape) >= 2 or (len(shape) == 1 and name.rpartition(".")[2] == "weight"))


def _lipschitz(weights: Tensor) -> Tensor:
    """The Lipschitz constant of each neuron, ``(m, neurons, ...) -> (m, neurons)``."""
    if weights.dim() == 2:
        return weights.abs()
    if weights.dim() == 3:
        return torch.linalg.vector_norm(weights, dim=2)
    matrices = weights.flatten(3)
    matrices = matrices if matrices.shape[2] <= matrices.shape[3] else matrices.mT
    # The squared singular values are the eigenvalues of the smaller one of A A^T and A^T A.
    return torch.linalg.eigvalsh(matrices @ matrices.mT)[..., -1].clamp_min(0).sqrt()


def _trusted(energies_ME: Tensor, cluster_distance: float) -> Tensor:
    """The clients in the cluster with the lower energies, or everyone, ``(M,)`` bool."""
    second_M = two_means(energies_ME, _wasserstein)
    everyone_M = torch.ones_like(second_M)
    if not second_M.any():
        return everyone_M
    centres_2E = torch.stack([energies_ME[~second_M].mean(0), energies_ME[second_M].mean(0)])
    if _wasserstein(centres_2E[:1], centres_2E[1:]) < cluster_distance:
        return everyone_M
    first, second = centres_2E.sum(1)
    return ~second_M if first < second else second_M


def _wasserstein(values_ME: Tensor, others_CE: Tensor) -> Tensor:
    """Wasserstein's distance of each two lists of E numbers, ``(M, C)``."""
    return torch.cdist(values_ME.sort(1).values, others_CE.sort(1).values, p=1) / values_ME.shape[1]
