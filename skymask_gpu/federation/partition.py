"""Which training samples each client holds."""

import torch
from torch import Tensor

__all__ = ["partition"]


def partition(labels: Tensor, num_clients: int, bias: float, generator: torch.Generator) -> list[Tensor]:
    """Non-IID parts with bias q (Fang et al., USENIX Security 2020, section 5.1.2).

    With L labels, clients form L groups (client i in group i mod L). A sample of label l goes to group l with probability q, to
    each other group with probability (1 - q) / (L - 1), and to a client of that group at random. q = 1 / L is IID.

    Args:
        labels: ``(n,)`` int64, 0 to L - 1.
        num_clients: at least L.
        bias: q, from 0 to 1.

    Returns:
        One tensor of sample indices a client; every client has at least one.

    Raises:
        ValueError: ``bias`` or ``num_clients`` is out of range, or some client would hold nothing.
    """
    num_labels = int(labels.max()) + 1
    if not 0 <= bias <= 1:
        raise ValueError(f"data.bias must be between 0 and 1, got {bias}")
    if num_clients < num_labels:
        raise ValueError(f"data.clients must be at least {num_labels}, one a label, got {num_clients}")
    num_samples = len(labels)
    own = torch.rand(num_samples, generator=generator) < bias
    # an other group: one of the L - 1 steps around the circle of groups
    step = torch.randint(1, max(num_labels, 2), (num_samples,), generator=generator)
    group = torch.where(own, labels, (labels + step) % num_labels)
    members = torch.tensor([len(range(g, num_clients, num_labels)) for g in range(num_labels)])
    place = (torch.rand(num_samples, generator=generator) * members[group]).long()
    client = group + num_labels * place
    parts = [(client == i).nonzero().flatten() for i in range(num_clients)]
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"data.clients: {len(empty)} of {num_clients} clients would hold no sample (client {empty[0]} is the first); "
            f"{num_samples} samples are too few, use fewer clients or a smaller bias"
        )
    return parts
