"""A recurrent network for text, written out so that many clients can be trained side by side."""

import math

import torch
from torch import Tensor, nn

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["LSTM"]

_EMBEDDING, _HIDDEN, _LAYERS = 8, 256, 2


@MODELS.register("lstm")
class LSTM(nn.Module):
    """Two LSTM layers of 256 units over embedded characters; the last state gives the next one.

    It is the network of McMahan et al. (AISTATS 2017) and LEAF for Shakespeare; it has 818,137
    parameters there. The recurrence (Hochreiter and Schmidhuber, 1997) is that of
    ``torch.nn.LSTM``, whose own code ``vmap`` would call for one client after the other.

    Args:
        input_shape: ``(length,)`` of a sequence of whole numbers below ``num_classes``.
        num_classes: the number of characters.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(f"model.name 'lstm' needs sequences (length,) of numbers, got samples of shape {input_shape}")
        self.embed = nn.Embedding(num_classes, _EMBEDDING)
        sizes = [_EMBEDDING] + [_HIDDEN] * (_LAYERS - 1)
        self.inputs = nn.ModuleList(nn.Linear(size, 4 * _HIDDEN) for size in sizes)
        self.states = nn.ModuleList(nn.Linear(_HIDDEN, 4 * _HIDDEN, bias=False) for _ in sizes)
        self.fc = nn.Linear(_HIDDEN, num_classes)
        for layer in (*self.inputs, *self.states):
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(_HIDDEN), 1 / math.sqrt(_HIDDEN))

    def forward(self, inputs: Tensor) -> Tensor:
        sequence = self.embed(inputs)
        for from_inputs, from_state in zip(self.inputs, self.states, strict=True):
            sequence = _run(from_inputs(sequence), from_state)
        return self.fc(sequence[:, -1])


def _run(projected: Tensor, from_state: nn.Module) -> Tensor:
    """The states ``(n, length, hidden)`` of one layer, from its projected inputs."""
    state = cell = torch.zeros_like(projected[:, 0, : projected.shape[-1] // 4])
    states = []
    for step in projected.unbind(1):
        enter, keep, new, leave = (step + from_state(state)).chunk(4, -1)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(leave) * torch.tanh(cell)
        states.append(state)
    return torch.stack(states, 1)
