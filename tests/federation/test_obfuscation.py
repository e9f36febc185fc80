"""What clients do for their privacy: each method against a literal loop, its defining property, and its draws."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.choices import with_settings
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS, Clip, Draws, Mask, Noise, Prune

LAYERS = {"first": slice(0, 40), "empty": slice(40, 40), "second": slice(40, 41), "third": slice(41, 97)}
METHODS: list[tuple[str, Any]] = [
    ("mask", Mask(strength=0.3)),
    ("mask", Mask(strength=0.3, scale=True)),
    ("mask", Mask(strength=0.3, shared=True)),
    ("clip", Clip(strength=0.5)),
    ("clip", Clip(strength=0.7, relative=True)),
    ("prune", Prune(strength=0.6)),
    ("noise", Noise(strength=0.5)),
    ("noise", Noise(strength=0.5, relative=True)),
]
IDS = [repr(settings) for _, settings in METHODS]


def random_rows(num_rows: int = 5) -> Tensor:
    """Rows of several lengths, with entries of equal magnitude and a zero; a fifth row has one magnitude only."""
    rows = torch.randn(num_rows, 97, generator=torch.Generator().manual_seed(0)) * torch.arange(1, num_rows + 1)[:, None]
    rows[:, 3], rows[:, 7], rows[:, 50] = rows[:, 5], -rows[:, 5], 0
    rows[4:] = rows[4:].sign()
    return rows


def obfuscate(name: str, settings: Any, rows: Tensor, clients: list[int] | None = None, number: int = 4) -> Tensor:
    draws = Draws(0, number, torch.arange(len(rows)) if clients is None else torch.tensor(clients))
    return with_settings(OBFUSCATIONS[name], settings, rows.clone(), draws, LAYERS)


def twin(name: str, settings: Any, row: list[float], generator: torch.Generator) -> list[float]:
    """One row, one entry at a time, in Python's float64."""
    if name == "mask":
        u = torch.rand(len(row), generator=generator).tolist()
        factor = 1 / (1 - settings.strength) if settings.scale else 1.0
        return [value * factor if u_k >= settings.strength else 0.0 for value, u_k in zip(row, u, strict=True)]
    if name == "clip":
        magnitudes = sorted(abs(value) for value in row)
        bound = magnitudes[max(1, round(settings.strength * len(row))) - 1] if settings.relative else settings.strength
        return [max(-bound, min(bound, value)) for value in row]
    if name == "prune":
        pruned = list(row)
        for columns in LAYERS.values():
            order = sorted(range(columns.start, columns.stop), key=lambda k: abs(row[k]))
            for k in order[: round(settings.strength * len(order))]:
                pruned[k] = 0.0
        return pruned
    z = torch.randn(len(row), generator=generator).tolist()
    unit = math.sqrt(sum(value * value for value in row) / len(row)) if settings.relative else 1.0
    return [value + settings.strength * unit * z_k for value, z_k in zip(row, z, strict=True)]


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=IDS)
def test_a_method_is_its_loop_over_entries(name: str, settings: Any) -> None:
    rows, draws = random_rows(), Draws(0, 4, torch.arange(5))
    shared = getattr(settings, "shared", False)
    generators = [draws.of_all() for _ in rows] if shared else draws.of_clients()
    want = torch.tensor(
        [twin(name, settings, row.tolist(), generator) for row, generator in zip(rows, generators, strict=True)],
        dtype=torch.float64,
    )
    got = obfuscate(name, settings, rows)
    assert got.dtype == torch.float32
    assert not torch.equal(got, rows)
    assert torch.equal(got == 0, want == 0)
    # at most four float32 operations per entry, each of which rounds values of at most this size
    largest = rows.abs().amax(1, keepdim=True).double() * 4
    assert ((got.double() - want).abs() <= 4 * torch.finfo(torch.float32).eps * largest).all()


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=IDS)
def test_the_order_of_clients_and_who_else_takes_part_do_not_matter(name: str, settings: Any) -> None:
    rows = random_rows()
    whole = obfuscate(name, settings, rows)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(obfuscate(name, settings, rows[order], order), whole[order])
    assert torch.equal(obfuscate(name, settings, rows[[2]], [2]), whole[[2]])


