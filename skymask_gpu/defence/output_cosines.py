"""Output cosines: how well the weights of each output of a linear layer follow the root direction.

The cosine of a whole update says little where a few large weights outweigh all others, as they do
after bold local steps. The weights of one output of a linear layer (one neuron) are a vector of
their own, in which the root data want a direction as clear as in any other. A client with flipped
labels moves most of these vectors the other way. The cosine is therefore taken per output and
averaged: over the outputs of each layer, and then over the layers, so that no output outweighs the
others and no layer does.

Shapes: K clients, P parameters of which L are this rank's own, O outputs of all linear layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["OutputCosines", "linear_layers"]

# The smallest normal float32 number. A length is divided by at least this, so that it is never 0.
_TINY = torch.finfo(torch.float32).tiny


def linear_layers(shapes: Mapping[str, torch.Size]) -> list[tuple[slice, int]]:
    """The columns of each linear layer in a flat update, and the number of its outputs.

    These are the parameters with two axes, of which the first counts the outputs.

    Args:
        shapes: name -> shape of each trainable parameter, in the order of ``named_parameters()``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> linear_layers({name: parameter.shape for name, parameter in model.named_parameters()})
        [(slice(0, 12, None), 3), (slice(15, 21, None), 2)]
    """
    layers, begin = [], 0
    for shape in shapes.values():
        if len(shape) == 2 and shape.numel():
            layers.append((slice(begin, begin + shape.numel()), shape[0]))
        begin += shape.numel()
    return layers


class OutputCosines:
    """Measures the output cosines of rows that are handed to it in parts.

    Args:
        layers: from :func:`linear_layers`, at least one.
        direction_P: the root direction.
        shards: which columns the rows hold.

    Example:
        >>> direction = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> measured = OutputCosines([(slice(0, 4), 2)], direction, ColumnShards(4))
        >>> measured.add(torch.tensor([[3.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, -1.0]]))
        >>> measured.result()
        tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(self, layers: Sequence[tuple[slice, int]], direction_P: Tensor, shards: ColumnShards) -> None:
        self._shards = shards
        self._layers = [_Layer(columns, num_outputs, direction_P, shards) for columns, num_outputs in layers]
        # The weight of each output in the mean of outputs, and then of layers.
        weights = [layer.moved / layer.moved.sum().clamp_min(1) for layer in self._layers]
        num_moved_layers = sum((weight_O.sum() > 0).double() for weight_O in weights)
        self._weight_O = torch.cat(weights) / torch.as_tensor(num_moved_layers).clamp_min(1)
        self._parts: list[Tensor] = []

    def add(self, part_KL: Tensor) -> None:
        """Measure some rows, ``(K, L)`` float32: this rank's own columns of them."""
        sums_2KO = torch.cat([layer.sums(part_KL) for layer in self._layers], 2)
        # Where nothing must be summed over ranks, only one number per client is kept.
        self._parts.append(self._mean(sums_2KO) if self._shards.group is None else sums_2KO)

    def result(self) -> Tensor:
        """The mean cosine of each row that was added, ``(K,)`` float64.

        The cosine of an output whose weights are all 0 counts as 0.
        """
        if self._shards.group is None:
            return torch.cat(self._parts)
        return self._mean(self._shards.sum(torch.cat(self._parts, 1)))

    def _mean(self, sums_2KO: Tensor) -> Tensor:
        products_KO, squares_KO = sums_2KO
        return (products_KO / squares_KO.sqrt().clamp_min(_TINY)) @ self._weight_O


class _Layer:
    """One linear layer: this rank's own columns of it, and each output's unit direction.

    Attributes:
        moved: float64 per output: 1, or 0 for an output that the root data do not move, such as
            that of a class that they lack. It has no direction and is not counted.
    """

    def __init__(self, columns: slice, num_outputs: int, direction_P: Tensor, shards: ColumnShards) -> None:
        self._num_outputs = num_outputs
        own = range(max(columns.start, shards.columns.start), min(columns.stop, shards.columns.stop))
        first = shards.columns.start
        self._own = slice(own.start - first, own.stop - first) if own else slice(0, 0)
        # An output's weights may be spread over ranks. Zeros in place of another rank's columns
        # leave its sums as they are.
        self._padding = (own.start - columns.start, columns.stop - own.stop) if own else (0, columns.stop - columns.start)
        direction_OD = direction_P[columns].double().view(num_outputs, -1)
        length_O = torch.linalg.vector_norm(direction_OD, dim=1)
        self._unit_OD = (direction_OD / length_O.clamp_min(_TINY)[:, None]).float()
        self.moved = (length_O > 0).double()

    def sums(self, part_KL: Tensor) -> Tensor:
        """Products with the direction and sums of squares of each output, ``(2, K, O)`` float64."""
        weights_KOD = F.pad(part_KL[:, self._own], self._padding).view(len(part_KL), self._num_outputs, -1)
        products_KO = torch.einsum("kod,od->ko", weights_KOD, self._unit_OD)
        # In float32 the square of a length may overflow.
        return torch.stack([products_KO.double(), torch.linalg.vector_norm(weights_KOD, dim=2).double().square()])
