"""The data sets, and how they are shared among the server and the clients.

| file | what |
| --- | --- |
| ``spec.py`` | ``Dataset``, ``DatasetSpec``, the registry ``DATASETS``, ``@dataset`` for your own, ``load_dataset`` |
| ``digits.py``, ``idx.py``, ``cifar.py``, ``har.py`` | one family of data sets each: loader, files, source |
| ``lfw.py``, ``lfw_people.py``, ``orl.py`` | faces: a few grey ones, and two trees of photos |
| ``photos.py`` | photos that lie in files of their own |
| ``femnist.py``, ``shakespeare.py`` | what many people wrote, in the JSON layout that ``leaf.py`` reads |
| ``download.py`` | ``skymask-gpu data``: fetches the files, and checks them |
| ``root_split.py`` | the server's root data set, drawn from the training data |
| ``partition.py`` | which training samples each client holds; the registry ``PARTITIONS`` |
"""

# Importing a family registers its data sets. Errors list them in this order.
# isort: off
from skymask_gpu.federation.datasets import digits, idx, cifar, har, femnist, shakespeare, lfw, lfw_people, orl  # noqa: F401
from skymask_gpu.federation.datasets.root_split import split_root
from skymask_gpu.federation.datasets.spec import DATASETS, Dataset, DatasetSpec, Source, dataset, load_dataset

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "Source", "dataset", "load_dataset", "split_root"]
