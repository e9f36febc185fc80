"""Attacks on SkyMask itself: what attackers send who have read how masks are trained and judged.

SkyMask compares clients by their masks' bits, and rejects copies, groups far from the root's row
and rows with little weight along the root direction. Each attack here aims at one of these steps.
No attack on learnable masks is published, so these are this project's own. They know the honest
updates of the round, and neither the root data nor the server's masks.

| name | what it aims at |
| --- | --- |
| ``decoys`` | the search for copies: some attackers are copies on purpose |
| ``replay`` | the same search: honest clients are made copies of attackers |
| ``hostage-root`` | the side of the root's row: some attackers send what the root is likely to have |
| ``bit-twin`` | the bits: a row has an honest client's bits and otherwise does the most damage |
| ``bridges`` | the gap between two groups: attackers stand in it |
| ``better-than-honest`` | the root direction: attackers follow it further than honest clients do |

``base`` chooses the poison. Without an honest update, malicious clients send the base attack's
rows, or, for ``bit-twin``, their own updates.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat, build_attack
from skymask_gpu.federation.attacks.partial import BaseAttack
from skymask_gpu.federation.choices import above_zero, positive_share

__all__ = ["BetterThanHonest", "Bridges", "Decoys", "HostageRoot", "Replay", "bit_twin"]


@dataclass(frozen=True, kw_only=True)
class Decoys:
    """Settings of ``decoys``.

    Attributes:
        decoys: the number of malicious clients that send the same update. If there are fewer, all
            do.
        base: what malicious clients do.
    """

    decoys: int = 2
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        if self.decoys < 2:
            raise ValueError(f"attack.decoys must be at least 2, since one client has no copy, got {self.decoys!r}")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Settings of ``replay``.

    Attributes:
        copies: the number of malicious clients that copy an honest one. If there are fewer, all do.
        base: what the other malicious clients do.
    """

    copies: int = 2
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"attack.copies must be at least 1, got {self.copies!r}; use the base attack itself for none")


@dataclass(frozen=True, kw_only=True)
class HostageRoot:
    """Settings of ``hostage-root``.

    Attributes:
        hostages: the share of the malicious clients that send rows like the root's; at least one
            does.
        params_share: the share of the parameters in which these rows are poisoned.
        base: the poison, and what the other malicious clients do.
    """

    hostages: float = 0.5
    params_share: float = 0.1
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        positive_share("attack.hostages", self.hostages)
        positive_share("attack.params_share", self.params_share)


@dataclass(frozen=True, kw_only=True)
class Bridges:
    """Settings of ``bridges``.

    Attributes:
        base: the attack whose row is the far end of the bridge.
    """

    base: BaseAttack = field(default_factory=BaseAttack)


@dataclass(frozen=True, kw_only=True)
class BetterThanHonest:
    """Settings of ``better-than-honest``.

    Attributes:
        alignment: how far malicious clients go along the honest mean, in multiples of its length.
        base: the attack that gives the part of their rows across the honest mean.
    """

    alignment: float = 1.5
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        above_zero("attack.alignment", self.alignment)


class _OverBase(Attack):
    """An attack that starts from the rows of a base attack."""

    def __init__(self, context: AttackContext, settings: Decoys | Replay | HostageRoot | Bridges | BetterThanHonest) -> None:
        self._base = build_attack(settings.base, context)

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        # A base attack may return a view that shows one row F times. It must not be written to.
        poison_FP = self._base.send(updates_NP, malicious_N, threat).clone()
        return self.hide(poison_FP, updates_NP, malicious_N, threat) if not malicious_N.all() else poison_FP

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        """The rows to send, ``(F, P)``, made from the base attack's, which may be overwritten."""
        raise NotImplementedError


@ATTACKS.register("decoys", settings=Decoys)
class SendDecoys(_OverBase):
    """The first few malicious clients all send the base attack's row of the first one.

    A rule that rejects copies and then cuts nothing else is switched off by them: two attackers are
    lost and all others kept. This attack is the project's own. It needs no knowledge beyond that of
    the base attack.
    """

    def __init__(self, context: AttackContext, settings: Decoys) -> None:
        super().__init__(context, settings)
        self._decoys = settings.decoys

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        poison_FP[: self._decoys] = poison_FP[0].clone()
        return poison_FP


@ATTACKS.register("replay", settings=Replay)
class SendReplays(_OverBase):
    """The first few malicious clients each send again what an honest client sends.

    The honest clients are drawn anew each round, each of them once before any is drawn again. A
    rule that rejects all copies rejects them as well. This attack is the project's own. It needs
    the honest updates.
    """

    def __init__(self, context: AttackContext, settings: Replay) -> None:
        super().__init__(context, settings)
        self._copies = settings.copies

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        honest_HP = updates_NP[~malicious_N]
        order_H = torch.randperm(len(honest_HP), generator=threat.generator).to(honest_HP.device)
        copied = torch.arange(min(self._copies, len(poison_FP)), device=honest_HP.device)
        poison_FP[copied] = honest_HP[order_H[copied % len(honest_HP)]]
        return poison_FP


