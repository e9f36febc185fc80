"""Fang's attacks have their defining properties: beyond the trimmed mean's extremes, and picked by Krum."""

import math

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.attacks import AttackConfig, Threat, attack, fang


def threat(name: str, seed: int = 0) -> Threat:
    return Threat(AttackConfig(name=name, share=0.2), torch.Generator().manual_seed(seed))


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return torch.randn(20, 300, generator=generator) * 0.1 + 0.05


@pytest.fixture
def malicious() -> Tensor:
    return torch.arange(20) % 5 == 0


def test_trim_lies_beyond_the_honest_extreme_against_the_mean(updates: Tensor, malicious: Tensor) -> None:
    updates = updates + 0.2 * updates[0].sign()  # some parameters have one sign in all clients
    honest, sent = updates[~malicious], attack(updates, malicious, threat("trim"))[malicious]
    lowest, highest, rises = honest.min(0).values, honest.max(0).values, honest.mean(0) > 0
    assert (sent <= lowest)[:, rises].all()
    assert (sent >= highest)[:, ~rises].all()
    extreme = torch.where(rises, lowest, highest)
    ratio = sent / extreme
    assert (ratio >= 0.5).all()
    assert (ratio <= 2).all()
    assert ratio.std() > 0.1, "drawn, not all alike"


# The Krum attack


def krum_choice(sent_NP: Tensor, num_malicious: int) -> int:
    """Krum, a loop: the client with the smallest sum of squared distances to its N - F - 2 nearest others."""
    rows = sent_NP.double()
    scores = []
    for i in range(len(rows)):
        others = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(len(rows)) if j != i)
        scores.append(sum(others[: len(rows) - num_malicious - 2]))
    return scores.index(min(scores))


def theorem_1(honest_HP: Tensor, num_malicious: int) -> float:
    """Fang et al.'s bound on lambda, a loop."""
    rows = honest_HP.double()
    num_clients, num_params = len(rows) + num_malicious, rows.shape[1]
    sums = []
    for i in range(len(rows)):
        others = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(len(rows)) if j != i)
        sums.append(sum(others[: num_clients - num_malicious - 2]))
    furthest = max(float(row.norm()) for row in rows)
    return math.sqrt(min(sums) / ((num_clients - 2 * num_malicious - 1) * num_params)) + furthest / math.sqrt(num_params)


def krum_case(seed: int, num_clients: int, num_malicious: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Updates around a common direction, who is malicious, and the sign of the honest mean."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_clients, 300, generator=generator, dtype=torch.float64)
    updates = torch.randn(300, generator=generator, dtype=torch.float64) + spread * noise
    malicious = torch.randperm(num_clients, generator=generator) < num_malicious
    return updates, malicious, updates[~malicious].mean(0).sign()


@pytest.mark.parametrize(("num_clients", "num_malicious", "spread"), [(20, 4, 1.0), (15, 6, 0.5), (12, 1, 2.0), (20, 4, 3.0)])
@pytest.mark.parametrize("seed", range(3))
def test_krum_picks_the_krum_attack(seed: int, num_clients: int, num_malicious: int, spread: float) -> None:
    """The defining property: Krum picks a malicious client, and would not if they went twice as far."""
    updates, malicious, sign = krum_case(seed, num_clients, num_malicious, spread)
    sent = attack(updates, malicious, threat("krum", seed=seed))
    assert malicious[krum_choice(sent, num_malicious)]
    exact = [row for row in sent[malicious] if (row == row.abs().max() * -sign).all()]
    assert len(exact) == 1, "one is a multiple of the sign"
    step = exact[0].abs().max().item()
    bound = theorem_1(updates[~malicious], num_malicious)
    halvings = math.log2(bound / step)
    # Everything is computed in float64, with roundings of 1e-16; a single one to float32 is 6e-8.
    assert halvings == pytest.approx(round(halvings), abs=1e-9)
    assert round(halvings) >= 1
    further = sent - malicious[:, None] * step * sign
    assert not malicious[krum_choice(further, num_malicious)]
    distances = (sent[malicious] - exact[0]).norm(dim=1)
    wanted = torch.full((num_malicious - 1,), 0.01, dtype=torch.float64)
    torch.testing.assert_close(distances.sort().values[1:], wanted, rtol=1e-9, atol=0)


def test_distances_come_from_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, malicious, _ = krum_case(0, 20, 4, 1.0)
    sent = attack(updates, malicious, threat("krum"))
    monkeypatch.setattr(fang, "_COLUMNS_AT_ONCE", 128)
    assert torch.equal(attack(updates, malicious, threat("krum")), sent)


def test_the_krum_attack_ignores_parameters_that_nobody_moves() -> None:
    updates, malicious, _ = krum_case(0, 20, 4, 1.0)
    moved = torch.arange(300) % 3 > 0
    sent = attack(updates * moved, malicious, threat("krum"))
    assert malicious[krum_choice(sent, 4)]
    assert sent[malicious][:, ~moved].abs().max() < 0.01
    assert sent[malicious][:, moved].abs().min() > 0.01


def test_the_krum_attack_gives_up_below_its_smallest_step() -> None:
    """Honest updates that are all the same: Krum picks one of them however near the others are."""
    malicious = torch.arange(10) < 1
    sent = attack(torch.full((10, 50), 0.3), malicious, threat("krum"))
    assert 5e-6 <= sent[0].abs().max() < 1e-5


def test_a_majority_of_krum_attackers_goes_to_the_bound_and_is_picked(updates: Tensor) -> None:
    malicious = torch.arange(20) < 12
    sent = attack(updates, malicious, threat("krum"))
    assert malicious[krum_choice(sent, 12)]
    assert sent[malicious].abs().min() > 0.1
