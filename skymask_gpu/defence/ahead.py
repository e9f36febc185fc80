"""What does not need the updates: done ahead of a round, or kept from round to round.

``SkyMask.prepare`` trains the root direction while the clients train, and ``judge`` takes it from
here. It is kept until the next preparation, so that every call at these parameters finds it. The
root model, whose passes are captured on a GPU, is kept for as long as the ``SkyMask`` itself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skymask_gpu.defence.forms import Form
from skymask_gpu.defence.root import Direction, batches_of, train_direction, warn_of_no_gradient
from skymask_gpu.defence.settings import Settings, params_of
from skymask_gpu.defence.warm_up import warm_up
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.replayed_loss import ReplayedLoss

__all__ = ["Ahead", "RootModel", "takes_small_batches"]


@dataclass
class RootModel:
    """The root loss on one device, and its passes, which serve all rounds there.

    Attributes:
        flat: the loss as a function of all parameters.
        loss: the same with its passes, on all root data.
    """

    flat: FlatModel
    loss: ReplayedLoss
    _made_of: FlatModel
    _batches: dict[bool, list[ReplayedLoss]] = field(default_factory=dict)

    def direction(self, params_P: Tensor, settings: Settings, small_batches: bool) -> Direction:
        """As :func:`skymask_gpu.defence.root.train_direction`."""
        if small_batches not in self._batches:
            self._batches[small_batches] = batches_of(self.flat, settings.root_training, small_batches=small_batches)
        return train_direction(self._batches[small_batches], params_P, settings.root_training)


@dataclass(frozen=True)
class _Trained:
    params_P: Tensor
    small_batches: bool
    direction_P: Tensor
    moved: bool


class Ahead:
    """What one ``SkyMask`` keeps. Several threads may use it at the same time.

    A copy of it starts with nothing.
    """

    def __init__(self) -> None:
        self._preparing = threading.Lock()
        self._trained: _Trained | None = None
        self._warm: set[torch.device] = set()
        self._models: dict[object, RootModel] = {}

    def __reduce__(self) -> tuple[type["Ahead"], tuple[()]]:
        return Ahead, ()

    @contextmanager
    def root_model(self, settings: Settings, device: torch.device) -> Iterator[RootModel]:
        """The root model on a device. Nobody else has it meanwhile, and who asks gets another."""
        # A captured graph belongs to the stream on which it was captured.
        place: object = torch.cuda.current_stream(device) if device.type == "cuda" else device
        model = self._models.pop(place, None)
        if model is None:
            flat = settings.flat.to(device)
            model = RootModel(flat, ReplayedLoss(flat), settings.flat)
        if model._made_of is not settings.flat:
            model.flat = model.flat.starting_at(settings.flat.initial_params.to(device))
            model._made_of = settings.flat
        try:
            yield model
        finally:
            self._models[place] = model

    def prepare(self, settings: Settings, global_params: Form | None) -> None:
        """Train the root direction, and compile; see :meth:`skymask_gpu.SkyMask.prepare`."""
        own = settings.flat.initial_params.device
        device = settings.device or (global_params.device if isinstance(global_params, Tensor) else own)
        small_batches = takes_small_batches(settings, root_update_given=False)
        with without_tf32(), torch.inference_mode(False), torch.enable_grad(), self.root_model(settings, device) as model:
            with self._preparing:
                self._trained = None
                # A copy, because the caller may change the parameters afterwards.
                params_P = params_of(global_params, model.flat, settings).clone()
                found = model.direction(params_P, settings, small_batches)
                moved = found.has_moved(found.facts.tolist())
                self._trained = _Trained(params_P, small_batches, found.values, moved)
            if device not in self._warm:
                self._warm.add(device)
                warm_up(settings, model.loss, params_P, found.values)

    def direction(self, model: RootModel, params_P: Tensor, settings: Settings, small_batches: bool) -> Direction:
        """The root direction from these parameters.

        It is the kept direction if that is from exactly these parameters; then there is the warning
        of :func:`skymask_gpu.defence.root_direction`, too. It is trained otherwise. A preparation
        that is under way is waited for.
        """
        with self._preparing:
            kept = self._trained
        if kept is None or kept.small_batches != small_batches or not _same_bits(kept.params_P, params_P):
            return model.direction(params_P, settings, small_batches)
        if not kept.moved:
            warn_of_no_gradient()
        return Direction.known(kept.direction_P)


def _same_bits(a_P: Tensor, b_P: Tensor) -> bool:
    """Whether two float32 vectors are the same, also in the sign of a zero."""
    return a_P.device == b_P.device and torch.equal(a_P.view(torch.int32), b_P.contiguous().view(torch.int32))


def takes_small_batches(settings: Settings, *, root_update_given: bool) -> bool:
    """Whether the root direction is trained on small batches.

    The rules other than ``signed`` trust the root model's row. If the direction serves as that row,
    it is trained on all root data, because small batches take it far from clients with larger ones.
    """
    return root_update_given or settings.clustering.rule == "signed"
