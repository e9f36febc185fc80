"""Human activity recognition with smartphones (Anguita et al., ESANN 2013): two CSV files."""

import csv
from pathlib import Path

import numpy as np
import torch

from skymask_gpu.federation.datasets.spec import Dataset, dataset

__all__ = ["load_har"]

_FEATURES = 561
_FILES = ("train.csv", "test.csv")
_TRAINING_SHARE = 0.75


@dataset(
    "har",
    about="561 features of motion per sample, 6 activities of 30 persons",
    files=_FILES,
    origin="train.csv and test.csv are on Kaggle, uciml/human-activity-recognition-with-smartphones",
)
def load_har(folder: Path) -> Dataset:
    """Both files pooled, then 75% of each person's samples for training and 25% for testing.

    This split is that of FLTrust (Cao et al., NDSS 2021); a fixed seed draws it. The files have 561
    columns of features and the columns ``subject`` and ``Activity``, in any order.
    """
    features, subjects, activities = zip(*(_read_csv(folder / name) for name in _FILES), strict=True)
    names = sorted(set(activities[0]))
    if names != sorted(set(activities[1])):
        raise ValueError(
            f"data.data_dir: train.csv and test.csv in {folder} must have the same activities, they have {', '.join(names)} "
            f"and {', '.join(sorted(set(activities[1])))}"
        )
    inputs = torch.from_numpy(np.concatenate(features))
    labels = torch.from_numpy(np.searchsorted(names, np.concatenate(activities)))
    subject_n = torch.from_numpy(np.unique(np.concatenate(subjects), return_inverse=True)[1])
    is_train = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for subject in range(int(subject_n.max()) + 1):
        of_subject = (subject_n == subject).nonzero().flatten()
        order = torch.randperm(len(of_subject), generator=generator)
        is_train[of_subject[order[: round(_TRAINING_SHARE * len(of_subject))]]] = True
    train, test = is_train, ~is_train
    return Dataset("har", inputs[train], labels[train], inputs[test], labels[test], len(names), subject_n[train])


def _read_csv(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features ``(n, 561)`` float32, subjects ``(n,)`` int64, activities ``(n,)`` str of a file."""
    if not path.exists():
        raise ValueError(f"data.data_dir must hold {path.name}, it is not in {path.parent}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
            wanted = [i for i, column in enumerate(columns) if column not in ("subject", "Activity")]
            if len(wanted) != _FEATURES or len(columns) != _FEATURES + 2:
                raise ValueError(
                    f"it must have {_FEATURES} feature columns, 'subject' and 'Activity', it has {len(wanted)} columns "
                    f"of other names out of {len(columns)}"
                )
            subject, activity = columns.index("subject"), columns.index("Activity")
            lines = file.readlines()
            if not lines:
                raise ValueError("it has no rows")
            rows = np.loadtxt(
                lines,
                dtype=[("features", np.float32, (_FEATURES,)), ("subject", np.int64), ("activity", "U64")],
                delimiter=",",
                quotechar='"',
                comments=None,
                usecols=[*wanted, subject, activity],
                ndmin=1,
            )
        if not np.isfinite(rows["features"]).all():
            raise ValueError("a feature is not finite")
    # a UnicodeDecodeError is a ValueError, and NumPy raises one for rows that are cut short
    except ValueError as error:
        raise ValueError(f"data.data_dir: {path} is no CSV file of the HAR data: {error}") from error
    return rows["features"], rows["subject"], rows["activity"]
