"""F3BA: the signs of a few unimportant weights are flipped so that they carry the trigger on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.attacks.data import Backdoor, PixelBackdoor
from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.attacks.lab import Lab, weighted_layers
from skymask_gpu.federation.choices import positive_share

__all__ = ["FocusedFlip", "wanted_signs"]

# The samples on which activations are compared. More would only make the means finer.
_MOST_SAMPLES = 200
# A step of the trigger's optimisation, as a share of the range of pixels.
_TRIGGER_STEP = 0.1
# Activations that change by less than this share of the largest change count as unchanged.
# Otherwise, rounding would decide about the sign.
_UNCHANGED = 1e-3


@dataclass(frozen=True, kw_only=True)
class FocusedFlip(Backdoor):
    """Settings of ``f3ba``.

    Attributes:
        flip_share: the share of the weights, the least important ones of each layer, that get the
            sign which the trigger wants.
        trigger_steps: the number of steps in which the trigger's pixels are optimised in each
            round; 0 leaves the trigger as it is.
    """

    flip_share: float = 0.01
    trigger_steps: int = 10

    def __post_init__(self) -> None:
        Backdoor.__post_init__(self)
        positive_share("attack.flip_share", self.flip_share)
        if self.trigger_steps < 0:
            raise ValueError(f"attack.trigger_steps must be at least 0 (0: a fixed trigger), got {self.trigger_steps!r}")
        if self.trigger_steps and self.trigger == "blended":
            raise ValueError(
                "attack.trigger_steps must be 0 for attack.trigger 'blended', which replaces no pixels, "
                f"got {self.trigger_steps!r}; use the trigger 'pixels' or 'bars'"
            )


class _Repainted(PixelBackdoor):
    """A backdoor whose trigger keeps its place, while its pixels may get other values.

    Attributes:
        pixels: ``(C, H, W)`` bool, where the trigger is.
        painted: ``(C, H, W)``, the values where the trigger is; None means the trigger's own.
    """

    def __init__(self, context: AttackContext, settings: Backdoor) -> None:
        super().__init__(context, settings)
        dark, bright = (super(_Repainted, self).trigger(torch.full(context.input_shape, value)) for value in (0.0, 1.0))
        self.pixels = dark == bright
        self.painted: Tensor | None = None

    def trigger(self, inputs: Tensor) -> Tensor:
        if self.painted is None:
            return super().trigger(inputs)
        return torch.where(self.pixels.to(inputs.device), self.painted.to(inputs), inputs)


@ATTACKS.register("f3ba", settings=FocusedFlip)
class FlipFocused(Attack):
    """Focused-flip federated backdoor attack, F3BA (Fang & Chen, AAAI 2023, arXiv 2301.08170).

    In each round, from the global model w_t, on samples of all malicious clients:

    1. The trigger's pixels move by signs of gradients, within the range of the data, so that what
       enters the second layer differs most, in its squared length, with and without the trigger.
    2. A weight's importance is its movement, (w_t - w_(t-1)) w_t, which stands in for -w dL/dw: it
       is lowest where a weight shrinks. From the first layer to the last one, let d be the mean
       change, by the trigger, of what enters the layer, in the model that is flipped up to there.
       The least important weights w of the layer become sign(d) |w|; see :func:`wanted_signs`. In
       the last layer, only the target class's weights take part.
    3. Each malicious client trains the flipped model on its own samples, a share of which carries
       the trigger, and sends the way from w_t to there.

    In the first round there is no earlier model, and nothing is flipped. The paper was not
    available in full. These are this project's choices: the candidates are a share of the weights
    that the trigger reaches, since most inputs of a linear first layer never see it; the last
    layer's restriction; the objective of the first step; and one trigger for all. The attack needs
    the malicious clients' own samples and the last global step.

    Raises:
        ValueError: the data carry no trigger, or there is no run, on whose samples the attack acts.
    """

    def __init__(self, context: AttackContext, settings: FocusedFlip) -> None:
        self._backdoor = _Repainted(context, settings)
        self._settings, self._layers, self._lab = settings, context.layers, context.lab
        self._brightest = context.brightest
        self.target_class = settings.target_class

    def trigger(self, inputs: Tensor) -> Tensor:
        return self._backdoor.trigger(inputs)

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        lab, start_P = self._lab, threat.global_params
        if lab is None or start_P is None or threat.clients is None:
            raise ValueError("attack.name 'f3ba' trains models on the attackers' samples, which only a run has")
        clients = threat.clients[malicious_N.to(threat.clients.device)].tolist()
        samples = lab.samples_of(clients).to(lab.inputs.device)
        inputs = lab.inputs[samples[:: math.ceil(len(samples) / _MOST_SAMPLES)]]
        if self._settings.trigger_steps:
            self._backdoor.painted = self._painted(lab, start_P, inputs, threat.buffers)
        flipped_P = start_P
        if threat.previous_params is not None:
            flipped_P = self._flipped(lab, start_P, threat.previous_params, inputs, threat.buffers)
        rows = [
            lab.train(flipped_P, lab.samples_of([client]), self._backdoor.poison_of, threat.generator, threat.buffers) - start_P
            for client in clients
        ]
        return torch.stack(rows).to(updates_NP.dtype)

    def _painted(self, lab: Lab, params_P: Tensor, inputs: Tensor, buffers: Mapping[str, Tensor] | None) -> Tensor:
        """The trigger's pixels, ``(C, H, W)``, after some steps from where they are now."""
        stamped = self._backdoor.pixels.to(inputs.device)
        darkest = float(lab.inputs.min())
        step = _TRIGGER_STEP * (self._brightest - darkest)
        clean = _after_first_layer(lab, params_P, inputs, buffers).detach()
        painted = self.trigger(torch.zeros_like(inputs[0]))
        for _ in range(self._settings.trigger_steps):
            pixels = painted.clone().requires_grad_()
            triggered = torch.where(stamped, pixels, inputs)
            change = _after_first_layer(lab, params_P, triggered, buffers) - clean
            (gradient,) = torch.autograd.grad(change.square().sum(), pixels)
            painted = (painted + step * gradient.sign()).clamp(darkest, self._brightest)
        return painted

    @torch.no_grad()
    def _flipped(
        self, lab: Lab, params_P: Tensor, previous_P: Tensor, inputs: Tensor, buffers: Mapping[str, Tensor] | None
    ) -> Tensor:
        """The model, ``(P,)``, after the flips in all layers."""
        movement_P, triggered = (params_P - previous_P) * params_P, self.trigger(inputs)
        flipped_P, layers = params_P.clone(), weighted_layers(lab.module)
        called = list(lab.inside(params_P, inputs[:1], buffers)[1])
        for name in called:
            columns = self._layers.get(f"{name}.weight" if name else "weight")
            if columns is None:
                continue
            clean, stamped = (lab.inside(flipped_P, some, buffers)[1][name] for some in (inputs, triggered))
            signs = wanted_signs(stamped - clean, layers[name])
            if name == called[-1]:
                signs[torch.arange(len(signs), device=signs.device) != self.target_class] = 0
            reached = signs.flatten().nonzero()[:, 0]
            order = movement_P[columns][reached].argsort(stable=True)
            chosen = reached[order[: max(1, round(self._settings.flip_share * len(reached)))]]
            flipped_P[columns][chosen] = signs.flatten()[chosen] * params_P[columns][chosen].abs()
        return flipped_P

    def state(self) -> dict[str, Tensor]:
        return {} if self._backdoor.painted is None else {"painted": self._backdoor.painted}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._backdoor.painted = state.get("painted")


