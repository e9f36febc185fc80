"""``Settings``, which a ``SkyMask`` was made with, and ``Call``, the arguments of one call."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.defence.arguments import check_same_device, flat_vector
from skymask_gpu.defence.forms import Form
from skymask_gpu.defence.history import ClientHistory
from skymask_gpu.defence.means import Mean, NormBound
from skymask_gpu.defence.parse import Updates
from skymask_gpu.defence.root import RootTraining
from skymask_gpu.engine import Clustering, FlatModel, MaskTraining
from skymask_gpu.engine.progress import Progress

__all__ = ["Call", "Settings", "params_of"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What stays the same from round to round; :class:`skymask_gpu.SkyMask` has checked it.

    ``flat`` computes in float32.
    """

    module: nn.Module
    flat: FlatModel
    training: MaskTraining
    clustering: Clustering
    root_training: RootTraining
    norm_bound: NormBound
    mean: Mean
    solver: str
    device: torch.device | None
    profile: bool


@dataclass(frozen=True)
class Call:
    """The arguments of one :meth:`skymask_gpu.SkyMask.aggregate`, as the caller gave them."""

    updates: Updates
    global_params: Form | None
    root_update: Form | None = None
    local_models: bool = False
    weights: Tensor | np.ndarray | Sequence[float] | None = None
    client_ids: Sequence[int | str] | None = None
    history: ClientHistory | None = None
    progress: Progress | None = None


def params_of(global_params: Form | None, loss: FlatModel, settings: Settings) -> Tensor:
    """Global parameters in any of their forms as ``(P,)`` float32, on the device of ``loss``.

    None stands for those of ``loss``.
    """
    if global_params is None:
        return loss.initial_params
    if isinstance(global_params, Tensor):
        check_same_device("global_params", global_params, loss, settings.device)
    return flat_vector("global_params", global_params, loss, settings.module)
