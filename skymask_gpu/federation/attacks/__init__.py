"""Attacks: what malicious clients train on (``data_poisoning``), and what they send (``model_poisoning``).

The attacker controls the malicious clients, lets them act together, and knows the updates of all others (full knowledge, the
strongest threat model). A round's batches go through ``poison_batch``, and what local training made of them through ``attack``.
"""

from skymask_gpu.federation.attacks.data_poisoning import add_trigger, has_backdoor, poison_batch, poisons_data
from skymask_gpu.federation.attacks.model_poisoning import attack, poisoned_columns
from skymask_gpu.federation.attacks.threat import ATTACKS, AttackConfig, Threat

__all__ = [
    "ATTACKS",
    "AttackConfig",
    "Threat",
    "add_trigger",
    "attack",
    "has_backdoor",
    "poison_batch",
    "poisoned_columns",
    "poisons_data",
]
