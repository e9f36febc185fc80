"""Attackers without data, who know nothing but the global models: PoisonedFL and MPAF.

All malicious clients send the same, unless a jitter parts them; only the jitter knows the honest
updates' spread. In the first round, in which there is no earlier model, and outside of a run,
PoisonedFL's clients send their own updates; outside of a run, so do MPAF's.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.attacks.shifts import Jitter, sent_by_all
from skymask_gpu.federation.choices import above_zero

__all__ = ["Mpaf", "PoisonedFL"]

_CERTAINTY = 0.99


@dataclass(frozen=True, kw_only=True)
class PoisonedFL(Jitter):
    """Settings of ``poisoned-fl``.

    Attributes:
        scale: the length of what is sent, in lengths of the last global step; c at the beginning.
        decay: c is multiplied by this if a test finds that the attack does not get through.
        least: the smallest c.
        test_every: the number of rounds between two tests.
        jitter: see :class:`Jitter`.
    """

    scale: float = 8.0
    decay: float = 0.7
    least: float = 0.5
    test_every: int = 50

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        above_zero("attack.scale", self.scale)
        above_zero("attack.least", self.least)
        if not 0 < self.decay <= 1:
            raise ValueError(f"attack.decay must be above 0 and at most 1, got {self.decay!r}")
        if self.test_every < 1:
            raise ValueError(f"attack.test_every must be at least 1, got {self.test_every!r}")


@ATTACKS.register("poisoned-fl", settings=PoisonedFL)
class SendSameSigns(Attack):
    """PoisonedFL (Xie, Fang & Gong, CVPR 2025, arXiv 2404.15611).

    One vector q of random signs is drawn for the whole run. With h = w_t - w_(t-1), the last global
    step, and s what was sent in the round before, all clients send

        c |h| v * q,    v = |h - s |h| / |s|| by magnitudes, scaled to length 1;

    in the first such round v has the magnitudes of h. Every 50 rounds, the parameters of which the
    sign of the model's change since the last test agrees with q are counted. If there are not more
    than the 99% point of Bin(P, 1/2), which is taken from the normal distribution, c becomes
    0.7 c, but at least 0.5. The attack needs only the global models.
    """

    def __init__(self, context: AttackContext, settings: PoisonedFL) -> None:
        self._settings = settings
        self._state: dict[str, Tensor] = {}

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        if threat.global_params is None or threat.previous_params is None:
            return updates_NP[malicious_N]
        params_P, step_P = threat.global_params, threat.global_params - threat.previous_params
        state = dict(self._state) or self._first_state(params_P, threat.generator)
        if int(state["since_test"]) >= self._settings.test_every:
            state |= self._tested(state, params_P)
        length = torch.linalg.vector_norm(step_P.double())
        shape_P = step_P.double()
        if "sent" in state:
            sent_P = state["sent"].double()
            shape_P = shape_P - sent_P * (length / torch.linalg.vector_norm(sent_P).clamp_min(torch.finfo(torch.float64).tiny))
        shape_P = shape_P.abs()
        unit_P = shape_P / torch.linalg.vector_norm(shape_P).clamp_min(torch.finfo(torch.float64).tiny)
        row_P = (state["scale"] * length * unit_P * state["signs"]).to(updates_NP.dtype)
        self._state = {**state, "sent": row_P, "since_test": state["since_test"] + 1}
        return sent_by_all(row_P, updates_NP, malicious_N, threat, self._settings.jitter)

    def _first_state(self, params_P: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        signs_P = 2 * torch.randint(2, params_P.shape, generator=generator) - 1
        return {
            "signs": signs_P.to(params_P),
            "tested_params": params_P.clone(),
            "scale": params_P.new_tensor(self._settings.scale, dtype=torch.float64),
            "since_test": torch.zeros((), dtype=torch.long, device=params_P.device),
        }

    def _tested(self, state: dict[str, Tensor], params_P: Tensor) -> dict[str, Tensor]:
        """A new scale after a test, and the model that the next one compares with."""
        agreeing = int(((params_P - state["tested_params"]) * state["signs"] > 0).sum())
        num_params = len(params_P)
        needed = num_params / 2 + NormalDist().inv_cdf(_CERTAINTY) * math.sqrt(num_params) / 2
        scale = state["scale"]
        if agreeing <= needed:
            scale = (scale * self._settings.decay).clamp_min(self._settings.least)
        return {"scale": scale, "tested_params": params_P.clone(), "since_test": torch.zeros_like(state["since_test"])}

    def state(self) -> dict[str, Tensor]:
        return self._state

    def restore(self, state: dict[str, Tensor]) -> None:
        self._state = state


@dataclass(frozen=True, kw_only=True)
class Mpaf(Jitter):
    """Settings of ``mpaf``.

    Attributes:
        scale: the multiple of the way to the bad model that is sent, lambda in the paper.
        jitter: see :class:`Jitter`.
    """

    scale: float = 1e6

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        above_zero("attack.scale", self.scale)


@ATTACKS.register("mpaf", settings=Mpaf)
class PullToBadModel(Attack):
    """MPAF, fake clients (Cao & Gong, CVPR workshops 2022, arXiv 2203.08669).

    All clients send lambda (w' - w_t), with one bad model w' for the whole run. The paper takes any
    model of low accuracy, such as a randomly initialised one. Here, w' has the values of the first
    model that the attackers see, shuffled within each parameter. The attack needs only the global
    models.
    """

    def __init__(self, context: AttackContext, settings: Mpaf) -> None:
        self._settings, self._layers = settings, context.layers
        self._bad_P: Tensor | None = None

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        if threat.global_params is None:
            return updates_NP[malicious_N]
        if self._bad_P is None:
            self._bad_P = threat.global_params.clone()
            for columns in self._layers.values():
                values = threat.global_params[columns]
                order = torch.randperm(len(values), generator=threat.generator).to(values.device)
                self._bad_P[columns] = values[order]
        row_P = (self._settings.scale * (self._bad_P - threat.global_params)).to(updates_NP.dtype)
        return sent_by_all(row_P, updates_NP, malicious_N, threat, self._settings.jitter)

    def state(self) -> dict[str, Tensor]:
        return {} if self._bad_P is None else {"bad_model": self._bad_P}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._bad_P = state.get("bad_model")
