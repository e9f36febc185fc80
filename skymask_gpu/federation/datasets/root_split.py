"""The server's root data set: a few clean samples, drawn from the training data."""

import torch
from torch import Tensor

__all__ = ["split_root"]


def split_root(labels: Tensor, num_samples: int, generator: torch.Generator, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Draw a root data set without replacement, and return what is left for the clients.

    Args:
        labels: ``(n,)`` int64 labels of the training data.
        num_samples: size of the root data set, fewer than n.
        generator: source of randomness.
        bias: 0: equally many samples per class, as far as it divides. Otherwise the bias
            probability of FLTrust (Cao et al., NDSS 2021), the share of one class, here class 0:
            ``round(bias * num_samples)`` samples are of class 0, and the others are shared equally
            among the other classes. One over the number of classes is no bias.

    Returns:
        Ascending indices: of the root data set, ``(num_samples,)`` int64, and of all other samples,
        ``(n - num_samples,)`` int64.

    Raises:
        ValueError: ``num_samples`` is not between 1 and n - 1, ``bias`` is not between 0 and 1, or
            there are too few samples of class 0 or of the other classes.

    Example:
        >>> labels = torch.arange(40) % 10
        >>> root, rest = split_root(labels, 20, torch.Generator().manual_seed(0))
        >>> labels[root].bincount().tolist(), len(rest)
        ([2, 2, 2, 2, 2, 2, 2, 2, 2, 2], 20)
    """
    if not 1 <= num_samples < len(labels):
        raise ValueError(f"data.root_samples must be between 1 and {len(labels) - 1}, got {num_samples}")
    if not 0 <= bias <= 1:
        raise ValueError(f"data.root_bias must be between 0 (all classes alike) and 1, got {bias}")
    order = torch.randperm(len(labels), generator=generator)
    # Deal the shuffled samples like cards: the first of each class, then the second of each class
    # ...
    rank = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_label = order[labels[order] == label]
        rank[of_label] = torch.arange(len(of_label))
    dealt = order[rank[order].argsort(stable=True)]
    if bias > 0:
        dealt = _biased_first(dealt, labels, num_samples, bias)
    return dealt[:num_samples].sort().values, dealt[num_samples:].sort().values


def _biased_first(dealt: Tensor, labels: Tensor, num_samples: int, bias: float) -> Tensor:
    """Reorder ``dealt`` so that the first ``num_samples`` have the share ``bias`` of class 0."""
    is_first = labels[dealt] == 0
    first, others = dealt[is_first], dealt[~is_first]
    wanted_first = round(bias * num_samples)
    for kind, wanted, found in (
        ("class 0", wanted_first, len(first)),
        ("the other classes", num_samples - wanted_first, len(others)),
    ):
        if wanted > found:
            raise ValueError(
                f"data.root_bias = {bias} asks for {wanted} root samples of {kind}, there are {found}; "
                f"lower data.root_samples, {num_samples} now, or change data.root_bias"
            )
    return torch.cat([first[:wanted_first], others, first[wanted_first:]])
