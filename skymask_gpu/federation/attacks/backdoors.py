"""Backdoors that act while clients train: Neurotoxin, LGA and DBA; and CollaPois.

They know the malicious clients' own data and the global models, and no honest update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.data import Backdoor, PixelBackdoor
from skymask_gpu.federation.attacks.interface import ATTACKS, AttackContext, Threat
from skymask_gpu.federation.attacks.triggers import NUM_BARS, add_bars
from skymask_gpu.federation.choices import positive_share

__all__ = ["CollaPois", "DistributedBackdoor", "Neurotoxin"]


@dataclass(frozen=True, kw_only=True)
class Neurotoxin(Backdoor):
    """Settings of ``neurotoxin``.

    Attributes:
        frozen_share: the share of the parameters, those that the last global step changed most,
            that malicious clients leave alone.
    """

    frozen_share: float = 0.05

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        if not 0 <= self.frozen_share < 1:
            raise ValueError(f"attack.frozen_share must be from 0 to below 1, got {self.frozen_share!r}")


@ATTACKS.register("neurotoxin", settings=Neurotoxin)
class TrainInQuietParams(PixelBackdoor):
    """Neurotoxin (Zhang et al., ICML 2022, arXiv 2206.10341).

    Malicious clients train on data with the trigger. After each local step, they put the k% of the
    parameters with the largest |w_t - w_(t-1)| back to the global model's values. Honest clients
    seldom change the others, so that the backdoor lives longer once the attackers leave. In the
    first round there is no earlier model, and nothing is put back.
    """

    def __init__(self, context: AttackContext, settings: Neurotoxin) -> None:
        super().__init__(context, settings)
        self._frozen_share = settings.frozen_share
        self._round: tuple[Threat, Tensor] | None = None

    def after_step(self, params_FP: Tensor, step: int, clients_F: Tensor, threat: Threat) -> Tensor | None:
        if threat.global_params is None or threat.previous_params is None:
            return None
        if self._round is None or self._round[0] is not threat:
            # The places are the same in all steps of a round, and finding them is a sort.
            change_P = (threat.global_params - threat.previous_params).abs()
            frozen_P = torch.zeros_like(change_P, dtype=torch.bool)
            frozen_P[change_P.argsort(descending=True, stable=True)[: round(self._frozen_share * len(change_P))]] = True
            self._round = threat, frozen_P
        return torch.where(self._round[1], threat.global_params, params_FP)


@ATTACKS.register("lga", settings=Backdoor)
class StayShortInLayers(PixelBackdoor):
    """Layer-wise gradient alignment, LGA (ICCV 2025): no layer is longer than the last global step.

    Malicious clients train on data with the trigger. After each local step, the part d of their
    update in each parameter tensor becomes min(1, |g| / |d|) d, where g is the part of the last
    global step w_t - w_(t-1) there. In the first round there is no such step, and nothing is
    shortened.
    """

    def __init__(self, context: AttackContext, settings: Backdoor) -> None:
        super().__init__(context, settings)
        self._layers = context.layers

    def after_step(self, params_FP: Tensor, step: int, clients_F: Tensor, threat: Threat) -> Tensor | None:
        if threat.global_params is None or threat.previous_params is None:
            return None
        moved_FP, step_P = params_FP - threat.global_params, threat.global_params - threat.previous_params
        for columns in self._layers.values():
            own_F1 = torch.linalg.vector_norm(moved_FP[:, columns], dim=1, keepdim=True)
            bound = torch.linalg.vector_norm(step_P[columns])
            moved_FP[:, columns] *= (bound / own_F1.clamp_min(torch.finfo(own_F1.dtype).tiny)).clamp_max(1)
        return threat.global_params + moved_FP


@dataclass(frozen=True, kw_only=True)
class DistributedBackdoor(Backdoor):
    """Settings of ``dba``: those of a backdoor; its trigger is always ``"bars"``."""

    trigger: str = "bars"

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        if self.trigger != "bars":
            raise ValueError(
                f"attack.trigger must be 'bars' for attack 'dba', whose clients share them out, got {self.trigger!r}"
            )


@ATTACKS.register("dba", settings=DistributedBackdoor)
class ShareOutTrigger(PixelBackdoor):
    """Distributed backdoor attack, DBA (Xie et al., ICLR 2020).

    The trigger has four bars. The malicious client with the number j trains with the bar j modulo 4
    alone; a test input carries all four. This is the attack of many rounds ("A-M"), without
    scaling.
    """

    def __init__(self, context: AttackContext, settings: DistributedBackdoor) -> None:
        super().__init__(context, settings)
        self._brightest = context.brightest

    def poison_of(self, inputs: Tensor, labels: Tensor, clients_C: Tensor) -> tuple[Tensor, Tensor]:
        bars = [int(client) % NUM_BARS for client in clients_C]
        triggered = torch.stack([add_bars(own, self._brightest, (bar,)) for own, bar in zip(inputs, bars, strict=True)])
        return self.with_triggered(inputs, labels, triggered)


@dataclass(frozen=True, kw_only=True)
class CollaPois(Backdoor):
    """Settings of ``collapois``.

    Attributes:
        nearest: the least share of the way to the Trojan model that a client sends.
        furthest: the largest share.
        train_steps: the number of steps in which the attackers train this model.
    """

    nearest: float = 0.9
    furthest: float = 1.0
    train_steps: int = 200

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        positive_share("attack.nearest", self.nearest)
        if not self.nearest <= self.furthest < float("inf"):
            raise ValueError(
                f"attack.furthest must be finite and at least attack.nearest = {self.nearest}, got {self.furthest!r}"
            )
        if self.train_steps < 1:
            raise ValueError(f"attack.train_steps must be at least 1, got {self.train_steps!r}")


@ATTACKS.register("collapois", settings=CollaPois)
class PullToTrojan(PixelBackdoor):
    """CollaPois (arXiv 2504.12875): all pull the global model towards one Trojan model X.

    In the first round in which they attack, the malicious clients train X on all of their samples,
    a share of which carries the trigger, from the global model on. In every round, each of them
    sends psi (X - w_t), with a psi of its own that is uniform between two bounds.

    Raises:
        ValueError: there is no run, whose samples X could be trained on.
    """

    def __init__(self, context: AttackContext, settings: CollaPois) -> None:
        super().__init__(context, settings)
        self._settings, self._lab = settings, context.lab
        self._trojan_P: Tensor | None = None

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        if self._lab is None or threat.global_params is None or threat.clients is None:
            raise ValueError("attack.name 'collapois' trains a model on the attackers' samples, which only a run has")
        if self._trojan_P is None:
            samples = torch.cat(self._lab.parts)
            self._trojan_P = self._lab.train(
                threat.global_params, samples, self.poison_of, threat.generator, threat.buffers, self._settings.train_steps
            )
        width = self._settings.furthest - self._settings.nearest
        shares_F = self._settings.nearest + width * torch.rand(int(malicious_N.sum()), generator=threat.generator)
        return (shares_F[:, None].to(updates_NP) * (self._trojan_P - threat.global_params)).to(updates_NP.dtype)

    def state(self) -> dict[str, Tensor]:
        return {} if self._trojan_P is None else {"trojan": self._trojan_P}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._trojan_P = state.get("trojan")
