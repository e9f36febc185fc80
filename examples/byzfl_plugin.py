"""ByzFL's aggregators and attacks as rules and attacks of a run.

    plugins = ["byzfl_plugin.py"]

    [attack]
    name = "byzfl-alie"
    share = 0.2

    [defence]
    rule = "byzfl-trmean"
    pre = "nnm"

ByzFL (https://github.com/LPD-EPFL/byzfl, MIT) must be installed: ``pip install --no-deps byzfl scipy``. Without
``--no-deps``, it also installs torchvision, which fails beside a torch for CPUs only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.attacks.interface import Threat
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.integrations.byzfl import byzfl_part

AGGREGATORS, BYZFL_ATTACKS = byzfl_part("aggregators"), byzfl_part("attacks")
# Rules that assume f malicious clients, and rules that do not.
WITH_F = ("TrMean", "Krum", "MultiKrum", "MDA", "MoNNA", "Meamed", "CAF", "SMEA")
WITHOUT_F = ("Average", "Median", "GeometricMedian", "CenteredClipping")
# What may happen to the updates before they are aggregated.
PRE = {"nnm": "NNM", "arc": "ARC", "clipping": "Clipping", "bucketing": "Bucketing"}


@dataclass(frozen=True, kw_only=True)
class Pre:
    """Settings of all rules: the pre-aggregation, by name."""

    pre: str = "none"

    def __post_init__(self) -> None:
        if self.pre not in ("none", *PRE):
            raise ValueError(f"defence.pre must be none or one of {', '.join(PRE)}, got {self.pre!r}")


def seeded(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def make_rule(class_name: str) -> type:
    """A rule that calls an aggregator of ByzFL."""

    class Rule:
        def __init__(self, context: RuleContext, settings: Pre) -> None:
            self._settings = settings
            # Only this aggregator remembers something: where it was in the round before.
            self._clipping = AGGREGATORS.CenteredClipping() if class_name == "CenteredClipping" else None

        def __call__(self, updates_MP: torch.Tensor, info: RoundInfo) -> RuleResult:
            f = {"f": info.num_malicious}
            aggregate = self._clipping or getattr(AGGREGATORS, class_name)(**(f if class_name in WITH_F else {}))
            # Some of ByzFL's functions write to what they are given.
            vectors = updates_MP.clone()
            # ByzFL draws from torch's default generator.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded(info.generator))
                if self._settings.pre != "none":
                    wants_f = self._settings.pre in ("nnm", "arc")
                    vectors = getattr(AGGREGATORS, PRE[self._settings.pre])(**(f if wants_f else {}))(vectors)
                return RuleResult(aggregate(vectors), None)

        def state(self) -> dict[str, torch.Tensor]:
            return {} if self._clipping is None or self._clipping.m is None else {"centre": self._clipping.m}

        def restore(self, state: dict[str, torch.Tensor]) -> None:
            if self._clipping is not None:
                self._clipping.m = state.get("centre")

    return Rule


for class_name in (*WITH_F, *WITHOUT_F):
    RULES.register(f"byzfl-{class_name.lower()}", settings=Pre)(make_rule(class_name))


@dataclass(frozen=True, kw_only=True)
class Strength:
    """Settings of byzfl-ipm and byzfl-alie: how strong the attack is."""

    tau: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Settings of byzfl-gaussian."""

    mu: float = 0.0
    sigma: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Settings of byzfl-mimic: the number of the honest client that is copied."""

    epsilon: int = 0


def sent(make: Callable[[int], Any], updates_NP: torch.Tensor, malicious_N: torch.Tensor, threat: Threat) -> torch.Tensor:
    """What malicious clients send, ``(F, P)``: all of them the one vector of an attack of ByzFL."""
    num_malicious = int(malicious_N.sum())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(threat.generator))
        vector_P = make(num_malicious)(updates_NP[~malicious_N])
    return vector_P.to(updates_NP).expand(num_malicious, -1)


@ATTACKS.register("byzfl-sign-flip")
def sign_flip(updates_NP, malicious_N, threat):
    return sent(lambda f: BYZFL_ATTACKS.SignFlipping(), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-ipm", settings=Strength)
def ipm(updates_NP, malicious_N, threat, settings):
    return sent(lambda f: BYZFL_ATTACKS.InnerProductManipulation(tau=settings.tau), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-alie", settings=Strength)
def alie(updates_NP, malicious_N, threat, settings):
    return sent(lambda f: BYZFL_ATTACKS.ALittleIsEnough(tau=settings.tau), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-optimal-ipm")
def optimal_ipm(updates_NP, malicious_N, threat):
    return sent(lambda f: BYZFL_ATTACKS.Optimal_InnerProductManipulation(f=f), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-optimal-alie")
def optimal_alie(updates_NP, malicious_N, threat):
    return sent(lambda f: BYZFL_ATTACKS.Optimal_ALittleIsEnough(f=f), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-mimic", settings=Copied)
def mimic(updates_NP, malicious_N, threat, settings):
    return sent(lambda f: BYZFL_ATTACKS.Mimic(epsilon=settings.epsilon), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-gaussian", settings=Noise)
def gaussian(updates_NP, malicious_N, threat, settings):
    return sent(lambda f: BYZFL_ATTACKS.Gaussian(mu=settings.mu, sigma=settings.sigma), updates_NP, malicious_N, threat)


@ATTACKS.register("byzfl-inf")
def inf(updates_NP, malicious_N, threat):
    return sent(lambda f: BYZFL_ATTACKS.Inf(), updates_NP, malicious_N, threat)
