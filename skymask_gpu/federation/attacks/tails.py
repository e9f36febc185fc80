"""Edge-case backdoors: rare samples of one class, with no trigger, are to pass for another one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext
from skymask_gpu.federation.choices import positive_share

__all__ = ["EdgeCases", "furthest"]


@dataclass(frozen=True, kw_only=True)
class EdgeCases:
    """Settings of ``edge-case``.

    Attributes:
        source_class: the true class of the rare samples.
        target_class: the class that they are to be taken for.
        tail_share: the share of the source class's samples that count as rare.
        poison_share: the share of each malicious batch that is replaced by rare samples.
    """

    source_class: int = 1
    target_class: int = 0
    tail_share: float = 0.1
    poison_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("source_class", "target_class"):
            if getattr(self, name) < 0:
                raise ValueError(f"attack.{name} must be at least 0, got {getattr(self, name)!r}")
        if self.source_class == self.target_class:
            raise ValueError(f"attack.source_class must not be attack.target_class, got {self.source_class!r} for both")
        positive_share("attack.tail_share", self.tail_share)
        positive_share("attack.poison_share", self.poison_share)


@ATTACKS.register("edge-case", settings=EdgeCases)
class RelabelTail(Attack):
    """Edge-case backdoor (Wang et al., "Attack of the Tails", NeurIPS 2020, arXiv 2007.05084).

    The rare samples are those of the source class that are furthest, in Euclidean distance of the
    inputs, from the mean of this class over all malicious clients' samples. Those of the malicious
    clients, put together, take the place of the first samples of each malicious batch, with the
    target class. The other samples keep their labels. Client j uses k of them in each batch, from
    the (j k)-th on, in descending order of distance and beginning again at the end. The success is
    the share of the rare ones among the source class's test samples that the model assigns to the
    target class; nothing is stamped on them, and no training has seen them.

    The paper's rare samples come from elsewhere: photos of planes of one airline, and digits of an
    old Swedish hand. No such data are at hand here, and the tail of the same data takes their
    place. Honest clients have such samples, too, with the right label, as in the paper's weaker
    settings. The paper's projection of the model (PGD) is left out. The attack needs the malicious
    clients' own samples.

    Raises:
        ValueError: the data have no such classes, the inputs are no floating-point numbers, or no
            malicious client has a sample of the source class.
    """

    poisons_data = True
    target_class: int

    def __init__(self, context: AttackContext, settings: EdgeCases) -> None:
        for name in ("source_class", "target_class"):
            if getattr(settings, name) >= context.num_classes:
                raise ValueError(
                    f"attack.{name} must be below the data's {context.num_classes} classes, got {getattr(settings, name)}"
                )
        self._settings, self.target_class = settings, settings.target_class
        self._rare: Tensor | None = None
        if context.lab is None:
            return
        if not context.lab.inputs.is_floating_point():
            raise ValueError("attack.name 'edge-case' needs inputs with distances, got whole numbers such as characters")
        samples = torch.cat(context.lab.parts).to(context.lab.labels.device)
        own = context.lab.inputs[samples[context.lab.labels[samples] == settings.source_class]]
        if len(own) == 0:
            raise ValueError(
                f"attack.source_class must be a class that malicious clients have samples of, got {settings.source_class}; "
                "choose another one, or a larger attack.share"
            )
        self._mean = own.mean(0)
        self._rare = own[furthest(own, self._mean, settings.tail_share)]

    def poison(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._replaced(inputs, labels, torch.zeros((), dtype=torch.long))

    def poison_of(self, inputs: Tensor, labels: Tensor, clients_C: Tensor) -> tuple[Tensor, Tensor]:
        return self._replaced(inputs, labels, clients_C)

    def _replaced(self, inputs: Tensor, labels: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        if self._rare is None:
            raise ValueError("attack.name 'edge-case' poisons with the attackers' samples, which only a run has")
        count = max(1, round(self._settings.poison_share * labels.shape[-1]))
        places = (clients[..., None] * count + torch.arange(count, device=clients.device)) % len(self._rare)
        inputs, labels = inputs.clone(), labels.clone()
        inputs.narrow(labels.ndim - 1, 0, count).copy_(self._rare[places.to(self._rare.device)])
        labels[..., :count] = self.target_class
        return inputs, labels

    def test_inputs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        own = inputs[labels == self._settings.source_class]
        return own[furthest(own, self._mean, self._settings.tail_share)] if len(own) else own


def furthest(inputs: Tensor, mean: Tensor, share: float) -> Tensor:
    """The indices of the samples furthest from a mean, the furthest one first; at least one.

    Args:
        inputs: ``(n, *sample)``.
        mean: ``(*sample)``.
        share: the share of the samples.
    """
    distances = (inputs - mean).flatten(1).double().square().sum(1)
    return distances.argsort(descending=True, stable=True)[: max(1, round(share * len(inputs)))]
