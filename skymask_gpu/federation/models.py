"""The models of the experiments."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "MODELS", "PaperCNN", "build_model"]


class MLP(nn.Module):
    """Two layers for small images: inputs, 64 hidden units, classes (4,810 parameters on digits)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(int(torch.Size(input_shape).numel()), 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(images.flatten(1))))


class PaperCNN(nn.Module):
    """The 4-layer CNN of SkyMask for 28x28 images: conv 30, conv 50, fc 100, fc classes (139,960 parameters)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if input_shape[1:] != (28, 28):
            raise ValueError(f"model.name 'cnn' is for 28x28 images, got {input_shape}; use 'mlp'")
        self.conv1 = nn.Conv2d(input_shape[0], 30, 3)
        self.conv2 = nn.Conv2d(30, 50, 3)
        self.fc1 = nn.Linear(50 * 5 * 5, 100)
        self.fc2 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # relu and max pooling commute: pooling first leaves a quarter of the work
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


MODELS = {"mlp": MLP, "cnn": PaperCNN}


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised model; the same seed gives the same parameters, and the global random state is left alone.

    Raises:
        ValueError: unknown name, or the model does not fit the images.
    """
    if name not in MODELS:
        raise ValueError(f"model.name must be one of {', '.join(MODELS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](input_shape, num_classes)
