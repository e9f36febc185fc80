"""The input of a linear first layer, in closed form.

For one sample x, the gradient of the layer's weight is ``d x^T`` and that of its bias is ``d``: a
matrix of rank one, of which any row with a known factor gives x exactly (Phong et al., IEEE TIFS
2018). A random mask removes entries but leaves the others as they are. A pixel is then lost only if
every active unit lost it, and a unit whose bias is gone is scaled by a pixel that is known already.
"""

import torch
from torch import Tensor

__all__ = ["input_from_linear_layer"]

# Each round reaches the units and pixels that share an entry with known ones; three reach all that
# can be reached unless hardly any entry is left.
_ROUNDS = 4


def input_from_linear_layer(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The samples that gave these gradients.

    Args:
        weight: ``(B, H, D)``, the gradient of the weight; zeros are unknown.
        bias: ``(B, H)``, that of the bias; zeros are unknown.

    Returns:
        The inputs, ``(B, D)`` float64, 0 where they are lost; and which values are known,
        ``(B, D)`` bool. A pixel that is 0 has only zeros in its column, so it counts as lost, with
        the right value.

    Example:
        >>> x, d = torch.tensor([0.2, 0.0, 0.7]), torch.tensor([1.0, -2.0])
        >>> values, known = input_from_linear_layer(torch.outer(d, x)[None], d[None])
        >>> [round(value, 6) for value in values[0].tolist()], known[0].tolist()
        ([0.2, 0.0, 0.7], [True, False, True])
    """
    weight_BHD, factor_BH = weight.double(), bias.double()
    seen_BHD = weight_BHD != 0
    for _ in range(_ROUNDS):
        input_BD, known_BD = _least_squares(weight_BHD, seen_BHD, factor_BH[:, :, None], dim=1)
        factor_BH = torch.where(bias != 0, factor_BH, _least_squares(weight_BHD, seen_BHD, input_BD[:, None, :], dim=2)[0])
    return input_BD, known_BD


def _least_squares(weight_BHD: Tensor, seen_BHD: Tensor, other: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One factor of the matrix from the other, over the entries that are seen; 0 is unknown."""
    usable = torch.where(seen_BHD, other, 0.0)
    squares = usable.square().sum(dim)
    known = squares > 0
    return torch.where(known, (usable * weight_BHD).sum(dim) / torch.where(known, squares, 1.0), 0.0), known
