"""Where the last layer's weight and bias lie in a flat update."""

from dataclasses import dataclass

from torch import Tensor

from skymask_gpu.engine import FlatModel

__all__ = ["LastLayer"]


@dataclass(frozen=True)
class LastLayer:
    """The last two parameters of a classifier: a weight and a bias for ``num_classes`` outputs."""

    num_classes: int
    num_weights: int

    @classmethod
    def of(cls, flat: FlatModel, rule: str) -> "LastLayer":
        """The last layer of a model.

        Raises:
            ValueError: the model's last two parameters are no weight with its bias.
        """
        last = list(flat.shapes.items())[-2:]
        if len(last) == 2:
            (_, weight_shape), (_, bias_shape) = last
            if len(weight_shape) >= 2 and tuple(bias_shape) == (weight_shape[0],):
                return cls(weight_shape[0], weight_shape.numel())
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in last)
        raise ValueError(
            f"defence.rule {rule!r} needs a model whose last layer has a weight (classes, features) and a bias (classes,), "
            f"got {got} as the last parameters; use another rule, or a last layer with a bias"
        )

    def both(self, updates: Tensor) -> Tensor:
        """The last layer's columns: weights, then biases, ``(..., num_weights + num_classes)``."""
        return updates[..., -self.num_weights - self.num_classes :]

    def weight(self, updates: Tensor) -> Tensor:
        """The last layer's weight in its shape, ``(..., P) -> (..., num_classes, features)``."""
        return updates[..., -self.num_weights - self.num_classes : -self.num_classes].unflatten(-1, (self.num_classes, -1))

    def bias(self, updates: Tensor) -> Tensor:
        """The last layer's bias, ``(..., P) -> (..., num_classes)``."""
        return updates[..., -self.num_classes :]
