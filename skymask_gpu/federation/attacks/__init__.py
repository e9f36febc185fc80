"""Attacks: what malicious clients train on, what they do in local training, and what they send.

The attacker controls the malicious clients, lets them act together, and knows the updates of all
others (full knowledge, the strongest threat model).

| file | what |
| --- | --- |
| ``interface.py`` | ``ATTACKS``; ``AttackConfig``, the ``[attack]`` table; ``Attack``, the hooks |
| ``own.py`` | none, noise, sign-flip, scaling: they change each malicious client's own update |
| ``shifts.py`` | ipm, lie, min-max, min-sum: they move away from the honest mean |
| ``fang.py`` | trim, krum: Fang's attacks on two rules |
| ``partial.py`` | layers, sparse: they use another attack in some of the parameters |
| ``adaptive.py`` | decoys, replay, hostage-root, bit-twin, bridges, better-than-honest: against SkyMask itself |
| ``data.py`` | label-flip, lie-backdoor, scaling-backdoor: on what malicious clients train on |
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
    "Decoys",
    "Direction",
    "HostageRoot",
    "Jitter",
    "Layers",
    "Noise",
    "Replay",
    "Scaling",
    "ScalingBackdoor",
    "Sparse",
    "Threat",
    "add_trigger",
    "attack",
    "build_attack",
]
