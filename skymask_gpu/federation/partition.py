"""Which training samples each client holds."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["PARTITIONS", "partition"]

PARTITIONS = ("bias", "dirichlet", "iid", "subject")


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
    """Share the samples out among the clients; each sample goes to one client, and each client has at least one.

    ``"bias"``: non-IID with bias q (Fang et al., USENIX Security 2020, section 5.1.2). With L labels, clients form L groups
    (client i in group i mod L). A sample of label l goes to group l with probability q, to each other group with probability
    (1 - q) / (L - 1), and to a client of that group at random. q = 1 / L is IID.

    ``"dirichlet"``: of each class, the clients' shares are drawn from a symmetric Dirichlet distribution over the N clients
    with concentration alpha, so clients differ in size too. This is the form of Yurochkin et al. (ICML 2019, arXiv 1905.12022)
    that most experiments mean; Hsu et al. (arXiv 1909.06335), who are often named for it, draw for each client the shares of
    the classes instead and give all clients one size. A client left with nothing gets one sample of the client that has the
    most at that time.

    ``"iid"``: shuffled, and cut into parts whose sizes differ by at most one.

    ``"subject"``: one client for each person the samples are of, in the order of the persons' numbers.

    Args:
        kind: one of :data:`PARTITIONS`.
        labels: ``(n,)`` int64, 0 to L - 1.
        num_clients: N; at least L for ``"bias"``, at most n, the number of subjects for ``"subject"``.
        bias: q of ``"bias"``, from 0 to 1.
        alpha: of ``"dirichlet"``, from 1e-3 to 1e6.
        subjects: ``(n,)`` int64 for ``"subject"``.
        generator: source of randomness.

    Returns:
        One ``(n_i,)`` int64 tensor of ascending sample indices for each client.

    Raises:
        ValueError: an argument is out of range, or with ``"bias"`` some client would hold nothing.
    """
    if kind not in PARTITIONS:
        raise ValueError(f"data.partition must be one of {', '.join(PARTITIONS)}, got {kind!r}")
    if num_clients < 1:
        raise ValueError(f"data.clients must be at least 1, got {num_clients}")
    if num_clients > len(labels):
        raise ValueError(
            f"data.clients must be at most {len(labels)}, the number of training samples left for clients, got {num_clients}"
        )
    if kind == "bias":
        return _by_bias(labels, num_clients, bias, generator)
    if kind == "dirichlet":
        return _by_dirichlet(labels, num_clients, alpha, generator)
    if kind == "subject":
        return _by_subject(subjects, num_clients)
    order = torch.randperm(len(labels), generator=generator)
    return [part.sort().values for part in order.tensor_split(num_clients)]


def _by_bias(labels: Tensor, num_clients: int, bias: float, generator: torch.Generator) -> list[Tensor]:
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
    parts = _grouped(group + num_labels * place, num_clients)
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"data.clients: {len(empty)} of {num_clients} clients would hold no sample (client {empty[0]} is the first); "
            f"{num_samples} samples are too few, use fewer clients or a smaller bias"
        )
    return parts


def _by_dirichlet(labels: Tensor, num_clients: int, alpha: float, generator: torch.Generator) -> list[Tensor]:
    if not 1e-3 <= alpha <= 1e6:
        raise ValueError(f"data.alpha must be between 1e-3 and 1e6 (far above 1 clients are alike), got {alpha}")
    # PyTorch's Dirichlet takes no generator
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    client_n = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_label = (labels == label).nonzero().flatten()
        ends = np.rint(rng.dirichlet(np.full(num_clients, alpha)).cumsum() * len(of_label)).astype(np.int64)
        ends[-1] = len(of_label)  # the shares' sum is 1 within rounding only
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


def _by_subject(subjects: Tensor | None, num_clients: int) -> list[Tensor]:
    if subjects is None:
        raise ValueError(
            "data.partition 'subject' needs data that say whom a sample is of, this data set does not; "
            "use data.dataset = 'har' or another partition"
        )
    persons, person_n = subjects.unique(return_inverse=True)
    if num_clients != len(persons):
        raise ValueError(
            f"data.clients must be {len(persons)} for data.partition 'subject', one client a subject, got {num_clients}"
        )
    return _grouped(person_n, num_clients)


def _grouped(client_n: Tensor, num_clients: int) -> list[Tensor]:
    """The ascending indices of each client's samples, from the client ``(n,)`` of each sample."""
    sizes = torch.bincount(client_n, minlength=num_clients)
    return list(client_n.argsort(stable=True).split(sizes.tolist()))
