"""Output cosines: how well the weights of each output of a linear layer follow the root direction.

The cosine of a whole update says little where a few large weights outweigh all others, as they do
after bold local steps. The weights of one output of a linear layer (one neuron) are a vector of
their own, in which the root data want a direction as clear as in any other. A client with flipped
labels moves most of these vectors the other way. The cosine is therefore taken per output and
averaged: over the outputs of each layer, and then over the layers, so that no output outweighs the
others and no layer does.

Shapes: K clients, P columns, G groups of columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.kernels.anywhere import group_sums

__all__ = ["Groups", "OutputCosines"]

# The smallest normal float64 number. A length is divided by at least this, so that it is never 0.
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Groups:
    """The columns of a flat update in groups: one per output of a linear layer, and the rest.

    Attributes:
        edges: where each group begins, and P at the end.
        layers: for each linear layer its first group, and the group after its last.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> Groups.of({name: parameter.shape for name, parameter in model.named_parameters()})
        Groups(edges=(0, 4, 8, 12, 15, 18, 21, 23), layers=((0, 3), (4, 6)))
    """

    edges: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size]) -> "Groups":
        """The groups of a model.

        Linear layers are the parameters with two axes, of which the first counts the outputs.
        Everything between two of them is one group.

        Args:
            shapes: name -> shape of each trainable parameter, in the order of
                ``named_parameters()``.
        """
        edges, layers, end = [0], [], 0
        for shape in shapes.values():
            begin, end = end, end + shape.numel()
            if len(shape) == 2 and shape.numel():
                if edges[-1] < begin:
                    edges.append(begin)
                first = len(edges) - 1
                edges += range(begin + shape[1], end + 1, shape[1])
                layers.append((first, len(edges) - 1))
        if edges[-1] < end:
            edges.append(end)
        return cls(tuple(edges), tuple(layers))


class OutputCosines:
    """The mean cosine of the outputs' weights with a direction.

    Args:
        groups: the groups of columns.
        direction_P: ``(P,)`` float32, the direction.

    Example:
        >>> groups = Groups((0, 2, 4), ((0, 2),))
        >>> cosines = OutputCosines(groups, torch.tensor([1.0, 0.0, 0.0, 1.0]))
        >>> cosines(squares_KG=torch.tensor([[9.0, 1.0]]), products_KG=torch.tensor([[3.0, -1.0]]))
        tensor([0.], dtype=torch.float64)
    """

    def __init__(self, groups: Groups, direction_P: Tensor) -> None:
        length_G = group_sums(direction_P[None], torch.stack([direction_P, direction_P]), groups.edges)[0, 0].sqrt()
        # An output that the root data do not move, such as that of a class that they lack, has no
        # direction and is not counted. A layer without any other is not counted either.
        self._weight_G = torch.zeros_like(length_G)
        moved_G = (length_G > 0).double()
        num_layers = torch.zeros((), dtype=torch.float64, device=length_G.device)
        for first, last in groups.layers:
            num_moved = moved_G[first:last].sum()
            self._weight_G[first:last] = moved_G[first:last] / num_moved.clamp_min(1)
            num_layers = num_layers + (num_moved > 0)
        self._weight_G /= length_G.clamp_min(_TINY) * num_layers.clamp_min(1)

    def __call__(self, squares_KG: Tensor, products_KG: Tensor) -> Tensor:
        """The mean cosine of each row, ``(K,)`` float64.

        The cosine of an output whose weights are all 0 counts as 0.

        Args:
            squares_KG: the sums of squares of each row's groups.
            products_KG: the inner products of each row's groups with the direction.
        """
        return (products_KG / squares_KG.double().sqrt().clamp_min(_TINY)) @ self._weight_G
