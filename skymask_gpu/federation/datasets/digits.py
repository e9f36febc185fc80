"""The digits of scikit-learn: small enough for a demonstration without any download."""

from pathlib import Path

import torch

from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["load_digits"]

_TEST_SAMPLES = 360


@dataset("digits", about="handwritten digits, 8 x 8; 1,437 + 360", origin="it comes with scikit-learn")
def load_digits(folder: Path) -> Dataset:
    """The 1,797 images of scikit-learn; a fixed seed draws 360 of them for testing."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ValueError("data.dataset 'digits' needs scikit-learn: pip install 'skymask-gpu[run]'") from error

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    inputs = (inputs - inputs.mean()) / inputs.std()
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, train = order[:_TEST_SAMPLES], order[_TEST_SAMPLES:]
    return Dataset("digits", inputs[train], targets[train], inputs[test], targets[test], 10)
