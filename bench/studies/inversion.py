"""Reconstructions per second: many victims in one batch, beside a loop over torch's LBFGS.

``python -m skymask_gpu.bench.studies.inversion DIR`` prints the table of docs/privacy.md; DIR holds
MNIST's files. The loop is DLG's: one image, a graph of its own, L-BFGS with learning rate 1. Both
stop at a matching loss of 1e-6, attack the same victims from the same starts, and have their images
compared before a ratio is printed. Loop and batch alternate, with as many threads as torch has. CPU
seconds of all threads are counted, too, since wall times depend on what else runs.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.engine.inversion import SCALE, Known, Matching, RowGradients, minimise
from skymask_gpu.engine.similarity import ssim
from skymask_gpu.federation.leak.config import Audit, LeakConfig, LeakData
from skymask_gpu.federation.leak.victims import Victims

_ROWS = (32, 128)
_REPEATS = 3
# The loop attacks this many victims per repeat: it needs seconds for each.
_LOOPED = 4
_TARGET, _EVALUATIONS = 1e-6, 700
_CLOCKS = {"second": time.perf_counter, "CPU second": time.process_time}
# torch.optim.LBFGS takes this many steps per call by default.
_INNER = 20


def looped(victims: Victims, number: int, start_D: Tensor) -> Tensor:
    """One victim's image by the published loop."""
    module, parameters = victims.module, list(victims.module.parameters())
    target = victims.gradients[number]
    scale = SCALE / target.square().sum()
    point = start_D.view(1, *victims.shape).clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], lr=1, max_iter=_INNER)
    calls, last = 0, torch.inf

    def closure() -> Tensor:
        nonlocal calls, last
        calls += 1
        optimiser.zero_grad()
        loss = F.cross_entropy(module(point), victims.labels[number])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = scale * (torch.cat([one.reshape(-1) for one in gradients]) - target).square().sum()
        distance.backward(inputs=[point])
        last = float(distance.detach())
        return distance

    while calls < _EVALUATIONS and last >= _TARGET:
        before = calls
        optimiser.step(closure)
        # A step that evaluates once has met torch's own tolerance, or NaN: no later step goes on.
        if calls - before <= 1:
            break
    return point.detach()


def batched(victims: Victims, start_BD: Tensor) -> Tensor:
    """The images of the first B victims in one batch."""
    count = len(start_BD)
    loss = Matching(
        RowGradients(victims.module),
        Known.exactly(victims.gradients[:count]),
        victims.labels[:count, 0],
        victims.shape,
    )
    found = minimise(loss, start_BD, evaluations=_EVALUATIONS, target=_TARGET)
    return found.points.view(count, *victims.shape)


def main(data_dir: Path) -> None:
    audit = Audit(data=LeakData(dataset="mnist", data_dir=str(data_dir)), leak=LeakConfig(victims=max(_ROWS)))
    victims = Victims.build(audit)
    start_BD = torch.rand(max(_ROWS), victims.values, generator=torch.Generator().manual_seed(1))
    ratios: dict[tuple[int, str], list[float]] = {(rows, clock): [] for rows in _ROWS for clock in _CLOCKS}
    print("| how | s per image | CPU s per image | leaked at SSIM 0.9 |\n| --- | --- | --- | --- |", flush=True)
    for repeat in range(_REPEATS):
        own = range(repeat * _LOOPED, (repeat + 1) * _LOOPED)
        begun = [clock() for clock in _CLOCKS.values()]
        images = torch.cat([looped(victims, number, start_BD[number]) for number in own])
        loop = _each(begun, _LOOPED)
        _print("loop", loop, victims.images[own.start : own.stop, 0], images)
        for rows in _ROWS:
            begun = [clock() for clock in _CLOCKS.values()]
            images = batched(victims, start_BD[:rows])
            batch = _each(begun, rows)
            _print(f"batch of {rows}", batch, victims.images[:rows, 0], images)
            for clock, slow, fast in zip(_CLOCKS, loop, batch, strict=True):
                ratios[rows, clock].append(slow / fast)
    for (rows, clock), repeats in ratios.items():
        ratio = Ratio.of(repeats)
        if ratio is not None:
            print(f"batch of {rows}: {ratio.value:.1f} ({ratio.low:.1f} to {ratio.high:.1f}) times as many images per {clock}")


def _each(begun: list[float], number: int) -> list[float]:
    """The time per image on each clock."""
    return [(clock() - then) / number for clock, then in zip(_CLOCKS.values(), begun, strict=True)]


def _print(how: str, seconds: list[float], images: Tensor, found: Tensor) -> None:
    leaked = float((ssim(images, torch.nan_to_num(found)) >= 0.9).double().mean())
    print(f"| {how} | {' | '.join(f'{one:.3f}' for one in seconds)} | {leaked:.0%} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m skymask_gpu.bench.studies.inversion DIR, the folder of MNIST's files")
    main(Path(sys.argv[1]))
