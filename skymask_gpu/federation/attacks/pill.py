"""Poisoning with a pill: another attack in a slim subnet only, as far as honest updates reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat, build_attack
from skymask_gpu.federation.attacks.lab import weighted_layers
from skymask_gpu.federation.attacks.partial import BaseAttack

__all__ = ["Limits", "Pill", "pill_of", "strongest_path"]

# Halvings of an interval; more than a float64 can tell apart.
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Pill:
    """Settings of ``pill``.

    Attributes:
        base: the attack whose poison is in the pill.
    """

    base: BaseAttack = field(default_factory=BaseAttack)


@ATTACKS.register("pill", settings=Pill)
class SwallowPill(Attack):
    """Poisoning with a pill (Guo et al., AAAI 2026, arXiv 2407.15389), a wrapper of another attack.

    1. Construction: the pill is the subnet of :func:`pill_of`, one neuron per hidden layer,
       connected from the input to the output. It is looked for anew in each round's global model.
    2. Poisoning: the base attack gives the values in the pill.
    3. Injection: let m be the honest mean, r the largest distance of an honest update from the mean
       of the other honest ones, and c the smallest cosine with it. With the client's own update u,
       the base attack's row b, and (b - u) restricted to the pill, the client sends

           m + t (u - m) + s (b - u)|pill,

       with the largest t of at most 1 for which the first two terms are within r and c of m, and
       then the largest s for which the whole row is. Poison that is short is thus made longer, too.

    The paper searches approximately, and has several neurons in the last two layers. It takes
    updates that malicious clients train on for longer in the place of honest ones, which are known
    here. It adjusts the cosine first and the distance afterwards; here, s obeys both. The attack
    needs the honest updates and the global model. With fewer than two honest clients, malicious
    ones send their own updates.

    Raises:
        ValueError: there is no run, whose model the pill is a part of.
    """

    def __init__(self, context: AttackContext, settings: Pill) -> None:
        self._base = build_attack(settings.base, context)
        self._layers, self._lab = context.layers, context.lab

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        if self._lab is None or threat.global_params is None:
            raise ValueError("attack.name 'pill' poisons neurons of a run's model, which only a run has")
        own_FP, honest_HP = updates_NP[malicious_N], updates_NP[~malicious_N]
        if len(honest_HP) < 2:
            return own_FP
        pill_P = pill_of(threat.global_params, self._layers, self._lab.module).to(updates_NP.device)
        poison_FP = torch.where(pill_P, self._base.send(updates_NP, malicious_N, threat) - own_FP, 0)
        limits = Limits(honest_HP)
        rows = [limits.injected(own_P, poison_P) for own_P, poison_P in zip(own_FP, poison_FP, strict=True)]
        return torch.stack(rows).to(updates_NP.dtype)


def pill_of(params_P: Tensor, columns: Mapping[str, slice], module: nn.Module) -> Tensor:
    """The parameters of the pill in a model, ``(P,)`` bool.

    The chain consists of the model's linear and convolutional layers in the order of their
    definition. A neuron is an output of a linear layer or a channel of a convolution. The pill has
    one neuron per hidden layer and all outputs of the last one: the neurons' biases, and their
    weights from the neuron before; in the first layer, and where a layer does not follow the one
    before, as at a shortcut, all of the neuron's weights. It is the chain with the largest sum of
    magnitudes of these weights. If there is one layer only, it is one output with its weights.

    Args:
        params_P: ``(P,)``, the model's parameters.
        columns: the columns of each parameter by its name.
        module: the model; its own parameters are not used.

    Raises:
        ValueError: no linear or convolutional layer of the model is trained.
    """
    chain = [(f"{name}." if name else "", layer) for name, layer in weighted_layers(module).items()]
    chain = [(prefix, layer) for prefix, layer in chain if f"{prefix}weight" in columns]
    if not chain:
        raise ValueError("attack.name 'pill' needs a linear or convolutional layer that is trained, and the model has none")
    strengths, before = [], 1
    for prefix, layer in chain:
        num_out, num_in = layer.weight.shape[:2]
        # After a convolution, each of its channels gives several inputs that lie side by side.
        links = before if num_in % before == 0 else 1
        strength = params_P[columns[f"{prefix}weight"]].double().abs().view(num_out, links, -1).sum(2)
        strengths.append(strength.expand(num_out, before))
        before = num_out
    path = strongest_path(strengths)
    pill_P = torch.zeros(len(params_P), dtype=torch.bool, device=params_P.device)
    for place, (prefix, layer) in enumerate(chain):
        neuron = slice(path[place], path[place] + 1) if place < len(path) else slice(None)
        before = len(strengths[place - 1]) if place else 1
        links = before if layer.weight.shape[1] % before == 0 else 1
        whole = pill_P[columns[f"{prefix}weight"]].view(layer.weight.shape[0], links, -1)
        whole[neuron, path[place - 1] if links > 1 else 0] = True
        if f"{prefix}bias" in columns:
            pill_P[columns[f"{prefix}bias"]][neuron] = True
    return pill_P


def strongest_path(strengths: list[Tensor]) -> list[int]:
    """The neuron of each hidden layer on the strongest path to all outputs.

    Args:
        strengths: per layer ``(neurons, neurons of the layer before)``, the strength of each
            connection; the first layer has one neuron before it. All outputs of the last layer
            belong to the path; of a single layer, only the strongest one does.

    Example:
        >>> strongest_path([torch.tensor([[3.0], [2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])])
        [1]
    """
    reached, came_from = strengths[0][:, 0], []
    for strength in strengths[1:-1]:
        reached, best = (strength + reached).max(1)
        came_from.append(best)
    path = [int((reached + strengths[-1].sum(0) if len(strengths) > 1 else reached).argmax())]
    for best in reversed(came_from):
        path.insert(0, int(best[path[0]]))
    return path


class Limits:
    """How far an honest update is from the mean of the others, in distance and in cosine.

    An honest update is a part of the mean of all, and therefore nearer to it than another client's
    is. It is compared with the mean of the others for this reason.

    Args:
        honest_HP: ``(H, P)``, the honest updates, at least two.
    """

    def __init__(self, honest_HP: Tensor) -> None:
        honest_HP = honest_HP.double()
        self._mean_P = honest_HP.mean(0)
        self._length = float(torch.linalg.vector_norm(self._mean_P))
        others_HP = (len(honest_HP) * self._mean_P - honest_HP) / (len(honest_HP) - 1)
        self._reach = float(torch.linalg.vector_norm(honest_HP - others_HP, dim=1).max())
        self._cosine = float(F.cosine_similarity(honest_HP, others_HP, dim=1).min())

    def injected(self, own_P: Tensor, poison_P: Tensor) -> Tensor:
        """The row to send, ``(P,)`` float64.

        Args:
            own_P: ``(P,)``, the client's own update.
            poison_P: ``(P,)``, what the poison adds to it, not yet scaled.
        """
        apart_P, poison_P = own_P.double() - self._mean_P, poison_P.double()
        carrier_P = self._mean_P + self._largest(self._mean_P, apart_P, 1.0) * apart_P
        length = float(torch.linalg.vector_norm(poison_P))
        if length == 0:
            return carrier_P
        # Twice the reach crosses the whole ball around the mean.
        return carrier_P + self._largest(carrier_P, poison_P, 2 * self._reach / length) * poison_P

    def _largest(self, start_P: Tensor, step_P: Tensor, most: float) -> float:
        """The largest s, at most ``most``, with start + s * step within both limits."""
        away_P = start_P - self._mean_P
        away, step = float(away_P @ away_P), float(step_P @ step_P)
        along, turn = float(away_P @ step_P), float(step_P @ self._mean_P)
        base, start, cross = float(start_P @ self._mean_P), float(start_P @ start_P), float(start_P @ step_P)

        def within(s: float) -> bool:
            near = away + 2 * s * along + s * s * step <= self._reach**2
            length = max(start + 2 * s * cross + s * s * step, 0.0) ** 0.5
            return near and base + s * turn >= self._cosine * length * self._length

        if within(most):
            return most
        low, high = 0.0, most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low
