"""A small vision transformer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["VisionTransformer"]


@MODELS.register("vit")
class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al., ICLR 2021) for square images of side s.

    It takes ``(n, channels, s, s)`` and returns ``(n, num_classes)``. Patches have side 7 if s
    divides by 7, otherwise 4. Width 64, 4 layers, 4 heads, 128 hidden units; layer norm comes
    first, positions are learned, the mean over the patches replaces the class token, and there is
    no dropout. It has 138,890 parameters on MNIST and 141,898 on CIFAR-10.

    Raises:
        ValueError: the inputs are not square images, or the side divides by neither 7 nor 4.
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
    """Attention, then two linear layers per patch; ``(n, patches, width)`` in and out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, patches, width = x.shape
        # three tensors of shape (n, heads, patches, width of a head)
        q, k, v = self.qkv(self.norm1(x)).reshape(n, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # PyTorch's fused attention has no batching rule for vmap on a CPU, so it is written out.
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, patches, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
