"""What the benchmark runs on: a model, root samples and synthetic updates, for each number of clients."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.bench.solvers import honest_rows, make_model
from skymask_gpu.engine import FlatModel, MaskTraining, TrainedMasks
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.federation.models import build_model

__all__ = ["CASES", "CLIENTS", "DTYPES", "Case", "Model", "Problem", "TooLargeError"]

CLIENTS = (50, 500, 5_000, 20_000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the memory that is free: what the updates may take, so that something is left for those who work on them.
_UPDATES_SHARE = 0.25


@dataclass(frozen=True)
class Case:
    """One model, and what is done with its clients' updates.

    Attributes:
        name: of the case.
        what: mask training by each solver, or a round by each aggregation rule.
        model: of ``build_model``.
        input_shape: of one sample.
        num_classes: outputs.
        root_samples: of the server.
        trained_steps: of SGD before the round. Batch norm of an untrained network amplifies rounding, so that no two solvers
            would agree.
        mask_steps: of mask training; few where many are not stable in float32.
        dtypes: of the updates.
    """

    name: str
    what: Literal["solvers", "rules"] = "solvers"
    model: str = "cnn"
    input_shape: tuple[int, ...] = (1, 28, 28)
    num_classes: int = 10
    root_samples: int = 100
    trained_steps: int = 0
    mask_steps: int = 20
    dtypes: tuple[str, ...] = ("float32",)

    @cached_property
    def num_params(self) -> int:
        model = build_model(self.model, self.input_shape, self.num_classes, seed=0)
        return sum(param.numel() for param in model.parameters())


CASES = {
    case.name: case
    for case in (
        Case("cnn", dtypes=("float32", "bfloat16")),
        Case("rules", "rules"),
        Case("logreg", model="logreg", input_shape=(561,), num_classes=6),
        Case("resnet20", model="resnet20", input_shape=(3, 32, 32), trained_steps=20, mask_steps=2),
        Case("resnet18", model="resnet18", input_shape=(3, 32, 32), root_samples=20, trained_steps=5, mask_steps=2),
    )
}


class TooLargeError(Exception):
    """The updates leave too little memory for anything else."""


@dataclass(frozen=True)
class Model:
    """A case's network, its root samples and their loss, on the device; the same for any number of clients."""

    module: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: FlatModel

    @classmethod
    def build(cls, case: Case, device: torch.device) -> Self:
        module, inputs, labels = make_model(case.model, case.input_shape, case.num_classes, case.root_samples)
        loss = FlatModel(module, inputs, labels).to(device)
        params_P = loss.initial_params
        for _ in range(case.trained_steps):
            params_P = params_P.detach().requires_grad_()
            (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
            params_P = params_P - 0.1 * grad_P
        module.load_state_dict(loss.unflatten(params_P.detach().cpu()), strict=False)
        inputs, labels = inputs.to(device), labels.to(device)
        return cls(module.to(device), inputs, labels, FlatModel(module, inputs, labels))


@dataclass
class Problem:
    """A case with N clients, of whom the first fifth attack, and the root row last.

    Attributes:
        updates: ``(N + 1, P)`` in ``dtype``.
        exact_updates: the same in float32.
        truth: the masks that all others are compared with, once there are any; None before.
        truth_name: who made them.
        agreed: the largest number of clients for which a solver agreed with `reference` in this run, by its name; the problems
            of one case and dtype share it.
    """

    case: Case
    model: Model
    dtype: str
    updates: Tensor
    exact_updates: Tensor
    seed: int
    agreed: dict[str, int]
    truth: TrainedMasks | None = None
    truth_name: str = ""
    training: MaskTraining = field(init=False)

    def __post_init__(self) -> None:
        # always the same number of steps
        self.training = MaskTraining(steps=self.case.mask_steps, min_improvement=-1e9)

    @classmethod
    def build(cls, case: Case, model: Model, num_clients: int, seed: int, free_bytes: int | None) -> Self:
        """The float32 problem.

        Raises:
            TooLargeError: the updates take too much of ``free_bytes``.
        """
        num_bytes = 4 * (num_clients + 1) * model.loss.num_params
        if free_bytes is not None and num_bytes > _UPDATES_SHARE * free_bytes:
            raise TooLargeError(
                f"the updates alone take {num_bytes / 2**30:,.1f} of {free_bytes / 2**30:,.1f} GiB; solvers need several times "
                f"as much, so at most {_UPDATES_SHARE:.0%} is tried"
            )
        device = model.loss.initial_params.device
        rows_RP = honest_rows(model.loss.to("cpu"), num_clients + 1, seed)
        malicious_N = torch.arange(num_clients) < num_clients // 5
        rows_RP[:-1] = attack(rows_RP[:-1], malicious_N, Threat(AttackConfig(name="lie", share=0.2)))
        if case.what == "rules":
            # of different lengths, unevenly spaced, so that rounding decides neither whose neighbours are nearest nor which of
            # two copies is nearer to the median
            rows_RP[:-1] *= torch.linspace(0.9, 1.1, num_clients).square()[:, None]
        rows_RP = rows_RP.to(device)
        return cls(case, model, "float32", rows_RP, rows_RP, seed, {})

    def to(self, dtype: str) -> "Problem":
        return replace(self, dtype=dtype, updates=self.exact_updates.to(DTYPES[dtype]), truth=None, truth_name="")

    @cached_property
    def squared_distances(self) -> np.ndarray:
        """``(N, N)`` float64 of all pairs of clients, by scikit-learn."""
        from sklearn.metrics import euclidean_distances

        return euclidean_distances(self.updates[:-1].double().cpu().numpy(), squared=True)

    @property
    def num_clients(self) -> int:
        return len(self.updates) - 1

    @property
    def num_malicious(self) -> int:
        return self.num_clients // 5
