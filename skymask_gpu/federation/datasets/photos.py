"""Photos that lie in files of their own, which Pillow reads."""

from pathlib import Path

import numpy as np
from torch import Tensor

from skymask_gpu.federation.datasets.spec import standardised

__all__ = ["read_photo", "standardised_by_themselves"]


def read_photo(path: Path, mode: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of one file, ``(channels, height, width)`` uint8.

    Args:
        path: the file; its format is found from its content.
        mode: ``"RGB"`` or ``"L"`` for grey; photos are converted to it.
        size: the width and height that the photo is resized to; None leaves it as it is.

    Raises:
        ValueError: Pillow is missing, or the file is no whole photo; the message names it.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ValueError("photos need Pillow: pip install 'skymask-gpu[privacy]'") from error
    try:
        with Image.open(path) as photo:
            pixels = photo.convert(mode)
            if size is not None:
                pixels = pixels.resize(size, Image.Resampling.BILINEAR)
            return np.atleast_3d(np.asarray(pixels)).transpose(2, 0, 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data.data_dir: {path} is no whole photo: {error}") from error


def standardised_by_themselves(train_NCHW: np.ndarray, test_NCHW: np.ndarray) -> tuple[Tensor, Tensor]:
    """Training and test photos of bytes, by the training photos' mean and deviation per channel."""
    pixels = train_NCHW / np.float32(255)
    mean, std = pixels.mean((0, 2, 3), dtype=np.float64), pixels.std((0, 2, 3), dtype=np.float64)
    constants = tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
    return standardised(train_NCHW, *constants), standardised(test_NCHW, *constants)
