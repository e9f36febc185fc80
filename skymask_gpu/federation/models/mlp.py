"""Models of linear layers only, for inputs of any shape."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["MLP", "LogisticRegression"]


@MODELS.register("mlp")
class MLP(nn.Module):
    """Two linear layers with 64 hidden units between them (4,810 parameters on digits)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(int(torch.Size(input_shape).numel()), 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(inputs.flatten(1))))


@MODELS.register("logreg")
class LogisticRegression(nn.Module):
    """One linear layer from all inputs to the classes (650 parameters on digits)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(torch.Size(input_shape).numel(), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(inputs.flatten(1))
