"""The network that gradient inversion is measured on: small, smooth, and started far from zero."""

import torch
from torch import Tensor, nn

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["LeNet"]

_CHANNELS = 12


@MODELS.register("lenet")
class LeNet(nn.Module):
    """Three 5 x 5 convolutions of 12 channels with sigmoids, and one linear layer.

    It is the network of DLG (Zhu, Liu and Han, NeurIPS 2019) and iDLG (Zhao, Mopuri and Bilen,
    2020, arXiv 2001.02610): every parameter starts uniformly from -0.5 to 0.5, and sigmoids give
    the loss a second derivative everywhere. It has 13,426 parameters on MNIST. It is the attacker's
    best case, and it hardly learns; federations train other models.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: the number of outputs.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model.name 'lenet' needs images (channels, height, width), got samples of shape {input_shape}")
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for number, stride in enumerate((2, 2, 1)):
            layers += [nn.Conv2d(channels if number == 0 else _CHANNELS, _CHANNELS, 5, stride, padding=2), nn.Sigmoid()]
        self.body = nn.Sequential(*layers)
        # Each stride of 2 halves a side, rounded up.
        self.fc = nn.Linear(_CHANNELS * -(-height // 4) * -(-width // 4), num_classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.body(inputs), 1))
