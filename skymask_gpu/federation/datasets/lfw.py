"""Faces for audits of gradient leakage: a few grey ones of Labeled Faces in the Wild."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["load_lfw"]

_FILE = "lfw_subset.npy"
_FACES, _SIDE, _NEW_SIDE, _CLASSES = 100, 25, 28, 10


@dataset(
    "lfw", about="grey faces, 28 x 28; the same 100 in both parts, without true labels", origin="it comes with scikit-image"
)
def load_lfw(folder: Path) -> Dataset:
    """The 100 faces of scikit-image's ``lfw_subset.npy``, made larger from 25 x 25 to 28 x 28.

    The file holds 100 faces (Huang et al., 2007) and then 100 patches without a face, which are
    left out. It is looked for in ``folder``, then in the installed scikit-image. It names nobody,
    so the labels are the numbers of the faces modulo 10, which mean nothing: the faces are there to
    be reconstructed, not to be told apart. They are therefore the test images, too.
    """
    path = folder / _FILE
    if not path.exists():
        found = find_spec("skimage")
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                f"data.dataset 'lfw' needs scikit-image (pip install 'skymask-gpu[privacy]'), or its {_FILE} in data.data_dir"
            )
        path = Path(found.submodule_search_locations[0]) / "data" / _FILE
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data.data_dir: {path} is no NumPy file of images: {error}") from error
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if len(shape) != 3 or shape[0] < _FACES or shape[1:] != (_SIDE, _SIDE) or images.dtype.kind != "f":
        got = f"{getattr(images, 'dtype', type(images).__name__)} {shape}"
        raise ValueError(
            f"data.data_dir: {path} must hold at least {_FACES} images of {_SIDE} x {_SIDE} floats, it holds {got}"
        )
    faces = torch.from_numpy(images[:_FACES]).float()[:, None]
    if not bool(((faces >= 0) & (faces <= 1)).all()):
        raise ValueError(f"data.data_dir: {path} must hold pixels from 0 to 1, it holds others")
    inputs = F.interpolate(faces, size=(_NEW_SIDE, _NEW_SIDE), mode="bilinear", align_corners=False)
    inputs = (inputs - inputs.mean()) / inputs.std()
    labels = torch.arange(_FACES) % _CLASSES
    return Dataset("lfw", inputs, labels, inputs, labels, _CLASSES)
