"""How often a round holds the updates: rows that lie in memory are not copied, and those of a folder are held once."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from collections.abc import Sequence
import torch
from torch import nn
from skymask_gpu import MaskTraining, RootTraining, SkyMask

NUM_CLIENTS = 200
torch.set_num_threads(1)
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
shapes = {name: p.shape for name, p in module.named_parameters()}
num_params = sum(shape.numel() for shape in shapes.values())

class Folder(Sequence):
    '''State dicts that are made when they are asked for, as files are read.'''
    def __len__(self):
        return NUM_CLIENTS
    def __getitem__(self, client):
        if not 0 <= client < NUM_CLIENTS:
            raise IndexError(client)
        generator = torch.Generator().manual_seed(client)
        return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

if sys.argv[1] == "folder":
    updates = Folder()
else:
    updates = 0.01 * torch.randn(NUM_CLIENTS, num_params)
defence = SkyMask(
    module, torch.randn(20, 784), torch.arange(20) % 10,
    training=MaskTraining(steps=3), root_training=RootTraining(steps=2), solver="fused", profile=True,
)
defence.aggregate(0.01 * torch.randn(5, num_params))  # what is loaded once, as compiled kernels are
result = defence.aggregate(updates)
peaks = [cost.peak_bytes for cost in result.profile.phases.values()]
print(json.dumps([None if None in peaks else max(peaks), 4 * NUM_CLIENTS * num_params]))
"""


@pytest.mark.parametrize(("kind", "held"), [("tensor", 1), ("folder", 2)])
def test_fused_holds_the_updates_as_often_as_it_must(kind: str, held: int) -> None:
    """Beside the caller's tensor the logits alone, which are as large; of a folder the rows too. A copy would be one more."""
    # in a process of its own in which freed memory goes back to the system at once, so that the peak is what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": "0"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, kind], env=environment, capture_output=True, text=True, check=True
    )
    peak, updates = json.loads(done.stdout)
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert held * updates < peak < (held + 0.6) * updates
