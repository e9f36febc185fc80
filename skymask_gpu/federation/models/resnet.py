"""Residual networks for small images, with batch norm or with group norm."""

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["ResNet"]

Norm = Literal["batch", "group"]


class ResNet(nn.Module):
    """A residual network for small images (He et al., CVPR 2016).

    It takes ``(n, channels, height, width)`` and returns ``(n, num_classes)``. It has a 3x3
    convolution, then stages of basic blocks, then the mean over the image and one linear layer.
    Every stage after the first halves the image. Where a stage changes the shape, the shortcut is a
    1x1 convolution (option B of the paper).

    * ``resnet20``: widths 16, 32, 64 and 3 blocks per stage (section 4.2 of the paper); 272,474
      parameters on CIFAR-10.
    * ``resnet18``: widths 64 to 512 and 2 blocks per stage (table 1, except that the first
      convolution is 3x3 and no pooling follows it); 11,173,962 parameters on CIFAR-10.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: the number of outputs.
        widths: the channels of each stage.
        blocks: the number of basic blocks per stage.
        norm: ``"batch"``, or ``"group"`` with groups of 16 channels (Wu & He, ECCV 2018), which
            treats each sample by itself; both have the same parameters.

    Raises:
        ValueError: the inputs are not images.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, *, widths: tuple[int, ...], blocks: int, norm: Norm
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model.name: a ResNet is for images, got inputs of shape {input_shape}; use 'mlp' or 'logreg'")
        self.conv = _conv(input_shape[0], widths[0])
        self.norm = _norm(norm, widths[0])
        layers, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_BasicBlock(before, width, 2 if stage > 0 and block == 0 else 1, norm))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(images))))
        return self.fc(x.mean((2, 3)))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), _norm(norm, width)
        self.conv2, self.norm2 = _conv(width, width), _norm(norm, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), _norm(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv(before: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False)


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels // 16, channels)


_RESNET20 = partial(ResNet, widths=(16, 32, 64), blocks=3)
_RESNET18 = partial(ResNet, widths=(64, 128, 256, 512), blocks=2)
MODELS.register("resnet20")(partial(_RESNET20, norm="batch"))
MODELS.register("resnet20-gn")(partial(_RESNET20, norm="group"))
MODELS.register("resnet18")(partial(_RESNET18, norm="batch"))
MODELS.register("resnet18-gn")(partial(_RESNET18, norm="group"))
