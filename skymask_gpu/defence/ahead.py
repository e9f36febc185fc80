"""What a round needs of the server alone, done ahead of it: the root direction of a global model.

``SkyMask.prepare`` trains it while the clients train, and ``judge`` takes it from here. It is kept
until the next preparation, so that every call at these parameters finds it.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.defence.forms import Form
from skymask_gpu.defence.root import RootTraining, train_direction, warn_of_no_gradient
from skymask_gpu.defence.settings import Settings, params_of
from skymask_gpu.defence.warm_up import warm_up
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.numerics import without_tf32

__all__ = ["Ahead", "takes_small_batches"]


@dataclass(frozen=True)
class _Trained:
    params_P: Tensor
    small_batches: bool
    direction_P: Tensor
    moved: bool


class Ahead:
    """The root direction of the latest preparation. Several threads may use it at the same time.

    A copy of it starts with nothing.
    """

    def __init__(self) -> None:
        self._preparing = threading.Lock()
        self._trained: _Trained | None = None
        self._warm: set[torch.device] = set()

    def __reduce__(self) -> tuple[type["Ahead"], tuple[()]]:
        return Ahead, ()

    def prepare(self, settings: Settings, global_params: Form | None) -> None:
        """Train the root direction, and compile; see :meth:`skymask_gpu.SkyMask.prepare`."""
        own = settings.flat.initial_params.device
        device = settings.device or (global_params.device if isinstance(global_params, Tensor) else own)
        small_batches = takes_small_batches(settings, root_update_given=False)
        with without_tf32(), torch.inference_mode(False), torch.enable_grad():
            with self._preparing:
                self._trained = None
                loss = settings.flat.to(device)
                # A copy, because the caller may change the parameters afterwards.
                params_P = params_of(global_params, loss, settings).clone()
                found = train_direction(loss, params_P, settings.root_training, small_batches=small_batches)
                self._trained = _Trained(params_P, small_batches, *found)
            if device not in self._warm:
                self._warm.add(device)
                warm_up(settings, loss, params_P, found[0])

    def direction(self, loss: FlatModel, params_P: Tensor, config: RootTraining, small_batches: bool) -> Tensor:
        """What :func:`skymask_gpu.defence.root_direction` returns, with its warning and its errors.

        It is the kept direction if that is from exactly these parameters, and is trained otherwise.
        A preparation that is under way is waited for.
        """
        with self._preparing:
            kept = self._trained
        if kept is not None and kept.small_batches == small_batches and _same_bits(kept.params_P, params_P):
            direction_P, moved = kept.direction_P, kept.moved
        else:
            direction_P, moved = train_direction(loss, params_P, config, small_batches=small_batches)
        if not moved:
            warn_of_no_gradient()
        return direction_P


def _same_bits(a_P: Tensor, b_P: Tensor) -> bool:
    """Whether two float32 vectors are the same, also in the sign of a zero."""
    return a_P.device == b_P.device and torch.equal(a_P.view(torch.int32), b_P.contiguous().view(torch.int32))


def takes_small_batches(settings: Settings, *, root_update_given: bool) -> bool:
    """Whether the root direction is trained on small batches.

    The rules other than ``signed`` trust the root model's row. If the direction serves as that row,
    it is trained on all root data, because small batches take it far from clients with larger ones.
    """
    return root_update_given or settings.clustering.rule == "signed"
