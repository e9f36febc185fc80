"""Where the layers of a model lie in a flat update, for rules that judge them one by one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from skymask_gpu.engine.flat_model import columns_of

__all__ = ["Layers"]


@dataclass(frozen=True)
class Layers:
    """The trainable parameters of a model, in the order in which they lie in an update.

    Attributes:
        rule: the rule that uses them; errors name it.
        shapes: the shape of each parameter, by its name.
    """

    rule: str
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, module: nn.Module, rule: str) -> "Layers":
        """The layers of a model.

        Raises:
            ValueError: the model has no trainable parameter.
        """
        shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not shapes:
            raise ValueError(
                f"defence.rule {rule!r} judges layer by layer and needs a model with trainable parameters, got none; "
                "give the clients' model as module, or use another rule"
            )
        return cls(rule, shapes)

    def parameters(self, updates_MP: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The name and the columns, a view ``(M, p)``, of each parameter.

        Raises:
            ValueError: the updates have another number of parameters than the model.
        """
        self._check(updates_MP)
        for name, columns in columns_of(self.shapes).items():
            yield name, updates_MP[:, columns]

    def modules(self, updates_MP: Tensor) -> list[Tensor]:
        """The columns, a view ``(M, p)``, of each module with parameters of its own.

        A weight and its bias belong to the same module.

        Raises:
            ValueError: the updates have another number of parameters than the model.
        """
        self._check(updates_MP)
        by_module = groupby(self.shapes, key=lambda name: name.rpartition(".")[0])
        sizes = [sum(math.prod(self.shapes[name]) for name in names) for _, names in by_module]
        return list(updates_MP.split(sizes, dim=1))

    def _check(self, updates_MP: Tensor) -> None:
        num_params = sum(map(math.prod, self.shapes.values()))
        if updates_MP.shape[1] != num_params:
            raise ValueError(
                f"defence.rule {self.rule!r} needs updates of the model's {num_params} trainable parameters, got "
                f"{updates_MP.shape[1]} per client; give the clients' own model as module"
            )
