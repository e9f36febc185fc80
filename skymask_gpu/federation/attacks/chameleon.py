"""Chameleon: a durable backdoor by contrastive learning."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.federation.attacks.data import Backdoor, PixelBackdoor
from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.attacks.lab import Lab
from skymask_gpu.federation.choices import above_zero
from skymask_gpu.federation.clients import draw_batches

__all__ = ["Chameleon", "contrast"]


@dataclass(frozen=True, kw_only=True)
class Chameleon(Backdoor):
    """Settings of ``chameleon``.

    Attributes:
        temperature: the temperature of the contrastive loss.
        target_weight: the weight of the target class's samples in this loss.
    """

    temperature: float = 0.07
    target_weight: float = 2.0

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        above_zero("attack.temperature", self.temperature)
        above_zero("attack.target_weight", self.target_weight)


@ATTACKS.register("chameleon", settings=Chameleon)
class AdaptToPeers(Attack):
    """Chameleon (Dai & Li, ICML 2023, arXiv 2304.12961).

    Each malicious client trains from the global model in two stages, on batches of its own samples,
    a share of which carries the trigger and the target class:

    1. The encoder, all parameters but those of the last layer, learns by the contrastive loss of
       :func:`contrast`. Poisoned samples come close to their peers of the target class, and part
       from those of the class that they are taken from. These would otherwise wipe the backdoor out
       once the attackers have left.
    2. The last layer learns by cross-entropy, while the encoder stays.

    Each stage has the clients' number of steps, learning rate and clip, without momentum and weight
    decay; the paper trains the encoder longer, with a schedule of its own. Who takes part in the
    contrast is not chosen: these are all samples of the batch. The attack needs the malicious
    clients' own samples and the global model.

    Raises:
        ValueError: the data carry no trigger, there is no run, on whose samples models are trained,
            or the model has no layer before the last one.
    """

    def __init__(self, context: AttackContext, settings: Chameleon) -> None:
        self._backdoor = PixelBackdoor(context, settings)
        self._settings, self._layers, self._lab = settings, context.layers, context.lab
        self.target_class = settings.target_class

    def trigger(self, inputs: Tensor) -> Tensor:
        return self._backdoor.trigger(inputs)

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        lab, start_P = self._lab, threat.global_params
        if lab is None or start_P is None or threat.clients is None:
            raise ValueError("attack.name 'chameleon' trains models on the attackers' samples, which only a run has")
        entered = lab.inside(start_P, lab.inputs[:1], threat.buffers)[1]
        if len(entered) < 2:
            raise ValueError("attack.name 'chameleon' needs a layer before the last one; use another model or 'neurotoxin'")
        last = list(entered)[-1]
        is_last_P = torch.zeros(len(start_P), dtype=torch.bool, device=start_P.device)
        for name in (f"{last}.weight", f"{last}.bias"):
            is_last_P[self._layers.get(name, slice(0))] = True

        def to_peers(outputs: Tensor, features: Tensor, labels: Tensor) -> Tensor:
            own = self._settings
            return contrast(features.flatten(1), labels, own.temperature, own.target_class, own.target_weight)

        def to_classes(outputs: Tensor, features: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(outputs, labels)

        rows = []
        for client in threat.clients[malicious_N.to(threat.clients.device)].tolist():
            params_P = start_P
            for loss, trained_P in ((to_peers, ~is_last_P), (to_classes, is_last_P)):
                params_P = self._descended(lab, params_P, client, last, loss, trained_P, threat)
            rows.append(params_P - start_P)
        return torch.stack(rows).to(updates_NP.dtype)

    def _descended(
        self,
        lab: Lab,
        params_P: Tensor,
        client: int,
        last: str,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        trained_P: Tensor,
        threat: Threat,
    ) -> Tensor:
        """The parameters after steps on a loss of outputs, features and labels, ``(P,)``."""
        batches = draw_batches([lab.samples_of([client])], lab.recipe, threat.generator)
        for index_B in batches.index_CSB[0, : int(batches.steps_C[0])].to(lab.inputs.device):
            inputs, labels = self._backdoor.poison(lab.inputs[index_B], lab.labels[index_B])
            leaf_P = params_P.clone().requires_grad_()
            outputs, entered = lab.inside(leaf_P, inputs, threat.buffers, training=True)
            (gradient_P,) = torch.autograd.grad(loss(outputs, entered[last], labels), leaf_P)
            step_P = gradient_P.clamp(-lab.recipe.grad_clip, lab.recipe.grad_clip)
            params_P = torch.where(trained_P, params_P - lab.recipe.lr * step_P, params_P)
        return params_P


def contrast(features_BD: Tensor, labels_B: Tensor, temperature: float, target_class: int, target_weight: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al., NeurIPS 2020), ``()``.

    With features z scaled to length 1 and the temperature T, the loss of a sample is the mean over
    the other samples p of its class of

        -log (exp(z . z_p / T) / sum over all other samples a of exp(z . z_a / T)),

    and 0 if there is no other one. The mean over samples weighs those of the target class by
    ``target_weight``.

    Args:
        features_BD: ``(B, D)``.
        labels_B: ``(B,)`` int64.
        temperature: above 0; the smaller, the more the nearest samples count.
        target_class: the class with another weight.
        target_weight: its weight; other classes have 1.
    """
    unit_BD = F.normalize(features_BD, dim=1)
    similar_BB = unit_BD @ unit_BD.T / temperature
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    others_BB = similar_BB.masked_fill(itself_BB, torch.finfo(similar_BB.dtype).min)
    peers_BB = (labels_B[:, None] == labels_B) & ~itself_BB
    log_shares_BB = torch.where(peers_BB, similar_BB - others_BB.logsumexp(1, keepdim=True), 0)
    losses_B = -log_shares_BB.sum(1) / peers_BB.sum(1).clamp_min(1)
    return torch.where(labels_B == target_class, target_weight * losses_B, losses_B).mean()
