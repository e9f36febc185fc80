"""Every partition gives each sample to one client, each client at least one, and has the property it is named for."""

import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.datasets.partition import PARTITIONS, partition

LABELS = torch.arange(3_000) % 10
SUBJECTS = torch.arange(3_000) * 7 % 30


def share_out(
    kind: str,
    labels: Tensor = LABELS,
    num_clients: int = 30,
    *,
    bias: float = 0.5,
    alpha: float = 0.5,
    subjects: Tensor | None = SUBJECTS,
    seed: int = 0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return partition(kind, labels, num_clients, bias=bias, alpha=alpha, subjects=subjects, generator=generator)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_each_sample_goes_to_one_client_and_each_client_has_some(kind: str) -> None:
    parts = share_out(kind)
    assert len(parts) == 30
    assert sorted(torch.cat(parts).tolist()) == list(range(3_000))
    for part in parts:
        assert part.dtype == torch.int64
        assert len(part) > 0
        assert part.tolist() == sorted(part.tolist())
    assert all(torch.equal(a, b) for a, b in zip(parts, share_out(kind), strict=True)), "the seed decides"
    if kind != "subject":
        assert any(not torch.equal(a, b) for a, b in zip(parts, share_out(kind, seed=1), strict=True))


def test_bias_q_sends_a_share_q_of_each_label_to_its_own_group() -> None:
    labels = torch.arange(60_000) % 10
    for bias in (0.1, 0.5, 0.9):
        parts = share_out("bias", labels, 50, bias=bias)
        own = sum(int((labels[part] == client % 10).sum()) for client, part in enumerate(parts)) / 60_000
        assert abs(own - bias) < 0.01
        # what does not stay goes to each other group alike
        others = torch.stack([(labels[torch.cat(parts[1::10])] == label).sum() for label in range(10) if label != 1])
        assert others.float().std() / others.float().mean() < 0.12
        # and within a group to each client alike
        sizes = torch.tensor([len(part) for part in parts[1::10]]).float()
        assert sizes.std() / sizes.mean() < 0.1


def test_bias_of_500_clients_takes_no_time() -> None:
    labels = torch.arange(60_000) % 10
    start = time.perf_counter()
    share_out("bias", labels, 500)
    assert time.perf_counter() - start < 1


def test_dirichlet_shares_have_the_distributions_moments() -> None:
    """A client's share of a class: mean 1 / N, variance (1 / N) (1 - 1 / N) / (N alpha + 1), over 2,000 draws of each."""
    num_clients, labels = 5, torch.arange(20_000) % 2
    for alpha in (0.1, 1.0, 20.0):
        parts = [share_out("dirichlet", labels, num_clients, alpha=alpha, seed=seed) for seed in range(200)]
        shares = torch.stack([labels[part].bincount(minlength=2) for draw in parts for part in draw]).double() / 10_000
        shares = shares.view(200, num_clients, 2)
        assert (shares.mean((0, 2)) - 0.2).abs().max() < 0.08
        want = 0.2 * 0.8 / (num_clients * alpha + 1)
        assert shares.var(unbiased=False).item() == pytest.approx(want, rel=0.15)
    # classes are drawn apart from each other
    together = torch.corrcoef(shares.permute(2, 0, 1).reshape(2, -1))[0, 1]
    assert abs(together) < 0.1


def test_dirichlet_gives_samples_of_a_class_at_random() -> None:
    labels = torch.zeros(10_000, dtype=torch.long)
    for part in share_out("dirichlet", labels, 4, alpha=10):
        assert part.double().mean().item() == pytest.approx(5_000, rel=0.1), "not a run of neighbours"


def test_a_client_left_with_nothing_gets_one_sample_of_the_largest() -> None:
    labels = torch.zeros(100, dtype=torch.long)  # at this alpha one client gets the whole class
    sizes = sorted(len(part) for part in share_out("dirichlet", labels, 40, alpha=1e-3))
    assert sizes == [*([1] * 39), 61]
    assert [len(part) for part in share_out("dirichlet", labels, 100, alpha=1e-3)] == [1] * 100


def test_iid_parts_are_equal_and_mixed() -> None:
    sizes = [len(part) for part in share_out("iid", num_clients=7)]
    assert Counter(sizes) == {429: 4, 428: 3}
    labels = torch.arange(60_000) // 6_000  # sorted, as a file might be
    for part in share_out("iid", labels, 10):
        assert labels[part].bincount(minlength=10).min() > 480


def test_a_subject_is_a_client() -> None:
    # numbers with gaps: the root data set may have taken all samples of a person
    subjects = torch.tensor([4, 9, 4, 2, 9, 4])
    parts = share_out("subject", torch.zeros(6, dtype=torch.long), 3, subjects=subjects)
    assert [part.tolist() for part in parts] == [[3], [0, 2, 5], [1, 4]]


def test_bad_partitions_are_named() -> None:
    labels = torch.arange(100) % 10
    for kind, num_clients, options, message in (
        ("shards", 20, {}, r"data\.partition must be one of bias, dirichlet, iid, subject, got 'shards'"),
        ("iid", 0, {}, r"data\.clients must be at least 1, got 0"),
        ("iid", 101, {}, r"data\.clients must be at most 100, .*, got 101"),
        ("bias", 20, {"bias": 2}, r"data\.bias must be between 0 and 1, got 2"),
        ("bias", 5, {}, r"data\.clients must be at least 10, one per label, got 5"),
        ("bias", 90, {}, r"of 90 clients would hold no sample"),
        ("dirichlet", 20, {"alpha": 0.0}, r"data\.alpha must be between 1e-3 and 1e6 .*, got 0"),
        ("dirichlet", 20, {"alpha": float("nan")}, r"data\.alpha must be between .*, got nan"),
        (
            "subject",
            20,
            {"subjects": None},
            r"data\.partition 'subject' needs data that say which person .*'shakespeare' as data\.dataset, or another",
        ),
        ("subject", 5, {"subjects": labels}, r"data\.clients must be 10 for data\.partition 'subject', .*, got 5"),
        ("subject", 20, {"subjects": labels}, r"data\.clients must be 10 for data\.partition 'subject', .*, got 20"),
    ):
        with pytest.raises(ValueError, match=message):
            share_out(kind, labels, num_clients, **options)