def wanted_signs(changes: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The sign that each weight of a layer needs so that its neuron grows with the trigger.

    A weight of a linear layer gets the sign of the mean change of its input. For a convolution, the
    mean change is cut to the rectangle in which the trigger changes anything, and averaged to the
    size of a filter; a weight gets the sign there. In the first layer these are the trigger and its
    sign.

    Args:
        changes: ``(n, ..., features)`` or ``(n, channels, height, width)``, the changes of what
            enters the layer, per sample.
        layer: the layer.

    Returns:
        The signs in the shape of the layer's weight; 0 where the trigger changes nothing.
    """
    if isinstance(layer, nn.Linear):
        change = changes.flatten(0, -2).mean(0)
        return _signs(change).expand(layer.weight.shape).clone()
    change = changes.mean(0)
    moved = (_signs(change) != 0).any(0)
    if layer.groups > 1 or not moved.any():
        return torch.zeros(layer.weight.shape, dtype=change.dtype, device=change.device)
    rows, columns = moved.any(1).nonzero()[:, 0], moved.any(0).nonzero()[:, 0]
    cut = change[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    averaged = F.adaptive_avg_pool2d(cut.contiguous(), (layer.weight.shape[2], layer.weight.shape[3]))
    return _signs(averaged).expand(layer.weight.shape).clone()


def _signs(change: Tensor) -> Tensor:
    return torch.where(change.abs() > _UNCHANGED * change.abs().max(), change.sign(), 0)


def _after_first_layer(lab: Lab, params_P: Tensor, inputs: Tensor, buffers: Mapping[str, Tensor] | None) -> Tensor:
    """What enters the second layer, or the outputs of a model that has only one."""
    outputs, entered = lab.inside(params_P, inputs, buffers)
    return list(entered.values())[1] if len(entered) > 1 else outputs
