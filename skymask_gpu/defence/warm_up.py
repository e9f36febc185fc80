"""``warm_up``: compiles a round's kernels, or loads them from disk, before there is a round."""

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from skymask_gpu.defence.means import mean_of_rows
from skymask_gpu.defence.measured import measure
from skymask_gpu.defence.output_cosines import Groups
from skymask_gpu.defence.settings import Settings
from skymask_gpu.engine import SOLVERS, ClientBlocks, NonFiniteLossError, cluster_masks, train_masks, why_not_solver
from skymask_gpu.engine.replayed_loss import ReplayedLoss
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["warm_up"]

# What three made-up clients send, in lengths of the root direction. They are no longer than it, so
# that the root loss is in its range.
_FACTORS = (1.0, 0.5, 0.25)


def warm_up(settings: Settings, loss: ReplayedLoss, params_P: Tensor, direction_P: Tensor) -> None:
    """Measure three made-up clients, and train, compare and average their masks; nothing is kept.

    All solvers are tried that may be chosen for a real round.
    """
    factors_N = torch.tensor(_FACTORS, device=direction_P.device)
    rows = ClientBlocks([factors_N[:, None] * direction_P])
    everyone_N = torch.ones(len(rows), dtype=torch.bool, device=direction_P.device)
    measure(rows, direction_P, params_P, ColumnShards(rows.num_params), Groups.of(settings.flat.shapes))
    training = replace(settings.training, steps=min(2, settings.training.steps))
    candidates = [name for name, known in SOLVERS.items() if known.cost is not None]
    for name in candidates if settings.solver == "auto" else [settings.solver]:
        if why_not_solver(name, rows.device, rows.dtype) is None:
            # If the loss breaks even here, the round will say so.
            with suppress(NonFiniteLossError):
                masks = train_masks(rows.with_last(direction_P), params_P, loss, config=training, solver=name)
                cluster_masks(masks.bits, masks.num_params, keep_share=masks.keep_share(), config=settings.clustering)
    mean_of_rows(rows, everyone_N)