@ATTACKS.register("hostage-root", settings=HostageRoot)
class TakeRootHostage(_OverBase):
    """Some malicious clients send a row like the root's, poisoned where bits hardly vary.

    The root's row is trained on data of all classes, with the clients' recipe. Its stand-in here is
    the honest mean, stretched to the length of each such client's own update. Where most honest
    updates have the same sign, most masks have the same bit, and a distance between masks hardly
    sees this parameter; the share of the parameters in which the signs agree most has the base
    attack's values. The other malicious clients send the base attack's rows. A rule that keeps the
    root's side then keeps the hostages, and honest clients may be the far group.

    This attack is the project's own. It needs the honest updates.
    """

    def __init__(self, context: AttackContext, settings: HostageRoot) -> None:
        super().__init__(context, settings)
        self._hostages, self._params_share = settings.hostages, settings.params_share

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        honest_HP, own_FP = updates_NP[~malicious_N], updates_NP[malicious_N]
        num_hostages = max(1, round(self._hostages * len(own_FP)))
        lengths_K = torch.linalg.vector_norm(own_FP[:num_hostages], dim=1)
        root_like_KP = lengths_K[:, None] * _unit(honest_HP.mean(0))
        agreement_P = honest_HP.sign().sum(0).abs()
        num_poisoned = max(1, round(self._params_share * len(agreement_P)))
        # The sums are whole numbers with many ties. A stable sort breaks these alike on every
        # device.
        hidden = agreement_P.argsort(descending=True, stable=True)[num_poisoned:]
        poison_FP[:num_hostages, hidden] = root_like_KP[:, hidden]
        return poison_FP


@ATTACKS.register("bit-twin")
def bit_twin(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Each malicious client has an honest client's bits, and otherwise does the most damage.

    A mask's bit tells on which side of one threshold per parameter a client's value lies. An
    attacker cannot train the server's masks, since it lacks the root data, and takes the honest
    mean for the threshold. Malicious client f starts from honest client f modulo H, and moves each
    value against the sign of the honest mean, as far as its side of the threshold allows: up to the
    threshold, or, where it may leave it behind, to the largest honest magnitude in this parameter.
    Where the honest mean is zero, it leaves the honest value.

    With the true thresholds, no rule on bits alone could tell the twins from honest clients, and
    their damage would bound what such a rule can prevent. This attack is the project's own. It
    needs the honest updates.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    copied_F = torch.arange(int(malicious_N.sum()), device=honest_HP.device) % len(honest_HP)
    model_FP = honest_HP[copied_F]
    mean_P, largest_P = honest_HP.mean(0), honest_HP.abs().amax(0)
    above_FP = model_FP >= mean_P
    # The threshold itself counts as above. A value from below therefore stops one float short of
    # it.
    held_FP = torch.where(above_FP, mean_P, torch.nextafter(mean_P, torch.full_like(mean_P, -torch.inf)))
    free_FP = above_FP == (mean_P < 0)
    sent_FP = torch.where(free_FP, -mean_P.sign() * largest_P, held_FP)
    return torch.where(mean_P == 0, model_FP, sent_FP)


@ATTACKS.register("bridges", settings=Bridges)
class BuildBridges(_OverBase):
    """Malicious clients stand in equal steps between an honest client and the poison.

    The bridge joins the row of the base attack and the honest update that are nearest to each
    other, and the f-th of F malicious clients has gone the share f / F of it. No two neighbours are
    further apart than its length over F, so that a rule that cuts at a wide gap finds none. This
    attack is the project's own. It needs the honest updates.
    """

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        honest_HP = updates_NP[~malicious_N]
        distances_FH = torch.cdist(poison_FP, honest_HP, compute_mode="use_mm_for_euclid_dist")
        far, near = divmod(int(distances_FH.argmin()), len(honest_HP))
        gone_F = torch.arange(1, len(poison_FP) + 1, device=poison_FP.device).to(poison_FP.dtype) / len(poison_FP)
        return torch.lerp(honest_HP[near], poison_FP[far], gone_F[:, None])


@ATTACKS.register("better-than-honest", settings=BetterThanHonest)
class FollowBetter(_OverBase):
    """Malicious clients go along the honest mean further than honest ones, and poison across it.

    Let m be the honest mean and u its direction, which stands in for the root direction. Honest
    clients have the inner product |m| with u on average. A malicious client sends

        a u + b v,   a = alignment * |m|,   v: the base attack's row without its part along u,

    where v has length 1, and b is the largest for which the row's cosine with u is at least the
    lowest honest cosine c, and its length at most the largest honest length n. Beyond a = c n, more
    of a leaves less for b; a is therefore at most c n, or |m| if that is more. A base attack that
    acts along u alone, such as ``ipm``, leaves v = 0, and no damage.

    This attack is the project's own. It needs the honest updates.
    """

    def __init__(self, context: AttackContext, settings: BetterThanHonest) -> None:
        super().__init__(context, settings)
        self._alignment = settings.alignment

    def hide(self, poison_FP: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        honest_HP = updates_NP[~malicious_N]
        mean_P = honest_HP.mean(0)
        along_P = _unit(mean_P)
        across_FP = _unit(poison_FP - (poison_FP @ along_P)[:, None] * along_P)
        norms_H = torch.linalg.vector_norm(honest_HP.double(), dim=1)
        cosine = ((honest_HP @ along_P).double() / norms_H.clamp_min(torch.finfo(torch.float64).tiny)).min().clamp_max(1)
        longest, length = norms_H.max(), torch.linalg.vector_norm(mean_P.double())
        reach = torch.minimum(self._alignment * length, torch.maximum(length, cosine * longest))
        spend = (longest.square() - reach.square()).clamp_min(0).sqrt()
        if cosine > 0:
            spend = torch.minimum(spend, reach * (1 - cosine.square()).sqrt() / cosine)
        return reach.to(mean_P.dtype) * along_P + spend.to(mean_P.dtype) * across_FP


def _unit(rows: Tensor) -> Tensor:
    """The vectors along the last dimension, scaled to length 1; zero vectors stay zero."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)
