"""The memory of two rounds with a large frozen base and small adapters, beside one plain pass.

``python -m skymask_gpu.bench.studies.frozen_base`` makes a stack of random frozen layers of one GiB
with low-rank adapters, and judges 20 clients twice. What the passes need is measured first: the
base itself, and what one forward and backward pass by plain autograd holds at most beside it. The
last line is the ratio of the judgement's peak, without the updates, to that. The size of the base
and the number of layers are options.
"""

import argparse
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import MaskTraining, RootTraining, SkyMask
from skymask_gpu.engine.peak_memory import peak_bytes, start_peak

_CPU = torch.device("cpu")
_CLASSES, _SAMPLES, _RANK, _MIB = 10, 4, 4, 2**20


class _Adapted(nn.Module):
    """A frozen layer and two low-rank matrices that are trained (LoRA, arXiv 2106.09685)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.down = nn.Linear(width, _RANK, bias=False)
        self.up = nn.Linear(_RANK, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.base(inputs) + self.up(self.down(inputs)))


def make_model(width: int, layers: int) -> nn.Module:
    """The frozen stack; only adapters are trained."""
    torch.manual_seed(0)
    head = nn.Linear(width, _CLASSES).requires_grad_(False)
    return nn.Sequential(*(_Adapted(width) for _ in range(layers)), head)


def root_data(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(_SAMPLES, width, generator=torch.Generator().manual_seed(0)), torch.arange(_SAMPLES) % _CLASSES


def judge_twice(module: nn.Module, inputs: Tensor, labels: Tensor, updates: Tensor) -> None:
    """Two rounds with few steps: a step needs no more memory than the one before."""
    short = RootTraining(steps=2, grad_clip=float("inf")), MaskTraining(steps=2)
    defence = SkyMask(module, inputs, labels, root_training=short[0], training=short[1])
    for _ in range(2):
        defence.aggregate(updates)


def _held() -> int:
    """The bytes that are held now; the peak counts from here."""
    held = start_peak(_CPU)
    if held is None:
        raise SystemExit("this system does not tell how much memory a process holds; the study needs Linux and glibc")
    return held


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--clients", type=int, default=20)
    options = parser.parse_args(arguments)
    # Libraries are loaded and kernels compiled before anything is measured.
    small = make_model(16, 2)
    judge_twice(small, *root_data(16), _updates(small, options.clients))

    empty = _held()
    module, (inputs, labels) = make_model(options.width, options.layers), root_data(options.width)
    adapters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    base = _held() - empty
    torch.autograd.grad(F.cross_entropy(module(inputs), labels), adapters)
    one_pass = peak_bytes(_CPU) - empty - base
    updates = _updates(module, options.clients)
    _held()
    judge_twice(module, inputs, labels, updates)
    judged = peak_bytes(_CPU) - empty - updates.nbytes
    print(f"frozen base with adapters: {base / _MIB:.0f} MiB; adapters: {updates.shape[1]:,} parameters")
    print(f"one forward and backward pass beside it: {one_pass / _MIB:.0f} MiB")
    print(f"{options.clients} updates: {updates.nbytes / _MIB:.0f} MiB")
    print(f"two rounds, without the updates: {judged / _MIB:.0f} MiB")
    print(f"ratio to base and pass: {judged / (base + one_pass):.3f}")
    return 0


def _updates(module: nn.Module, num_clients: int) -> Tensor:
    num_params = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return 1e-3 * torch.randn(num_clients, num_params, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    sys.exit(main())
