"""Attacks: what malicious clients train on, what they do in local training, and what they send.

The attacker controls the malicious clients, lets them act together, and knows the updates of all
others (full knowledge, the strongest threat model). The head of each file says if its attacks use
less.

| file | what |
| --- | --- |
| ``interface.py`` | ``ATTACKS``; ``AttackConfig``, the ``[attack]`` table; ``Attack``, the hooks |
| ``own.py`` | none, noise, sign-flip, scaling: they change each malicious client's own update |
| ``shifts.py`` | ipm, lie, min-max, min-sum: they move away from the honest mean |
| ``fang.py`` | trim, krum: Fang's attacks on two rules |
| ``partial.py`` | layers, sparse: they use another attack in some of the parameters |
| ``adaptive.py`` | decoys, replay, hostage-root, bit-twin, bridges, better-than-honest: against SkyMask itself |
| ``models_only.py`` | poisoned-fl, mpaf: they know the global models only |
| ``among_honest.py`` | mimic, strike, rop, hybrid-sparse: they stay among the honest updates |
| ``search.py`` | opt-alie, opt-ipm: they try the server's own rule |
| ``data.py`` | label-flip, lie-backdoor, scaling-backdoor: on what malicious clients train on |
| ``backdoors.py`` | neurotoxin, lga, dba, collapois: backdoors that act while clients train, and a Trojan model |
| ``layerwise.py`` | lp: a backdoor in the few layers that it needs |
| ``focused_flip.py``, ``chameleon.py`` | f3ba, chameleon: backdoors that flip signs; that last |
| ``tails.py`` | edge-case: a backdoor for rare samples, without a trigger |
| ``pill.py`` | pill: another attack in a chain of neurons, within the distances of honest updates |
| ``triggers.py``, ``lab.py`` | what is stamped on images; where attackers train models of their own |
"""

# Importing a family registers its attacks. Errors list them in the order of these imports.
from skymask_gpu.federation.attacks.data import Backdoor, ScalingBackdoor, add_trigger
from skymask_gpu.federation.attacks.fang import krum as krum
from skymask_gpu.federation.attacks.interface import (
    ATTACKS,
    Attack,
    AttackConfig,
    AttackContext,
    Threat,
    attack,
    build_attack,
)
from skymask_gpu.federation.attacks.own import Noise, Scaling
from skymask_gpu.federation.attacks.partial import BaseAttack, Layers, Sparse
from skymask_gpu.federation.attacks.shifts import IPM, Direction, Jitter

# isort: split
from skymask_gpu.federation.attacks.adaptive import BetterThanHonest, Bridges, Decoys, HostageRoot, Replay

# isort: split
from skymask_gpu.federation.attacks.among_honest import HybridSparse, Mimic, Rop, Strike
from skymask_gpu.federation.attacks.backdoors import CollaPois, DistributedBackdoor, Neurotoxin
from skymask_gpu.federation.attacks.chameleon import Chameleon
from skymask_gpu.federation.attacks.focused_flip import FocusedFlip
from skymask_gpu.federation.attacks.lab import Lab
from skymask_gpu.federation.attacks.layerwise import LayerwisePoisoning
from skymask_gpu.federation.attacks.models_only import Mpaf, PoisonedFL
from skymask_gpu.federation.attacks.pill import Pill
from skymask_gpu.federation.attacks.search import opt_alie as opt_alie
from skymask_gpu.federation.attacks.tails import EdgeCases

__all__ = [
    "ATTACKS",
    "IPM",
    "Attack",
    "AttackConfig",
    "AttackContext",
    "Backdoor",
    "BaseAttack",
    "BetterThanHonest",
    "Bridges",
    "Chameleon",
    "CollaPois",
    "Decoys",
    "Direction",
    "DistributedBackdoor",
    "EdgeCases",
    "FocusedFlip",
    "HostageRoot",
    "HybridSparse",
    "Jitter",
    "Lab",
    "Layers",
    "LayerwisePoisoning",
    "Mimic",
    "Mpaf",
    "Neurotoxin",
    "Noise",
    "Pill",
    "PoisonedFL",
    "Replay",
    "Rop",
    "Scaling",
    "ScalingBackdoor",
    "Sparse",
    "Strike",
    "Threat",
    "add_trigger",
    "attack",
    "build_attack",
]
