"""Which training samples each client and the server have."""

import torch
from torch import Tensor

from skymask_gpu.federation.config import DataConfig
from skymask_gpu.federation.datasets import Dataset, split_root
from skymask_gpu.federation.datasets.partition import partition

__all__ = ["shared_out"]


def shared_out(data: DataConfig, seed: int, dataset: Dataset) -> list[Tensor]:
    """The indices of each client's training samples; the last entry is the root data set."""
    labels = dataset.train_labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    root, rest = split_root(labels, data.root_samples, generator, data.root_bias)
    shares = partition(
        data.partition,
        labels[rest],
        data.clients,
        bias=data.bias,
        alpha=data.alpha,
        subjects=None if dataset.train_subjects is None else dataset.train_subjects.cpu()[rest],
        generator=generator,
    )
    return [*(rest[share] for share in shares), root]
