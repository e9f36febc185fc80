"""The convolutional network of the SkyMask paper."""

from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.federation.models.registry import MODELS

__all__ = ["PaperCNN"]


@MODELS.register("cnn")
class PaperCNN(nn.Module):
    """The 4-layer CNN of SkyMask (ECCV 2024): conv 30, conv 50, fc 100, fc classes.

    It takes 28x28 images and has 139,960 parameters on MNIST.

    Raises:
        ValueError: the images are not 28x28.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if input_shape[1:] != (28, 28):
            raise ValueError(f"model.name 'cnn' is for 28x28 images, got {input_shape}; use 'mlp'")
        self.conv1 = nn.Conv2d(input_shape[0], 30, 3)
        self.conv2 = nn.Conv2d(30, 50, 3)
        self.fc1 = nn.Linear(50 * 5 * 5, 100)
        self.fc2 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # ReLU and max pooling commute, and pooling first leaves a quarter of the work to ReLU.
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
