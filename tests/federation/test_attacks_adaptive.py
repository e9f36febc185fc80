"""Attacks on SkyMask itself have their defining properties, against plain loops in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.attacks import ATTACKS, IPM, AttackConfig, AttackContext, BaseAttack, Threat, build_attack
from skymask_gpu.federation.attacks.adaptive import bit_twin

CONTEXT = AttackContext(layers={"fc": slice(0, 300)}, num_classes=10, input_shape=(1, 8, 8), brightest=3.0)
BASES = ["sign-flip", "min-max", "trim"]


def threat(name: str, seed: int = 0, base: str = "sign-flip", **settings: Any) -> Threat:
    if name != "bit-twin":
        settings["base"] = BaseAttack(name=base)
    config = AttackConfig(name=name, share=0.2, settings=ATTACKS.settings_of(name)(**settings))
    return Threat(config, torch.Generator().manual_seed(seed))


def sent_by(name: str, updates: Tensor, malicious: Tensor, **settings: Any) -> Tensor:
    """What the malicious clients send."""
    one = threat(name, **settings)
    return build_attack(one.config, CONTEXT).send(updates, malicious, one)


def poison_of(base: str, updates: Tensor, malicious: Tensor, seed: int = 0) -> Tensor:
    """What they would send if they did not hide."""
    one = Threat(AttackConfig(name=base, share=0.2), torch.Generator().manual_seed(seed))
    return build_attack(one.config, CONTEXT).send(updates, malicious, one)


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    """In float64, in which loops and attacks agree in all comparisons."""
    return torch.randn(20, 300, generator=generator, dtype=torch.float64) * 0.1 + 0.05


@pytest.fixture
def malicious() -> Tensor:
    return torch.arange(20) % 5 == 0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("decoys", "count"), [(2, 2), (3, 3), (9, 4)])
def test_decoys_are_the_same_to_the_bit(base: str, decoys: int, count: int, updates: Tensor, malicious: Tensor) -> None:
    sent = sent_by("decoys", updates, malicious, base=base, decoys=decoys)
    poison = poison_of(base, updates, malicious)
    for f in range(4):
        assert torch.equal(sent[f], poison[0 if f < count else f])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("copies", "count"), [(1, 1), (3, 3), (9, 4)])
def test_replays_are_honest_updates(base: str, copies: int, count: int, updates: Tensor, malicious: Tensor) -> None:
    sent = sent_by("replay", updates, malicious, base=base, copies=copies)
    copied = [[n for n in range(20) if not malicious[n] and torch.equal(row, updates[n])] for row in sent]
    assert [len(of) for of in copied] == [1] * count + [0] * (4 - count)
    assert len({of[0] for of in copied[:count]}) == count, "each is another's copy"
    assert torch.equal(sent[count:], poison_of(base, updates, malicious)[count:])
    assert not torch.equal(sent, sent_by("replay", updates, malicious, base=base, copies=copies, seed=1))


def test_more_replays_than_honest_clients_share_them(updates: Tensor) -> None:
    malicious = torch.arange(20) > 1
    sent = sent_by("replay", updates, malicious, copies=18)
    copied = [next(n for n in range(2) if torch.equal(row, updates[n])) for row in sent]
    assert sorted(copied) == [0] * 9 + [1] * 9


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("hostages", "count"), [(0.01, 1), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize(("params_share", "columns"), [(0.001, 1), (0.1, 30)])
def test_hostages_are_root_like_but_where_signs_agree(
    base: str, hostages: float, count: int, params_share: float, columns: int, updates: Tensor, malicious: Tensor
) -> None:
    sent = sent_by("hostage-root", updates, malicious, base=base, hostages=hostages, params_share=params_share)
    poison, own = poison_of(base, updates, malicious), updates[malicious]
    honest = [updates[n].tolist() for n in range(20) if not malicious[n]]
    mean = [sum(row[p] for row in honest) / 16 for p in range(300)]
    agreement = [abs(sum(math.copysign(1, row[p]) for row in honest)) for p in range(300)]
    agreeing = set(sorted(range(300), key=lambda p: -agreement[p])[:columns])
    for f in range(4):
        for p in range(300):
            root_like = mean[p] * math.hypot(*own[f].tolist()) / math.hypot(*mean)
            poisoned = f >= count or p in agreeing
            assert sent[f, p].item() == pytest.approx(poison[f, p].item() if poisoned else root_like, rel=1e-12)


@pytest.mark.parametrize("shift", [-0.05, 0.0])
def test_twins_have_an_honest_clients_bits_and_do_the_most_damage(shift: float, updates: Tensor, malicious: Tensor) -> None:
    """By a loop over candidates: the end of the allowed interval that is worst for the honest mean."""
    updates = updates + shift
    updates[:, 7] = 0.0
    sent = sent_by("bit-twin", updates, malicious)
    honest = updates[~malicious]
    mean = honest.mean(0)
    for f in range(4):
        assert torch.equal(sent[f] >= mean, honest[f] >= mean), "the same bits"
        for p in range(300):
            largest, threshold = max(abs(value) for value in honest[:, p].tolist()), mean[p].item()
            # values with this client's bit: from the threshold up to the largest magnitude, or from minus that up to it
            lowest, highest = (threshold, largest) if honest[f, p] >= threshold else (-largest, threshold)
            worst = 0.0 if threshold == 0 else lowest if threshold > 0 else highest
            assert sent[f, p].item() == pytest.approx(worst, rel=1e-12)


def test_there_may_be_more_twins_than_honest_clients(updates: Tensor) -> None:
    malicious = torch.arange(20) > 2
    sent = sent_by("bit-twin", updates, malicious)
    assert all(torch.equal(sent[f], sent[f % 3]) for f in range(17))
    assert not torch.equal(sent[0], sent[1])


def test_twins_keep_their_bits_in_float32(updates: Tensor, malicious: Tensor) -> None:
    honest = updates[~malicious].float()
    sent = bit_twin(updates.float(), malicious, threat("bit-twin"))
    assert sent.dtype == torch.float32
    assert torch.equal(sent >= honest.mean(0), honest[:4] >= honest.mean(0))


@pytest.mark.parametrize("base", BASES)
def test_bridges_have_equal_steps_from_an_honest_client_to_the_poison(base: str, updates: Tensor, malicious: Tensor) -> None:
    sent = sent_by("bridges", updates, malicious, base=base)
    poison, honest = poison_of(base, updates, malicious), updates[~malicious]
    pairs = [(math.dist(one.tolist(), other.tolist()), one, other) for one in poison for other in honest]
    length, far, near = min(pairs, key=lambda pair: pair[0])
    points = [near, *sent]
    for f in range(4):
        assert math.dist(points[f].tolist(), points[f + 1].tolist()) == pytest.approx(length / 4, rel=1e-9)
        torch.testing.assert_close(points[f + 1], near + (f + 1) / 4 * (far - near), rtol=0, atol=1e-9 * length)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("alignment", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("offset", [-0.04, 0.0, 0.05])
def test_better_than_honest_spends_all_that_honest_clients_leave(
    base: str, alignment: float, offset: float, updates: Tensor, malicious: Tensor
) -> None:
    """Cosine and length within the honest ones', one of them at its bound; the poison's direction across the mean."""
    updates = updates + offset
    sent = sent_by("better-than-honest", updates, malicious, base=base, alignment=alignment)
    poison, honest = poison_of(base, updates, malicious), updates[~malicious]
    mean = honest.mean(0)
    length = math.hypot(*mean.tolist())
    cosines = [(row @ mean).item() / length / math.hypot(*row.tolist()) for row in honest]
    norms = [math.hypot(*row.tolist()) for row in honest]
    for row, poisoned in zip(sent, poison, strict=True):
        along = (row @ mean).item() / length
        assert along == pytest.approx(min(alignment * length, max(length, min(cosines) * max(norms))), rel=1e-9)
        norm = math.hypot(*row.tolist())
        slack = along / norm - min(cosines), 1 - norm / max(norms)
        assert min(slack) == pytest.approx(0, abs=1e-9), "nothing is left of one"
        assert max(slack) > -1e-9, "and the other is kept"
        across = poisoned - (poisoned @ mean).item() / length**2 * mean
        rest = row - along / length * mean
        torch.testing.assert_close(rest, across * (rest.norm() / across.norm()), rtol=0, atol=1e-12 * norm)
        assert rest.norm() > 0.1 * along, "there is damage"


def test_poison_along_the_mean_leaves_nothing_to_spend(updates: Tensor, malicious: Tensor) -> None:
    """ipm goes straight back: what is across the mean is rounding, here of eps times the row."""
    base = BaseAttack(name="ipm", settings=IPM())
    config = AttackConfig(name="better-than-honest", share=0.2, settings=ATTACKS.settings_of("better-than-honest")(base=base))
    sent = build_attack(config, CONTEXT).send(updates, malicious, Threat(config))
    assert (sent @ updates[~malicious].mean(0) > 0).all()


@pytest.mark.parametrize("name", ["decoys", "replay", "hostage-root", "bridges", "better-than-honest"])
def test_without_honest_clients_the_base_attack_is_left(name: str, updates: Tensor) -> None:
    assert torch.equal(sent_by(name, updates, torch.ones(20, dtype=torch.bool)), -updates)


@pytest.mark.parametrize("name", ["hostage-root", "bit-twin", "bridges", "better-than-honest"])
def test_updates_of_zero_give_finite_rows(name: str, malicious: Tensor) -> None:
    assert sent_by(name, torch.zeros(20, 300), malicious).isfinite().all()
