"""The models of the experiments.

Those with group norm, and those without convolutions, run under ``vmap(grad)``; batch norm keeps running statistics, so it runs
there only with buffers of its own for each client.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.io.user_files import build_module

__all__ = ["MLP", "MODELS", "LogisticRegression", "PaperCNN", "ResNet", "VisionTransformer", "build_model"]

Norm = Literal["batch", "group"]


class LogisticRegression(nn.Module):
    """One linear layer from all inputs to the classes (650 parameters on digits)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(torch.Size(input_shape).numel(), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(inputs.flatten(1))


class MLP(nn.Module):
    """Two layers for small inputs: inputs, 64 hidden units, classes (4,810 parameters on digits)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(int(torch.Size(input_shape).numel()), 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(inputs.flatten(1))))


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


class ResNet(nn.Module):
    """A residual network for small images (He et al., CVPR 2016), ``(n, channels, height, width)`` to ``(n, num_classes)``.

    A 3x3 convolution, stages of basic blocks that halve the image from the second one on, the mean over the image, one linear
    layer. Where a stage changes the shape the shortcut is a 1x1 convolution (option B).

    ============ =========================== ==================================================================================
    ``resnet20`` widths 16, 32, 64; 3 blocks section 4.2; 272,474 parameters on CIFAR-10
    ``resnet18`` widths 64 to 512; 2 blocks  table 1, but for the first convolution and no first pooling; 11,173,962 parameters
    ============ =========================== ==================================================================================

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: outputs.
        widths: channels of each stage.
        blocks: basic blocks a stage.
        norm: ``"batch"``, or ``"group"`` with groups of 16 channels (Wu & He, ECCV 2018), which treats each sample by itself;
            both have the same parameters.

    Raises:
        ValueError: the inputs are no images.
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


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al., ICLR 2021) for square images, ``(n, channels, s, s)`` to classes.

    Patches of 7 if the side s divides by 7, else of 4; width 64, 4 layers, 4 heads, 128 hidden units; layer norm first, learned
    positions, the mean over the patches instead of a class token, no dropout. 138,890 parameters on MNIST, 141,898 on CIFAR-10.

    Raises:
        ValueError: the inputs are no square images, or the side divides by neither 7 nor 4.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or input_shape[1] != input_shape[2] or (input_shape[1] % 7 and input_shape[1] % 4):
            raise ValueError(
                f"model.name 'vit' is for square images whose side divides by 7 or 4, got inputs of shape {input_shape}; "
                "use 'mlp' or 'logreg'"
            )
        channels, side, _ = input_shape
        self.patch = 4 if side % 7 else 7
        self.embed = nn.Linear(channels * self.patch**2, 64)
        self.position = nn.Parameter(0.02 * torch.randn((side // self.patch) ** 2, 64))
        self.blocks = nn.Sequential(*(_TransformerBlock(64, 4, 128) for _ in range(4)))
        self.norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        n, channels, side, _ = images.shape
        rows, patch = side // self.patch, self.patch
        patches = images.reshape(n, channels, rows, patch, rows, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, rows**2, -1)
        x = self.blocks(self.embed(patches) + self.position)
        return self.fc(self.norm(x).mean(1))


class _TransformerBlock(nn.Module):
    """Attention, then two layers for each patch by itself, ``(n, patches, width)`` to the same."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, patches, width = x.shape
        # (3, n, heads, patches, width of a head)
        q, k, v = self.qkv(self.norm1(x)).reshape(n, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # written out: PyTorch's fused attention has no batching rule for vmap on a CPU
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, patches, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


_RESNET20 = partial(ResNet, widths=(16, 32, 64), blocks=3)
_RESNET18 = partial(ResNet, widths=(64, 128, 256, 512), blocks=2)
MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": MLP,
    "cnn": PaperCNN,
    "logreg": LogisticRegression,
    "resnet20": partial(_RESNET20, norm="batch"),
    "resnet20-gn": partial(_RESNET20, norm="group"),
    "resnet18": partial(_RESNET18, norm="batch"),
    "resnet18-gn": partial(_RESNET18, norm="group"),
    "vit": VisionTransformer,
}


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised model; the same seed gives the same parameters, and the global random state is left alone.

    Args:
        name: key of :data:`MODELS`, or ``"path/to/file.py:Class"``, the user's own, which is called without arguments.
        input_shape: of one sample, ``(channels, height, width)`` or ``(features,)``.
        num_classes: outputs of the model.
        seed: of the parameters.

    Raises:
        ValueError: unknown name, the model does not fit the inputs or the classes, or the user's file has no such class.
    """
    if ".py:" not in name and name not in MODELS:
        raise ValueError(f"model.name must be one of {', '.join(MODELS)}, or file.py:Class, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](input_shape, num_classes) if name in MODELS else _users_model(name, input_shape, num_classes)


def _users_model(spec: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """An instance of the class in ``"file.py:Class"``, which takes such inputs and gives so many outputs."""
    module, name = build_module("model.name", spec), spec.rpartition(":")[2]
    module.eval()  # a look at the outputs leaves batch norm's statistics alone
    try:
        with torch.no_grad():
            outputs = module(torch.zeros((2, *input_shape)))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"model.name: {name} does not take inputs of shape {(2, *input_shape)}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_classes):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model.name: {name} must return (n, {num_classes}) for {num_classes} classes, got {found} for n = 2")
    return module.train()
