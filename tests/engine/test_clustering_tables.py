"""The tables of docs/verdict.md that stored masks give: `pytest -m slow -s tests/engine/test_clustering_tables.py`."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tests.stored_masks import MILD, MaskSet, stored_sets

pytestmark = pytest.mark.slow

Rule = Literal["two-stage", "signed"]
RULES: tuple[Rule, ...] = ("two-stage", "signed")


@pytest.fixture(scope="module")
def harmful(data_dir: Path) -> dict[str, MaskSet]:
    sets = stored_sets(data_dir / "masks", "recipes")
    return {name: masks for name, masks in sets.items() if masks.malicious and masks.attack not in MILD}


@pytest.fixture(scope="module")
def older(data_dir: Path) -> dict[str, MaskSet]:
    return stored_sets(data_dir / "masks", "hamming")


def table(title: str, sets: Iterable[MaskSet], rule: Rule, skip: int = 0, end: int | None = None) -> tuple[int, int, float]:
    """Prints one row; how many sets are exact, how many keep the wrong side, and the mean FPR.

    The first ``skip`` clients and those from ``end`` on are judged with the others, and not counted.
    """
    rates = [replace(masks, malicious=masks.malicious - skip).rates(masks.judge(rule).benign[skip:end]) for masks in sets]
    both = np.array(rates)
    exact, near = (both.max(1) == 0).sum(), (both.max(1) <= 0.05).sum()
    wrong = (both.min(1) > 0.5).sum()
    rejected, kept = 100 * both.mean(0)
    print(f"{title:46} {rule:10} {len(both):4} sets: {exact:4} exact, {near:4} within 5%, {wrong:2} wrong sides, ", end="")
    print(f"FPR {rejected:.2f}%, FNR {kept:.1f}%")
    return int(exact), int(wrong), float(rejected)


def drawn(masks: MaskSet, number: int, rng: np.random.Generator) -> MaskSet:
    return masks.of(torch.from_numpy(np.sort(rng.permutation(len(masks.distances) - 1)[:number])))


def test_stored_sets_and_decoys(harmful: dict[str, MaskSet], older: dict[str, MaskSet]) -> None:
    changes: dict[str, Callable[[MaskSet], MaskSet]] = {
        "as stored": lambda masks: masks,
        "an attacker copies another": lambda masks: masks.with_copy(of=0, at=1),
        "an attacker replays an honest client": lambda masks: masks.with_copy(of=len(masks.distances) - 2, at=0),
    }
    for name, sets in (("recipes", harmful), ("older", older)):
        for what, change in changes.items():
            several = [change(masks) for masks in sets.values() if masks.malicious >= 2 or what == "as stored"]
            # a replay is no worse than the update that it repeats
            skip = int("replays" in what)
            counts = {rule: table(f"{name}, {what}", several, rule, skip) for rule in RULES}
            assert counts["signed"][0] >= counts["two-stage"][0]
            assert counts["signed"][1] == 0
            assert counts["signed"][2] <= 0.5


@pytest.mark.parametrize("number", [40, 20, 10])
def test_some_of_the_clients_alone(harmful: dict[str, MaskSet], number: int) -> None:
    rng = np.random.default_rng(7)
    few = [drawn(masks, number, rng) for masks in harmful.values()]
    attacked = [masks for masks in few if masks.malicious]
    counts = {rule: table(f"{number} clients drawn, some attack", attacked, rule) for rule in RULES}
    # of ten clients it finds a little less, and rejects fewer honest ones
    assert counts["signed"][0] >= counts["two-stage"][0] - (4 if number == 10 else 0)
    assert counts["signed"][2] < counts["two-stage"][2]
    assert counts["signed"][1] == 0
    honest = [masks.of(torch.arange(masks.malicious, len(masks.distances) - 1)) for masks in harmful.values()]
    alone = [drawn(masks, number, rng) for masks in honest if len(masks.distances) > number]
    rejected = {rule: table(f"{number} honest clients drawn", alone, rule)[2] for rule in RULES}
    assert rejected["signed"] <= max(1, rejected["two-stage"] / 4)


def test_attackers_with_the_masks_of_honest_clients(harmful: dict[str, MaskSet]) -> None:
    sets = []
    for masks in harmful.values():
        twins = masks
        for attacker in range(min(masks.malicious, 60 - masks.malicious)):
            copied = twins.with_copy(of=masks.malicious + attacker, at=attacker)
            twins = replace(copied, alignment=masks.alignment, norms=masks.norms)
        sets.append(twins)
    exact, _, _ = table("attackers with honest masks", sets, "signed")
    assert exact >= 68


@pytest.mark.parametrize(("replays", "at_most"), [(1, 0), (2, 0.03), (3, 0.03), (4, 0.03), (5, 0.03)])
def test_replays_have_hardly_any_honest_client_rejected(data_dir: Path, replays: int, at_most: float) -> None:
    """Nobody else attacks; each client is replayed in turn, or every third one by several."""
    sets = [masks for masks in stored_sets(data_dir / "masks", "recipes").values() if not masks.malicious]
    victims = range(replays, 60, 1 if replays == 1 else 3)
    rejected = 0
    for masks in sets:
        for victim in victims:
            replayed = masks
            for attacker in range(replays):
                replayed = replayed.with_copy(of=victim, at=attacker)
            rejected += int(not replayed.judge().benign[victim])
    trials = len(sets) * len(victims)
    print(f"{replays} replays: {rejected} of {trials} replayed clients are rejected")
    assert rejected <= at_most * trials


def test_clients_that_send_zeros_beside_others(harmful: dict[str, MaskSet]) -> None:
    rng = np.random.default_rng(7)
    few = [masks for masks in (drawn(masks, 24, rng) for masks in harmful.values()) if masks.malicious]
    alone = table("24 clients drawn, some attack", few, "signed")
    assert table("the same beside 36 that send zeros", [masks.with_idle(36) for masks in few], "signed", end=24) == alone
