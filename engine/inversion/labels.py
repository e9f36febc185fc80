"""The label of a single sample, read off the gradient of the last layer.

iDLG (Zhao, Mopuri and Bilen, 2020, arXiv 2001.02610): with cross-entropy, the gradient of the last
bias is softmax minus one-hot, which is negative at the true class only. The rows of the last weight
are this times the features, so where features are not negative, as after a sigmoid or ReLU, the
sums of the rows have the same signs.
"""

from torch import Tensor

__all__ = ["labels_from_gradients"]


def labels_from_gradients(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The class of each victim's sample, ``(B,)`` int64.

    Masks, pruning and clipping keep the sign of what they leave, so the rule outlives all of them
    until the true class's whole row is zero. Then the class is a guess.

    Args:
        weight: ``(B, C, H)``, the gradient of the last layer's weight.
        bias: ``(B, C)``, that of its bias; an obfuscation may have zeroed the entry that matters,
            so it is added to the sum of the row.

    Example:
        >>> features, error = torch.tensor([0.5, 2.0]), torch.tensor([0.3, -0.8, 0.5])
        >>> labels_from_gradients(torch.outer(error, features)[None])
        tensor([1])
    """
    sums_BC = weight.double().sum(2)
    if bias is not None:
        sums_BC = sums_BC + bias.double()
    return sums_BC.argmin(1)
