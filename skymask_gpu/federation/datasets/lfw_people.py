"""Labeled Faces in the Wild (Huang et al., 2007) as its tree of photos, a folder per person."""

from pathlib import Path

import numpy as np
import torch

from skymask_gpu.federation.datasets.photos import read_photo, standardised_by_themselves
from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["load_lfw_people"]

# iDLG's experiments resize the photos to this height and width.
_SIDE = 32


@dataset(
    "lfw-people",
    about="photos of faces, 3 x 32 x 32, a class per person; 5,749 persons, 13,233 photos",
    files=("lfw/NAME/NAME_0001.jpg",),
    origin="lfw.tgz is on vis-www.cs.umass.edu/lfw",
)
def load_lfw_people(folder: Path) -> Dataset:
    """All photos of the standard tree ``lfw/NAME/*.jpg``, resized to 32 x 32 as iDLG does.

    Persons are numbered by name. The last photo of each person who has more than one is a test
    photo; the others are for training. The persons are the subjects, too.
    """
    tree = folder / "lfw" if (folder / "lfw").is_dir() else folder
    persons = [found for one in sorted(tree.glob("*/")) if (found := sorted(one.glob("*.jpg")))]
    if not persons or all(len(photos) == 1 for photos in persons):
        raise ValueError(
            f"data.data_dir must hold lfw/NAME/*.jpg or NAME/*.jpg, with two photos of one person at least; {folder} holds "
            f"photos of {len(persons)} persons"
        )
    train = [(label, path) for label, photos in enumerate(persons) for path in (photos[:-1] or photos)]
    test = [(label, photos[-1]) for label, photos in enumerate(persons) if len(photos) > 1]
    inputs = (np.stack([read_photo(path, "RGB", (_SIDE, _SIDE)) for _, path in part]) for part in (train, test))
    labels, test_labels = (torch.tensor([label for label, _ in part]) for part in (train, test))
    train_inputs, test_inputs = standardised_by_themselves(*inputs)
    return Dataset("lfw-people", train_inputs, labels, test_inputs, test_labels, len(persons), labels)
