"""This package's rules in the form of ByzFL's aggregators, and ByzFL's parts for its runs.

ByzFL (https://github.com/LPD-EPFL/byzfl, MIT) calls an aggregator with n vectors, and gets one. An
:class:`Aggregator` is called in the same way, so that ByzFL's attacks and experiments can use it.
``examples/byzfl_plugin.py`` is the other direction: ByzFL's aggregators and attacks as plugins.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, build_rule
from skymask_gpu.federation.rules.interface import uses_root_data

__all__ = ["Aggregator", "byzfl_part"]


def byzfl_part(part: Literal["aggregators", "attacks"]) -> Any:
    """A module of the installed ByzFL.

    ByzFL's own ``__init__`` imports torchvision for its experiments, which is missing or fails
    beside a torch for CPUs only. The module is then loaded without it.

    Raises:
        ValueError: ByzFL is not installed.
    """
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            raise ValueError("byzfl is not installed: pip install --no-deps byzfl scipy")
        try:
            importlib.import_module("byzfl")
        # whatever torchvision raises
        except Exception:
            package = types.ModuleType("byzfl")
            package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
            sys.modules["byzfl"] = package
    return importlib.import_module(f"byzfl.{part}")


class Aggregator:
    """One of :data:`skymask_gpu.federation.rules.RULES` as ByzFL calls its own, ``(n, P) -> (P,)``.

    The rule computes in float32. A rule that remembers rounds remembers them from call to call, and
    takes the vectors for those of the same clients in the same order.

    Args:
        name: the rule, such as ``"multi-krum"`` or ``"skymask"``.
        f: the number of malicious vectors that the rule assumes. Rules that assume no number
            ignore it.
        module: the model, for a rule that uses root data, looks at the global model, or judges
            layer by layer. Its parameters are read at each call, so it must be the current global
            model; each vector is an update of its trainable ones. Without it, a rule that looks at
            the global model sees one of zeros, and one that judges layers is refused.
        root_inputs: the server's clean samples, for such a rule.
        root_labels: their labels.
        root_training: how the server trains on them.
        settings: the rule's own settings, an instance of ``RULES.settings_of(name)``.
        seed: the seed of rules that draw random numbers.

    Raises:
        ValueError: there is no such rule, ``f`` is no number of vectors, or a rule that uses root
            data gets none. From a call: there are no vectors, they differ in length, or the module
            has another number of parameters or none where the rule judges layer by layer.

    Example:
        >>> aggregate = Aggregator("trimmed-mean", f=1)
        >>> aggregate([np.array([1.0, 2.0]), np.array([2.0, 3.0]), np.array([90.0, -7.0])])
        array([2., 2.])
    """

    def __init__(
        self,
        name: str,
        f: int = 0,
        *,
        module: nn.Module | None = None,
        root_inputs: Tensor | None = None,
        root_labels: Tensor | None = None,
        root_training: RootTraining = RootTraining(),
        settings: Any = None,
        seed: int = 0,
    ) -> None:
        RULES.check(name)
        if not isinstance(f, int) or isinstance(f, bool) or f < 0:
            raise ValueError(f"f must be a whole number of at least 0, got {f!r}")
        if uses_root_data(name) and (module is None or root_inputs is None or root_labels is None):
            raise ValueError(f"module, root_inputs and root_labels must be given for the rule {name!r}, which uses root data")
        self._name, self._f, self._settings, self._seed, self._calls = name, f, settings, seed, 0
        self._module = nn.Module() if module is None else module
        self._root_data = [torch.empty(0) if data is None else data for data in (root_inputs, root_labels)]
        self._root_training = root_training
        self._loss = FlatModel(self._module, *self._root_data).to(torch.float32) if uses_root_data(name) else None
        self._rule: Any = None

    def __call__(self, vectors: Any) -> Any:
        """Aggregate n vectors.

        Args:
            vectors: an ``(n, P)`` array or tensor, or a list of n arrays or tensors ``(P,)``.

        Returns:
            ``(P,)``, of the kind, dtype and device of the vectors.
        """
        rows_NP, like = _rows(vectors)
        if self._rule is None:
            self._rule = build_rule(self._name, self._context(len(rows_NP)), self._settings)
        update_P = self._rule(rows_NP, self._info(rows_NP)).update
        return update_P.cpu().numpy().astype(like.dtype) if isinstance(like, np.ndarray) else update_P.to(like)

    def _context(self, num_clients: int) -> RuleContext:
        return RuleContext(
            module=self._module,
            root_inputs=self._root_data[0],
            root_labels=self._root_data[1],
            num_clients=num_clients,
            root_training=self._root_training,
            seed=self._seed,
        )

    def _info(self, rows_NP: Tensor) -> RoundInfo:
        self._calls += 1
        params_P, root_P = torch.zeros_like(rows_NP[0]), torch.full_like(rows_NP[0], torch.nan)
        trainable = [parameter.detach().reshape(-1) for parameter in self._module.parameters() if parameter.requires_grad]
        if trainable:
            params_P = torch.cat([parameter.to(torch.float32) for parameter in trainable])
        if len(params_P) != rows_NP.shape[1]:
            raise ValueError(
                f"vectors must have the length of the module's {len(params_P)} trainable parameters, got {rows_NP.shape[1]}; "
                "give updates of these parameters, or another module"
            )
        if self._loss is not None:
            root_P = root_direction(self._loss, params_P, self._root_training)
        return RoundInfo(
            global_params=params_P.to(rows_NP.device),
            root_update=root_P.to(rows_NP.device),
            clients=torch.arange(len(rows_NP)),
            num_malicious=self._f,
            generator=torch.Generator().manual_seed(self._seed * 1_000_003 + self._calls),
        )


def _rows(vectors: Any) -> tuple[Tensor, Any]:
    """The vectors as an ``(n, P)`` float32 tensor, and something of their kind."""
    rows = list(vectors) if isinstance(vectors, list | tuple) else vectors
    if isinstance(rows, list) and rows:
        kind = next((kind for kind in (np.ndarray, Tensor) if all(isinstance(row, kind) for row in rows)), None)
        if kind is None or len({tuple(row.shape) for row in rows}) > 1:
            raise ValueError("vectors must be arrays or tensors of one shape, (P,)")
        rows = np.stack(rows) if kind is np.ndarray else torch.stack(rows)
    if not isinstance(rows, np.ndarray | Tensor) or rows.ndim != 2 or 0 in rows.shape:
        got = tuple(rows.shape) if isinstance(rows, np.ndarray | Tensor) else type(vectors).__name__
        raise ValueError(f"vectors must be an (n, P) array or tensor, or a list of n vectors, got {got}")
    tensor = torch.from_numpy(rows.astype(np.float32)) if isinstance(rows, np.ndarray) else rows.detach().float()
    return tensor, rows[0]
