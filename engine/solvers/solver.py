"""What a solver is, what ``auto`` knows about it, and the registry of all of them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from skymask_gpu.engine.registry import Registry
from skymask_gpu.engine.solvers.solution import Solution
from skymask_gpu.engine.training_config import MaskTraining

__all__ = ["COST_SOURCES", "SOLVERS", "Solver", "solver"]

Train = Callable[..., Solution]
# The unit of a cost differs between devices, but is the same for all solvers on one device: what
# mask training costs per parameter, without the model's own forward and backward passes.
COST_SOURCES = {
    # The unit is nanoseconds.
    "cpu": "by costs measured on a 2-core CPU",
    # The unit is bytes moved.
    "cuda": "by the bytes they move (not measured on a GPU)",
}


def _runs_everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _logits_bytes(num_rows: int, num_params: int, dtype: torch.dtype, config: MaskTraining) -> int:
    return (8 if dtype == torch.float64 else 4) * num_rows * num_params


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A way to train masks, and what has to be known to choose it.

    Attributes:
        train: ``train(updates, global_params_P, loss, config, keep_logits)`` trains the masks of
            all rows. The updates are R rows of P parameters, the root model's row last: an
            ``(R, P)`` tensor, or ClientBlocks with ``takes_blocks``. The global parameters,
            ``(P,)``, are on the same device. ``loss(params (P,)) -> ()`` is differentiable. The
            configuration's ``lr`` and ``grad_clip`` are those for this number of clients.
            ``keep_logits`` asks for the final logits, too. After each step it says
            :func:`skymask_gpu.engine.progress.step_done`.
        exact: whether its masks are the reference's within rounding.
        takes_blocks: whether it works on the updates block by block. Otherwise it gets them as one
            tensor, into which several blocks are copied.
        from_disk: whether it reads the blocks so seldom that they may stay on disk.
        most_rows: the largest number of rows that it takes; None: any number.
        why_not: ``why_not(device, dtype)``: why it cannot run on that device with updates of that
            dtype; None if it can.
        extra_bytes: ``extra_bytes(num_rows, num_params, dtype, config)``: the memory it needs in
            addition to the updates.
        cost: ``cost(device type, num_rows, config)``: what it costs per parameter, in the unit of
            :data:`COST_SOURCES`. ``auto`` takes the cheapest; it takes no solver without a cost
            while another one can run.
    """

    train: Train
    exact: bool = True
    takes_blocks: bool = False
    from_disk: bool = False
    most_rows: int | None = None
    why_not: Callable[[torch.device, torch.dtype], str | None] = _runs_everywhere
    extra_bytes: Callable[[int, int, torch.dtype, MaskTraining], int] = _logits_bytes
    cost: Callable[[str, int, MaskTraining], float] | None = None


SOLVERS: Registry[Solver] = Registry("solver")


def solver(name: str, **attributes: Any) -> Callable[[Train], Train]:
    """A decorator that registers a training function as the solver ``name``.

    An exact solver is compared with the reference by ``tests/engine/test_solvers.py`` as soon as it
    is registered.

    Args:
        name: what ``solver=`` calls it.
        **attributes: those of :class:`Solver` that differ from their defaults.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from skymask_gpu.engine.solvers import reference
        >>> @solver("one-step")
        ... def train(updates_RP, global_params_P, loss, config, keep_logits):
        ...     one_step = MaskTraining(steps=1, lr=config.lr, grad_clip=config.grad_clip)
        ...     return reference.train(updates_RP, global_params_P, loss, one_step, keep_logits)
        >>> from skymask_gpu.engine import train_masks
        >>> updates_RP, start_P = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.zeros(2)
        >>> train_masks(updates_RP, start_P, torch.sum, solver="one-step").steps
        1
        >>> SOLVERS.remove("one-step")
    """

    def enter(train: Train) -> Train:
        SOLVERS.add(name, Solver(train=train, **attributes), inspect.getfile(train))
        return train

    return enter
