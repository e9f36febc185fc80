"""Layer-wise poisoning: a backdoor in the few layers that it needs, honest training elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.data import Backdoor, PixelBackdoor
from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.choices import above_zero, positive_share

__all__ = ["LayerwisePoisoning", "critical_layers"]

# The samples on which a client measures its backdoor. More would only make the rates finer.
_MOST_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class LayerwisePoisoning(Backdoor):
    """Settings of ``lp``.

    Attributes:
        factor: the critical layers' updates are multiplied by this, lambda in the paper.
        enough: the critical layers are those that together give an honest model this share of the
            poisoned one's success, tau in the paper.
    """

    factor: float = 1.0
    enough: float = 0.95

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        above_zero("attack.factor", self.factor)
        positive_share("attack.enough", self.enough)


@ATTACKS.register("lp", settings=LayerwisePoisoning)
class PoisonCriticalLayers(Attack):
    """Layer-wise poisoning, LP (Zhuang et al., ICLR 2024).

    Each malicious client trains a benign model B as honest clients do, and from it a model M on
    batches with the trigger. Then, by the success of the backdoor on its own samples:

    1. Each layer of M is replaced by B's. The layers are sorted by how much the success drops.
    2. In this order, M's layers are put into B until the success is at least tau times M's. These
       are the critical layers.

    It sends B's update, but in the critical layers lambda times M's. A layer is a parameter tensor.
    The paper also mixes estimates of other clients' benign updates into the critical layers if
    lambda is below 1; this is not done here.

    Raises:
        ValueError: the data carry no trigger, or there is no run, on whose samples M is trained.
    """

    def __init__(self, context: AttackContext, settings: LayerwisePoisoning) -> None:
        self._backdoor = PixelBackdoor(context, settings)
        self._settings, self._layers, self._lab = settings, context.layers, context.lab
        self.target_class = settings.target_class

    def trigger(self, inputs: Tensor) -> Tensor:
        return self._backdoor.trigger(inputs)

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        if self._lab is None or threat.global_params is None or threat.clients is None:
            raise ValueError("attack.name 'lp' trains models on the attackers' samples, which only a run has")
        clients = threat.clients[malicious_N.to(threat.clients.device)].tolist()
        rows = [self._row(benign_P, client, threat) for benign_P, client in zip(updates_NP[malicious_N], clients, strict=True)]
        return torch.stack(rows)

    def _row(self, benign_P: Tensor, client: int, threat: Threat) -> Tensor:
        lab, start_P = self._lab, threat.global_params
        assert lab is not None
        assert start_P is not None
        samples = lab.samples_of([client])
        honest_P = start_P + benign_P.to(start_P)
        poisoned_P = lab.train(honest_P, samples, self._backdoor.poison_of, threat.generator, threat.buffers)
        labels = lab.labels[samples.to(lab.labels.device)]
        others = samples.to(labels.device)[labels != self.target_class]
        chosen = (others if len(others) else samples)[:_MOST_SAMPLES]
        triggered = self.trigger(lab.inputs[chosen.to(lab.inputs.device)])

        def success(params_P: Tensor) -> float:
            hits = lab.predictions(params_P, triggered, threat.buffers).eq(self._settings.target_class)
            return int(hits.sum()) / len(hits)

        sent_P = benign_P.clone()
        for name in critical_layers(honest_P, poisoned_P, self._layers, success, self._settings.enough):
            columns = self._layers[name]
            sent_P[columns] = (self._settings.factor * (poisoned_P - start_P)[columns]).to(sent_P.dtype)
        return sent_P


def critical_layers(
    benign_P: Tensor,
    poisoned_P: Tensor,
    layers: Mapping[str, slice],
    success: Callable[[Tensor], float],
    enough: float,
) -> list[str]:
    """The names of the layers that a backdoor needs, the most critical one first.

    Args:
        benign_P: ``(P,)``, the parameters of the benign model.
        poisoned_P: ``(P,)``, those of the poisoned one.
        layers: the columns of each layer by its name.
        success: the success of the backdoor in a model with the parameters ``(P,)``.
        enough: the share of the poisoned model's success that is to be reached.
    """

    def replaced(into_P: Tensor, from_P: Tensor, names: list[str]) -> Tensor:
        mixed_P = into_P.clone()
        for name in names:
            mixed_P[layers[name]] = from_P[layers[name]]
        return mixed_P

    whole = success(poisoned_P)
    left = {name: success(replaced(poisoned_P, benign_P, [name])) for name in layers}
    taken: list[str] = []
    for name in sorted(left, key=left.__getitem__):
        if success(replaced(benign_P, poisoned_P, taken)) >= enough * whole and taken:
            break
        taken.append(name)
    return taken