@pytest.mark.parametrize("name", ["mask", "noise"])
def test_draws_differ_between_clients_and_rounds(name: str) -> None:
    settings = OBFUSCATIONS.settings_of(name)(strength=0.5)
    ones = torch.ones(4, 97)
    rows = torch.cat([obfuscate(name, settings, ones, number=number) for number in (4, 5, 34)])
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_shared_mask_is_one_per_round() -> None:
    first, second = (obfuscate("mask", Mask(strength=0.5, shared=True), torch.ones(4, 97), number=n) for n in (4, 5))
    assert (first == first[0]).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("name", "settings"), [("mask", {}), ("mask", {"shared": True}), ("prune", {})])
def test_what_a_weaker_strength_removes_a_stronger_one_removes_too(name: str, settings: dict[str, bool]) -> None:
    rows = random_rows()
    kept = [
        obfuscate(name, OBFUSCATIONS.settings_of(name)(strength=strength, **settings), rows) != 0
        for strength in (0.0, 0.1, 0.3, 0.31, 0.7, 0.99)
    ]
    assert torch.equal(kept[0], rows != 0)
    for weaker, stronger in itertools.pairwise(kept):
        assert (weaker | ~stronger).all()
    assert (kept[1] & ~kept[4]).any()


def test_noise_of_two_strengths_is_a_multiple() -> None:
    rows = random_rows()
    weak, strong = (obfuscate("noise", Noise(strength=strength), rows.double()) - rows for strength in (0.5, 2.0))
    torch.testing.assert_close(strong, 4 * weak)


def test_a_mask_drops_the_share_p_and_its_scaled_mean_is_the_update() -> None:
    num_draws, p = 2000, 0.7
    rows = random_rows(1).expand(num_draws, -1)
    masked = obfuscate("mask", Mask(strength=p, scale=True), rows)
    # five standard deviations of a mean of independent draws
    share = (masked[:, rows[0] != 0] == 0).double().mean()
    num_entries = num_draws * int((rows[0] != 0).sum())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / num_entries)
    std = rows[0].double().abs() * math.sqrt(p / (1 - p) / num_draws)
    assert ((masked.double().mean(0) - rows[0]).abs() <= 5 * std).all()


def test_relative_strengths_do_not_depend_on_a_rows_length() -> None:
    """A factor of 8 changes no digit of a float32."""
    rows = random_rows().abs()
    for name, settings in (("clip", Clip(strength=0.7, relative=True)), ("noise", Noise(strength=0.5, relative=True))):
        assert torch.equal(obfuscate(name, settings, 8 * rows), 8 * obfuscate(name, settings, rows))


def test_the_weakest_strengths_change_nothing() -> None:
    rows = random_rows()
    weakest: list[tuple[str, Any]] = [
        ("mask", Mask(strength=0.0, scale=True)),
        ("clip", Clip(strength=1.0, relative=True)),
        ("prune", Prune(strength=0.0)),
        ("noise", Noise(strength=0.0)),
    ]
    for name, settings in weakest:
        assert torch.equal(obfuscate(name, settings, rows), rows), name


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Mask, {"strength": 1.0}, "must be from 0 to below 1 for obfuscation 'mask', got 1.0"),
        (Mask, {"strength": -0.1}, "must be from 0 to below 1 for obfuscation 'mask', got -0.1"),
        (Mask, {"strength": math.nan}, "must be from 0 to below 1 for obfuscation 'mask', got nan"),
        (Prune, {"strength": 1.0}, "must be from 0 to below 1 for obfuscation 'prune', got 1.0"),
        (Clip, {"strength": 0.0}, "must be finite and above 0, got 0.0"),
        (Clip, {"strength": math.inf}, "must be finite and above 0, got inf"),
        (Clip, {"strength": 1.5, "relative": True}, "must be above 0 and at most 1, got 1.5"),
        (Noise, {"strength": -1.0}, "must be finite and at least 0 for obfuscation 'noise', got -1.0"),
        (Noise, {"strength": math.inf}, "must be finite and at least 0 for obfuscation 'noise', got inf"),
    ],
)
def test_an_impossible_strength_is_named(kind: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"privacy.strength {message}")):
        kind(**settings)
