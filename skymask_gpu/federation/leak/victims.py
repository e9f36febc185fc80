"""The victims of an audit: private images, what they send, and the images around them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.engine.inversion import RowGradients
from skymask_gpu.federation.clients import Batches, train_clients
from skymask_gpu.federation.datasets import Dataset, load_dataset
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.models import build_model

__all__ = ["Victims"]

# A reconstruction is compared with at most this many images of the training data.
_POOL = 10_000
# The window of the structural similarity.
_LEAST_SIDE = 11


@dataclass(frozen=True)
class Victims:
    """V victims, each with K images, at one model. K is 1 if the gradient of one image is seen.

    Attributes:
        module: the model, freshly initialised.
        samples: ``(V, K)``, the numbers of the images in the training data.
        images: ``(V, K, C, H, W)`` float32, with values in [0, 1].
        labels: ``(V, K)`` int64.
        gradients: ``(V, P)``, what the attacker sees: how far the victim's training moved the
            parameters, divided by the negative learning rate and the number of steps. For one image
            and one step, it is the gradient of this image.
        others: ``(V,)``, for each victim the number of another one, of the same class if there is
            one; None if there is one victim only.
        pool: ``(M, C * H * W)``, images with mean 0 and length 1. The victims' own come first.
        layers: each parameter's columns, by name, in order.
    """

    module: nn.Module
    samples: Tensor
    images: Tensor
    labels: Tensor
    gradients: Tensor
    others: Tensor | None
    pool: Tensor
    layers: dict[str, slice]

    @classmethod
    def build(cls, audit: Audit, dataset: Dataset | None = None) -> "Victims":
        """Draw the victims of an audit, and compute what they send.

        Args:
            audit: the settings.
            dataset: its data set, loaded already; None loads it.

        Raises:
            ValueError: a file is missing, the samples are no images or too few or too small, or the
                model does not fit them.
        """
        if dataset is None:
            dataset = load_dataset(audit.data.dataset, Path(audit.data.data_dir) if audit.data.data_dir else None)
        shape = audit.leak.victims, audit.images_per_victim
        count = math.prod(shape)
        order, shown = _drawn(audit, dataset, count)
        images, labels = shown[:count].clone(), dataset.train_labels[order[:count]]
        # Evaluation mode: batch norm takes its running statistics, and nothing is dropped.
        module = build_model(audit.model.name, tuple(images.shape[1:]), dataset.num_classes, audit.seed).eval()
        rows = RowGradients(module)
        gradients = _sent(audit, module, images, labels) if audit.leak.observe == "update" else _of_one(rows, images, labels)
        if not torch.isfinite(gradients).all():
            bad = (~torch.isfinite(gradients).all(1)).nonzero()[:, 0].tolist()
            raise ValueError(
                f"model.name {audit.model.name!r} gives victims {bad[:5]} a gradient with NaN or Inf; take another"
            )
        labels_VK = labels.view(shape)
        return cls(
            module,
            samples=order[:count].view(shape),
            images=images.view(*shape, *images.shape[1:]),
            labels=labels_VK,
            gradients=gradients,
            others=_others(labels_VK[:, 0]),
            pool=normalised(shown.flatten(1)),
            layers=columns_of(rows.shapes),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image, ``(C, H, W)``."""
        return tuple(self.images.shape[2:])

    @property
    def values(self) -> int:
        """The number of values of an image."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> list[int]:
        """The number of columns of each parameter, in order."""
        return [columns.stop - columns.start for columns in self.layers.values()]


def _drawn(audit: Audit, dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The numbers of the victims' images, followed by others', and these images, in [0, 1]."""
    pixels, leak = dataset.train_inputs, audit.leak
    if pixels.dim() != 4:
        raise ValueError(f"data.dataset must hold images, {dataset.name!r} has samples of shape {tuple(pixels.shape[1:])}")
    if count > len(pixels):
        each = audit.images_per_victim
        why = "the training images" if each == 1 else f"since each trains on {each} of the {len(pixels)} training images"
        raise ValueError(f"leak.victims must be at most {len(pixels) // each}, {why} of {dataset.name!r}, got {leak.victims}")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(audit.seed))[: max(_POOL, count)]
    # Data sets are standardised per channel, so their extremes are those of the pixels.
    low, high = (extreme(pixels, (0, 2, 3)).view(1, -1, 1, 1) for extreme in (torch.amin, torch.amax))
    shown = (pixels[order] - low) / (high - low)
    side = leak.side
    if side:
        # Without antialiasing, an image that is made much smaller loses most of its pixels.
        shown = F.interpolate(shown, (side, side), mode="bilinear", align_corners=False, antialias=True)
    if min(shown.shape[2:]) < _LEAST_SIDE:
        raise ValueError(
            f"leak.side must be at least {_LEAST_SIDE}, the window of the structural similarity, for the images of "
            f"{tuple(shown.shape[2:])} pixels of {dataset.name!r}, got {side}"
        )
    return order, shown


def _of_one(rows: RowGradients, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image, ``(V, P)``."""
    return torch.cat([rows(*part) for part in zip(images.split(64), labels.split(64), strict=True)]).detach()


def _sent(audit: Audit, module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What clients send who see each of their images once, as a mean gradient, ``(V, P)``."""
    recipe, start_P = audit.local, nn.utils.parameters_to_vector(module.parameters()).detach()
    index_VSB = torch.arange(len(images)).view(audit.leak.victims, recipe.steps, recipe.batch_size)
    batches = Batches(index_VSB, torch.full((audit.leak.victims,), recipe.steps))
    sent = train_clients(module, start_P, images, labels, batches, recipe).updates
    return sent.div_(-recipe.lr * recipe.steps)


def normalised(rows: Tensor) -> Tensor:
    """Rows with mean 0 and length 1; their products are correlations. A constant row becomes 0."""
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _others(labels: Tensor) -> Tensor | None:
    """For each victim the next one of its class, else the next one."""
    count = len(labels)
    if count == 1:
        return None
    others = []
    for victim in range(count):
        rest = [(victim + step) % count for step in range(1, count)]
        others.append(next((other for other in rest if labels[other] == labels[victim]), rest[0]))
    return torch.tensor(others)
