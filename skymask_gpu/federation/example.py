"""The files of one federated round, to try ``skymask-gpu aggregate`` on.

They come from real local training, and some clients really attack.
"""

from pathlib import Path

import numpy as np
import torch

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.clients import LocalTraining, draw_batches, train_clients
from skymask_gpu.federation.datasets import load_dataset, split_root
from skymask_gpu.federation.datasets.partition import partition
from skymask_gpu.federation.models import build_model
from skymask_gpu.io.files import write_tensors, write_text, write_whole

__all__ = ["MALICIOUS", "NUM_CLIENTS", "write_example"]

NUM_CLIENTS = 20
MALICIOUS = (3, 7, 12, 18)
# An attacker multiplies what it learnt by this before it sends it. The four attackers together then
# undo what the other sixteen clients learnt.
_FACTOR = -5
_SEED = 0
_MODEL = '''"""The model of the example: build yours likewise, as a class that needs no arguments."""

from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
'''


def write_example(folder: Path) -> dict[Path, str]:
    """Write a global model, its class, root data, and the updates of 20 clients.

    The clients ``MALICIOUS`` send minus five times what they learnt. All clients train with the
    learning rate and the clip that ``aggregate`` uses for the root model by default.

    Returns:
        Each file or folder that was written, with a description of it.

    Raises:
        ValueError: ``folder`` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"DIR must be empty or not there, {folder} is not; name another folder")
    write_text(folder / "my_model.py", _MODEL)
    dataset = load_dataset("digits")
    module = build_model(f"{folder / 'my_model.py'}:Net", tuple(dataset.train_inputs.shape[1:]), dataset.num_classes, _SEED)
    write_tensors(folder / "global.safetensors", module.state_dict())

    generator = torch.Generator().manual_seed(_SEED)
    root, rest = split_root(dataset.train_labels, 100, generator)
    inputs, labels = dataset.train_inputs, dataset.train_labels
    root_inputs, root_labels = inputs[root], labels[root]

    def save_root(temporary: Path) -> None:
        np.savez(temporary, inputs=root_inputs.numpy(), labels=root_labels.numpy())

    write_whole(folder / "root.npz", save_root)

    shares = partition("iid", labels[rest], NUM_CLIENTS, bias=0.0, alpha=1.0, subjects=None, generator=generator)
    recipe = LocalTraining(steps=10, batch_size=32, lr=0.1, grad_clip=1e-2)
    flat = FlatModel(module, root_inputs, root_labels)
    batches = draw_batches([rest[share] for share in shares], recipe, generator)
    updates_NP = train_clients(module, flat.initial_params, inputs, labels, batches, recipe).updates
    updates_NP[list(MALICIOUS)] *= _FACTOR
    for client, update_P in enumerate(updates_NP):
        write_tensors(folder / "updates" / f"client{client:02}.safetensors", flat.unflatten(update_P))
    return {
        folder / "my_model.py": "the model's class",
        folder / "global.safetensors": "the global model, a state dict",
        folder / "updates": f"what {NUM_CLIENTS} clients send after local training, a state dict each",
        folder / "root.npz": "the server's own clean samples",
    }
