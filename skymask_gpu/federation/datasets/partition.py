"""Which training samples each client holds, and the registry of the ways to share them out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.engine.registry import Registry

__all__ = ["PARTITIONS", "Sharing", "partition"]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The samples to distribute, the number of clients, and the settings of all partitions.

    Attributes:
        labels: ``(n,)`` int64, from 0 to L - 1.
        subjects: ``(n,)`` int64, the person that each sample comes from; None where there are none.
        num_clients: N, from 1 to n.
        bias: ``data.bias``.
        alpha: ``data.alpha``.
        generator: source of randomness.
    """

    labels: Tensor
    subjects: Tensor | None
    num_clients: int
    bias: float
    alpha: float
    generator: torch.Generator


# A partition takes a Sharing, and returns one (n_i,) int64 tensor of ascending sample indices per
# client.
PARTITIONS: Registry[Callable[[Sharing], list[Tensor]]] = Registry("data.partition")


def partition(
    kind: str,
    labels: Tensor,
    num_clients: int,
    *,
    bias: float,
    alpha: float,
    subjects: Tensor | None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Distribute the samples: each goes to one client, and each client has at least one.

    Args:
        kind: a key of :data:`PARTITIONS`; the functions of this file say what each does.
        labels: ``(n,)`` int64, from 0 to L - 1.
        num_clients: N; at most n, at least L for ``"bias"``, the number of persons for
            ``"subject"``.
        bias: q of ``"bias"``, from 0 to 1.
        alpha: the concentration of ``"dirichlet"``, from 1e-3 to 1e6.
        subjects: ``(n,)`` int64, the person that each sample comes from; only ``"subject"`` needs
            it.
        generator: source of randomness.

    Returns:
        One ``(n_i,)`` int64 tensor of ascending sample indices per client.

    Raises:
        ValueError: an argument is out of range, or with ``"bias"`` some client would hold nothing.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> settings = dict(bias=0.5, alpha=0.5, subjects=None, generator=generator)
        >>> [len(part) for part in partition("iid", torch.arange(10) % 2, 3, **settings)]
        [4, 3, 3]
    """
    PARTITIONS.check(kind)
    if num_clients < 1:
        raise ValueError(f"data.clients must be at least 1, got {num_clients}")
    if num_clients > len(labels):
        raise ValueError(
            f"data.clients must be at most {len(labels)}, the number of training samples left for clients, got {num_clients}"
        )
    return PARTITIONS[kind](
        Sharing(labels=labels, subjects=subjects, num_clients=num_clients, bias=bias, alpha=alpha, generator=generator)
    )


@PARTITIONS.register("bias")
def by_bias(given: Sharing) -> list[Tensor]:
    """Non-IID with bias q (Fang et al., USENIX Security 2020, section 5.1.2).

    With L labels, the clients form L groups (client i is in group i mod L). A sample of label l
    goes to group l with probability q, and to each other group with probability (1 - q) / (L - 1);
    within the group, a client is drawn at random. q = 1 / L is IID.
    """
    labels, num_clients, bias, generator = given.labels, given.num_clients, given.bias, given.generator
    num_labels = int(labels.max()) + 1
    if not 0 <= bias <= 1:
        raise ValueError(f"data.bias must be between 0 and 1, got {bias}")
    if num_clients < num_labels:
        raise ValueError(f"data.clients must be at least {num_labels}, one per label, got {num_clients}")
    num_samples = len(labels)
    own = torch.rand(num_samples, generator=generator) < bias
    # Another group lies 1 to L - 1 steps further around the circle of groups.
    step = torch.randint(1, max(num_labels, 2), (num_samples,), generator=generator)
    group = torch.where(own, labels, (labels + step) % num_labels)
    members = torch.tensor([len(range(g, num_clients, num_labels)) for g in range(num_labels)])
    place = (torch.rand(num_samples, generator=generator) * members[group]).long()
    parts = _grouped(group + num_labels * place, num_clients)
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"data.clients: {len(empty)} of {num_clients} clients would hold no sample (client {empty[0]} is the first); "
            f"{num_samples} samples are too few, use fewer clients or a smaller bias"
        )
    return parts


@PARTITIONS.register("dirichlet")
def by_dirichlet(given: Sharing) -> list[Tensor]:
    """Per class, the clients' shares are drawn from a symmetric Dirichlet distribution.

    Its concentration is alpha. The clients therefore differ in size, too. This is the form of
    Yurochkin et al. (ICML 2019, arXiv 1905.12022), which most experiments use. Hsu et al. (arXiv
    1909.06335), who are often cited for it, draw the shares of the classes per client instead, and
    give all clients one size. A client that would hold nothing gets one sample from the client that
    has the most at that time.
    """
    labels, num_clients, alpha, generator = given.labels, given.num_clients, given.alpha, given.generator
    if not 1e-3 <= alpha <= 1e6:
        raise ValueError(f"data.alpha must be between 1e-3 and 1e6 (far above 1 clients are alike), got {alpha}")
    # PyTorch's Dirichlet distribution takes no generator, so NumPy draws, seeded from ours.
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    client_n = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_label = (labels == label).nonzero().flatten()
        ends = np.rint(rng.dirichlet(np.full(num_clients, alpha)).cumsum() * len(of_label)).astype(np.int64)
        # The shares add up to 1 only within rounding, and no sample may be left over.
        ends[-1] = len(of_label)
        order = torch.randperm(len(of_label), generator=generator)
        owner = np.searchsorted(ends, np.arange(len(of_label)), side="right")
        client_n[of_label[order]] = torch.from_numpy(owner)
    sizes = torch.bincount(client_n, minlength=num_clients)
    for client in (sizes == 0).nonzero().flatten().tolist():
        largest = sizes.argmax()
        client_n[(client_n == largest).nonzero()[0]] = client
        sizes[largest] -= 1
        sizes[client] = 1
    return _grouped(client_n, num_clients)


@PARTITIONS.register("iid")
def by_shuffling(given: Sharing) -> list[Tensor]:
    """The samples are shuffled and divided into parts whose sizes differ by at most one."""
    order = torch.randperm(len(given.labels), generator=given.generator)
    return [part.sort().values for part in order.tensor_split(given.num_clients)]


@PARTITIONS.register("subject")
def by_subject(given: Sharing) -> list[Tensor]:
    """One client per person that the samples come from, in the order of the persons' numbers."""
    if given.subjects is None:
        raise ValueError(
            "data.partition 'subject' needs data that say which person a sample comes from, this data set does not; "
            "use 'har', 'femnist' or 'shakespeare' as data.dataset, or another partition"
        )
    persons, person_n = given.subjects.unique(return_inverse=True)
    if given.num_clients != len(persons):
        raise ValueError(
            f"data.clients must be {len(persons)} for data.partition 'subject', one client per person, got {given.num_clients}"
        )
    return _grouped(person_n, given.num_clients)


def _grouped(client_n: Tensor, num_clients: int) -> list[Tensor]:
    """The samples of each client in ascending order, from the client of each sample, ``(n,)``."""
    sizes = torch.bincount(client_n, minlength=num_clients)
    return list(client_n.argsort(stable=True).split(sizes.tolist()))
