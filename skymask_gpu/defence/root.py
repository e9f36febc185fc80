"""The root direction: an update that the server itself trains on its clean root data.

It is trained in small batches, which costs half as much as on all root data with 100 root samples,
and less with more. It is trained on all root data if there is no other root update and the rule of
the verdict trusts the root model's row, because the direction then serves as that row.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.replayed_loss import ReplayedLoss

__all__ = ["Direction", "RootTraining", "batches_of", "root_direction", "train_direction", "warn_of_no_gradient"]

# In smaller batches, the noise of single samples and the statistics of batch norm decide where a
# step leads. With bold local steps (a learning rate of 1), batches of 10 led anywhere: the cosines
# no longer told flipped signs from honest updates. Batches of 50 tell them as well as all root
# data do (tests/test_root_direction.py). A smaller learning rate is no remedy, because a shorter
# way follows single label groups, and others are then rejected without an attack.
_FEWEST_SAMPLES = 50


@dataclass(frozen=True, kw_only=True)
class RootTraining:
    """How the server trains the root direction.

    This is the clients' local recipe with more steps, so that the direction can be trusted. Use the
    clients' own learning rate and clip. A root model that is trained otherwise has a mask of
    another kind, far from those of all clients.

    Each step is taken on one of several batches of at least 50 root samples. With the rules
    ``two-stage`` and ``published``, which trust the root model's row, each is taken on the whole
    root set if the caller passes no root update.

    Attributes:
        steps: the number of SGD steps, at least 1.
        lr: the learning rate, above 0.
        grad_clip: the bound on each element of the gradient, above 0; ``inf`` for no clipping.
        optimizer: makes the clients' optimizer, anew in each round, by ``optimizer([params],
            lr=lr)``, such as ``torch.optim.Adam``; ``functools.partial`` gives it more arguments.
            It steps with the clipped gradient. ``params`` is one ``(P,)`` vector of all parameters,
            so that the optimizer must treat each element by itself. None means plain SGD. What does
            not fit this form can be trained by the caller and passed as ``root_update=``.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> RootTraining(lr=0.05, grad_clip=float("inf"))
        RootTraining(steps=20, lr=0.05, grad_clip=inf, optimizer=None)
        >>> adam = RootTraining(lr=1e-3, grad_clip=float("inf"), optimizer=torch.optim.Adam)
    """

    # Each step costs half as much as the model's part of a mask step, with 100 root samples. After
    # 20 the cosines order attackers and honest clients about as well as after 40
    # (tests/test_root_direction.py). In a trial with gentle local steps (the demo's federation with
    # lr = 0.1), 10 steps missed flipped signs in three of eight rounds, and 20 in none.
    steps: int = 20
    lr: float = 0.1
    grad_clip: float = 1e-2
    optimizer: Callable[..., torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"RootTraining.steps must be an integer of at least 1, got {self.steps!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"RootTraining.lr must be a finite number above 0, got {self.lr!r}")
        if not self.grad_clip > 0:
            raise ValueError(f"RootTraining.grad_clip must be above 0 (inf: no clipping), got {self.grad_clip!r}")
        if self.optimizer is not None and not _makes_optimizers(self.optimizer, self.lr):
            raise ValueError(
                f"RootTraining.optimizer must make an optimizer from ([params], lr=lr), got {self.optimizer!r}; pass "
                "torch.optim.Adam, for instance, or functools.partial(...) of it"
            )


def _makes_optimizers(make: Any, lr: float) -> bool:
    try:
        return isinstance(make([torch.zeros(1, requires_grad=True)], lr=lr), torch.optim.Optimizer)
    except TypeError:
        return False


def root_direction(loss: FlatModel, global_params: Tensor, config: RootTraining, *, small_batches: bool = False) -> Tensor:
    """Train the global model on the root data, and return its update.

    Args:
        loss: the root loss.
        global_params: ``(P,)``, the model before the round; not modified.
        config: steps, learning rate and clip.
        small_batches: take the steps on batches of the root data, which are shuffled once and cut
            into as many batches as there are steps, but of at least 50 samples each. If there are
            fewer batches than steps, they are used in turn.

    Returns:
        ``(P,)``, the trained minus the global parameters.

    Raises:
        ValueError: the root loss or its gradient is not finite at the global model, or training
            diverges.

    Warns:
        UserWarning: training moved no parameter, so that the update is zero.

    Example:
        >>> from skymask_gpu.engine import FlatModel
        >>> module = torch.nn.Linear(4, 3)
        >>> loss = FlatModel(module, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> direction = root_direction(loss, loss.initial_params, RootTraining())
        >>> bool(loss(loss.initial_params + direction) < loss(loss.initial_params))
        True
    """
    direction = train_direction(batches_of(loss, config, small_batches=small_batches), global_params, config)
    if not direction.has_moved(direction.facts.tolist()):
        warn_of_no_gradient()
    return direction.values


@dataclass(frozen=True)
class Direction:
    """A root direction, and what the host does not know of it yet.

    The host reads ``facts`` together with something else, so that it does not wait for them alone.

    Attributes:
        values: ``(P,)``, the trained minus the global parameters.
        facts: on the same device, ``(2,)`` bool: whether the direction and the losses on the way
            are finite, and whether it is not 0. Or ``(0,)``: all is known, and well.
        explain: raises the error of a direction that is not finite.
    """

    values: Tensor
    facts: Tensor
    explain: Callable[[], NoReturn]

    @classmethod
    def known(cls, values_P: Tensor) -> "Direction":
        """A direction of which nothing is left to be read."""

        def explain() -> NoReturn:
            raise AssertionError("nothing was left to be read")

        return cls(values_P, torch.empty(0, dtype=torch.bool, device=values_P.device), explain)

    def has_moved(self, facts: Sequence[bool]) -> bool:
        """Whether training moved any parameter; ``facts`` are the values of ``self.facts``.

        Raises:
            ValueError: as :func:`root_direction`.
        """
        finite, moved = facts or (True, True)
        if not finite:
            self.explain()
        return moved


@without_tf32()
def train_direction(batches: Sequence[ReplayedLoss], global_params: Tensor, config: RootTraining) -> Direction:
    """As :func:`root_direction`, but the host waits for nothing: its warning and errors come later.

    ``batches`` come from :func:`batches_of`. They may be used again, from other parameters.
    """
    direction_P, mean_loss = _descend(batches, global_params, config)
    facts_2 = torch.stack([(direction_P.sum() + mean_loss).isfinite(), (direction_P != 0).any()])
    return Direction(direction_P, facts_2, lambda: _raise_not_finite(batches, global_params))


def warn_of_no_gradient() -> None:
    """Warn the caller of the caller that the root data teach the model nothing."""
    warnings.warn(
        "root_training: training on the root data moved no parameter, the root loss has no gradient, so masks cannot be "
        "trained and there is no verdict; check that loss_fn fits the model's outputs (the default, cross entropy, is "
        "always 0 for a single output) and that the model's units are not all dead",
        stacklevel=3,
    )


def _descend(batches: Sequence[ReplayedLoss], params: Tensor, config: RootTraining) -> tuple[Tensor, Tensor]:
    """Take steps from ``params``, each on the next of the batches, which are used in turn.

    Returns:
        How far the parameters moved, ``(P,)``, and the mean of the losses before the steps, ``()``.
        Either may be NaN or Inf.
    """
    # A copy, because autograd cannot work with a tensor that was made under inference_mode.
    here_P, total = params.detach().clone(), torch.zeros((), device=params.device)
    optimizer = None if config.optimizer is None else config.optimizer([here_P.requires_grad_()], lr=config.lr)
    for step in range(config.steps):
        value, grad_P = batches[step % len(batches)].value_and_gradient(here_P)
        clipped_P = grad_P.clamp(-config.grad_clip, config.grad_clip)
        if optimizer is None:
            here_P = here_P - config.lr * clipped_P
        else:
            here_P.grad = clipped_P
            optimizer.step()
        total = total + value.reshape(())
    return here_P.detach() - params, total / config.steps


def batches_of(loss: FlatModel, config: RootTraining, *, small_batches: bool) -> list[ReplayedLoss]:
    """The root loss on parts of the root data, at most one part per step, or on all of them."""
    number = max(1, min(config.steps, loss.num_samples // _FEWEST_SAMPLES)) if small_batches else 1
    if number == 1:
        return [ReplayedLoss(loss)]
    # Shuffled on the CPU, so that every device gets the same batches.
    order = torch.randperm(loss.num_samples, generator=torch.Generator().manual_seed(0))
    parts = order.to(loss.initial_params.device).tensor_split(number)
    return [ReplayedLoss(loss.part(samples)) for samples in parts]


def _raise_not_finite(batches: Sequence[ReplayedLoss], global_params: Tensor) -> NoReturn:
    """Say whether the global model is to blame, or training."""
    value = sum(float(batch(global_params)) for batch in batches) / len(batches)
    if not math.isfinite(value):
        raise ValueError(
            f"global_params: the loss of the global model on the root data is {value}; without a trusted root there is "
            "no verdict, check global_params, root_inputs and root_labels"
        )
    raise ValueError(
        "root_training: training on the root data from global_params diverged to NaN or Inf; use a smaller RootTraining.lr"
    )
