"""What the benchmark runs on: models, root samples and synthetic updates."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.bench.solvers import honest_rows, make_model
from skymask_gpu.bench.table import SEED, NotTimedError
from skymask_gpu.engine import FlatModel, MaskTraining
from skymask_gpu.federation.attacks import AttackConfig, Threat, attack
from skymask_gpu.federation.models import build_model

__all__ = ["CASES", "CLIENTS", "DTYPES", "Case", "Model", "Problem", "TooLargeError"]

CLIENTS = (50, 500, 5_000, 20_000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The updates may take this share of the free memory. The rest is for the solvers that work on them.
_UPDATES_SHARE = 0.25
# An attack takes several times the memory of its rows, so it is computed on this many values at a
# time.
_ATTACKED_VALUES = 2**28


@dataclass(frozen=True)
class Case:
    """One model, and what is done with its clients' updates.

    Attributes:
        name: the name on the command line.
        what: whether each solver trains masks, each aggregation rule plays a round, or SkyMask's
            round is measured phase by phase.
        model: a name that ``build_model`` knows.
        input_shape: the shape of one sample.
        num_classes: the number of the model's outputs.
        root_samples: how many samples the server has.
        trained_steps: steps of SGD before the round. The batch norm of an untrained network
            amplifies rounding, so that no two solvers would agree.
        mask_steps: steps of mask training; few where more are not stable in float32.
        dtypes: the types in which the updates are tried.
        attack: what the malicious clients do, with its default settings.
    """

    name: str
    what: Literal["solvers", "rules", "round"] = "solvers"
    model: str = "cnn"
    input_shape: tuple[int, ...] = (1, 28, 28)
    num_classes: int = 10
    root_samples: int = 100
    trained_steps: int = 0
    mask_steps: int = 20
    dtypes: tuple[str, ...] = ("float32",)
    attack: str = "lie"

    @cached_property
    def num_params(self) -> int:
        model = build_model(self.model, self.input_shape, self.num_classes, seed=0)
        return sum(param.numel() for param in model.parameters())


CASES = {
    case.name: case
    for case in (
        Case("cnn", dtypes=("float32", "bfloat16")),
        Case("rules", "rules"),
        Case("round", "round", attack="sign-flip"),
        Case("logreg", model="logreg", input_shape=(561,), num_classes=6),
        Case("resnet20", model="resnet20", input_shape=(3, 32, 32), trained_steps=20, mask_steps=2),
        Case("resnet18", model="resnet18", input_shape=(3, 32, 32), root_samples=20, trained_steps=5, mask_steps=2),
    )
}


class TooLargeError(NotTimedError):
    """The updates leave too little memory for anything else."""

    status = "skipped"


@dataclass(frozen=True, eq=False)
class Model:
    """A case's network, its root samples and their loss, for any number of clients."""

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
    """A case with N clients, the first fifth of which attack, and the root row last.

    Attributes:
        updates: ``(N + 1, P)`` in ``dtype``.
        exact_updates: the same in float32.
    """

    case: Case
    model: Model
    dtype: str
    updates: Tensor
    exact_updates: Tensor
    training: MaskTraining = field(init=False)

    def __post_init__(self) -> None:
        # no early end, so that every solver makes the same number of steps
        self.training = MaskTraining(steps=self.case.mask_steps, min_improvement=-1e9)

    @classmethod
    def build(cls, case: Case, model: Model, num_clients: int, free_bytes: int | None = None) -> Self:
        """The float32 problem, made on the model's device.

        Raises:
            TooLargeError: the updates take too much of ``free_bytes``; None: no limit.
        """
        num_bytes = 4 * (num_clients + 1) * model.loss.num_params
        if free_bytes is not None and num_bytes > _UPDATES_SHARE * free_bytes:
            raise TooLargeError(
                f"the updates alone take {num_bytes / 2**30:,.1f} of {free_bytes / 2**30:,.1f} GiB; solvers need several times "
                f"as much, so at most {_UPDATES_SHARE:.0%} is tried"
            )
        rows_RP = honest_rows(model.loss, num_clients + 1, SEED)
        malicious_N = torch.arange(num_clients, device=rows_RP.device) < num_clients // 5
        for part_RC in rows_RP.split(max(1, _ATTACKED_VALUES // num_clients), dim=1):
            part_RC[:-1] = attack(part_RC[:-1], malicious_N, Threat(AttackConfig(name=case.attack, share=0.2)))
        if case.what == "rules":
            # Different, unevenly spaced lengths: otherwise rounding would decide whose neighbours
            # are nearest, and which of two copies is nearer to the median.
            rows_RP[:-1] *= torch.linspace(0.9, 1.1, num_clients, device=rows_RP.device).square()[:, None]
        return cls(case, model, "float32", rows_RP, rows_RP)

    def to(self, dtype: str) -> "Problem":
        return replace(self, dtype=dtype, updates=self.exact_updates.to(DTYPES[dtype]))

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
