"""The filters, clippings and pre-aggregators against loops written from the papers, and what sets each of them apart."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining
from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, RuleResult, build_rule, reference
from skymask_gpu.federation.rules.preaggregators import BaseRule, base_rule_names

NUM_PARAMS = 49


def context() -> RuleContext:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return RuleContext(
        module=module,
        root_inputs=inputs,
        root_labels=inputs.argmax(1),
        num_clients=30,
        root_training=RootTraining(steps=3),
        seed=0,
    )


def info_of(updates: Tensor, num_malicious: int, seed: int = 2) -> RoundInfo:
    made = context()
    params = FlatModel(made.module, made.root_inputs, made.root_labels).initial_params
    generator = torch.Generator().manual_seed(seed)
    return RoundInfo(params, updates[-1].clone(), torch.arange(len(updates)), num_malicious, generator)


def apply(name: str, updates: Tensor, num_malicious: int = 0, seed: int = 2, **settings: Any) -> RuleResult:
    own = RULES.settings_of(name)(**settings)
    return build_rule(name, context(), own)(updates, info_of(updates, num_malicious, seed))


def random_updates(num_rows: int, seed: int) -> Tensor:
    """Rows of unlike lengths and directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, NUM_PARAMS, generator=generator, dtype=torch.float64) + 0.2
    return rows * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64).mul(0.7).exp()


def drawn(count: int, seed: int = 2) -> list[int]:
    return torch.randperm(NUM_PARAMS, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def assert_same(got: Tensor, want: np.ndarray) -> None:
    """Both in float64, to 1e-9 of the largest value."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=1e-9 * float(np.abs(want).max()))


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
def test_dnc_is_the_loop(seed: int) -> None:
    updates = random_updates(20, seed)
    result = apply("dnc", updates, 3, trials=3, columns=20, removed=1.5)
    generator = torch.Generator().manual_seed(2)
    subsets = [torch.randperm(NUM_PARAMS, generator=generator)[:20].tolist() for _ in range(3)]
    kept = reference.dnc_kept(updates.numpy(), subsets, 5)
    assert result.kept is not None
    assert result.kept.tolist() == kept
    assert sum(kept) <= 15
    assert_same(result.update, updates.numpy()[kept].mean(0))


@SEEDS
def test_signguard_is_the_loop(seed: int) -> None:
    updates = random_updates(20, seed)
    updates[:6] -= 2 * updates[:6].abs().mean()
    updates[10] *= 100
    updates[11] *= 0.01
    result = apply("signguard", updates, columns_share=0.5)
    rows = updates.numpy()
    kept = reference.signguard_kept(rows, drawn(round(0.5 * NUM_PARAMS)))
    assert result.kept is not None
    assert result.kept.tolist() == kept
    assert sum(kept) > 3
    assert not any(kept[10:12]), "too long and too short"
    assert_same(result.update, reference.mean_clipped(rows, kept, float(np.median(np.linalg.norm(rows, axis=1)))))


@SEEDS
def test_alignins_is_the_loop(seed: int) -> None:
    updates = random_updates(20, seed)
    result = apply("alignins", updates)
    rows = updates.numpy()
    kept = reference.alignins_kept(rows, info_of(updates, 0).global_params.numpy())
    assert result.kept is not None
    assert result.kept.tolist() == kept
    assert 0 < sum(kept) < 20
    assert_same(result.update, reference.mean_clipped(rows, kept, float(np.median(np.linalg.norm(rows[kept], axis=1)))))


@SEEDS
def test_fedgreed_is_the_loop(seed: int) -> None:
    made, updates = context(), 0.2 * random_updates(12, seed)
    loss = FlatModel(made.module, made.root_inputs, made.root_labels)
    params = loss.initial_params

    @torch.no_grad()
    def of_model(update: np.ndarray) -> float:
        return float(loss(params + torch.from_numpy(update)))

    result = apply("fedgreed", updates)
    kept = reference.fedgreed_kept(updates.numpy(), of_model)
    assert result.kept is not None
    assert result.kept.tolist() == kept
    assert of_model(result.update.numpy()) <= min(of_model(row) for row in updates.numpy()), "the loss never rises"


def test_fedgreed_takes_several_and_leaves_the_harmful() -> None:
    made = context()
    loss = FlatModel(made.module, made.root_inputs, made.root_labels)
    params = loss.initial_params.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(params), params)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10, NUM_PARAMS, generator=generator, dtype=torch.float64)
    updates = -0.5 * gradient + 0.02 * noise
    updates[:4] = 2 * gradient + 0.02 * noise[:4]
    result = apply("fedgreed", updates)
    assert result.kept is not None
    assert not result.kept[:4].any()
    assert result.kept[4:].sum() >= 2
    huge = torch.full((3, NUM_PARAMS), 1e300, dtype=torch.float64)
    lost = apply("fedgreed", torch.cat([huge, -huge]))
    assert torch.isfinite(lost.update).all()


@SEEDS
@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_centred_clipping_is_the_loop_and_remembers(seed: int, radius: float) -> None:
    rule = build_rule("centred-clipping", context(), RULES.settings_of("centred-clipping")(radius=radius, steps=2))
    point = np.zeros(NUM_PARAMS)
    for number in range(3):
        updates = random_updates(9, 10 * seed + number)
        # A rule that was stopped goes on from its state.
        state = rule.state()
        rule = build_rule("centred-clipping", context(), RULES.settings_of("centred-clipping")(radius=radius, steps=2))
        rule.restore(state)
        point = reference.centred_clipping(updates.numpy(), point, 2, radius or None)
        assert_same(rule(updates, info_of(updates, 0)).update, point)


def test_no_attacker_pulls_centred_clipping_further_than_its_share() -> None:
    updates = torch.zeros(10, NUM_PARAMS, dtype=torch.float64)
    updates[0] = 1e6
    moved = apply("centred-clipping", updates, radius=3.0, steps=1).update
    assert float(moved.norm()) == pytest.approx(3.0 / 10, rel=1e-9)


@SEEDS
def test_fed_nga_is_the_loop(seed: int) -> None:
    updates = random_updates(9, seed)
    assert_same(apply("fed-nga", updates).update, reference.fed_nga(updates.numpy()))
    longer = updates.clone()
    longer[2] *= 1e6
    assert_same(apply("fed-nga", longer, step=1.5).update, apply("fed-nga", updates, step=1.5).update.numpy())
    assert float(apply("fed-nga", updates[:1], step=1.5).update.norm()) == pytest.approx(1.5, rel=1e-9)


@SEEDS
@pytest.mark.parametrize("base", ["trimmed-mean", "krum", "median"])
def test_nnm_gives_the_base_rule_means_of_neighbours(seed: int, base: str) -> None:
    updates = random_updates(15, seed)
    result = apply("nnm", updates, 3, base=BaseRule(name=base))
    mixed = torch.from_numpy(reference.nearest_means(updates.numpy(), 3))
    assert result.kept is None
    assert_same(result.update, apply(base, mixed, 3).update.numpy())


@SEEDS
@pytest.mark.parametrize("base", ["trimmed-mean", "median"])
def test_foundation_fl_adds_copies_of_the_row_furthest_from_the_extremes(seed: int, base: str) -> None:
    updates = random_updates(15, seed)
    result = apply("foundation-fl", updates, 3, synthetic=0.4, base=BaseRule(name=base))
    rows = torch.from_numpy(reference.foundation_rows(updates.numpy(), 6))
    assert result.kept is None
    assert_same(result.update, apply(base, rows, 3).update.numpy())
    assert not torch.equal(result.update, apply(base, updates, 3).update)


@SEEDS
@pytest.mark.parametrize(("size", "base"), [(2, "multi-krum"), (3, "trimmed-mean"), (4, "fltrust"), (1, "median")])
def test_bucketing_gives_the_base_rule_means_of_buckets(seed: int, size: int, base: str) -> None:
    updates = random_updates(15, seed)
    result = apply("bucketing", updates, 2, bucket_size=size, base=BaseRule(name=base))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2)).tolist()
    means = torch.from_numpy(reference.bucket_means(updates.numpy(), order, size))
    made = info_of(updates, min(2, (len(means) - 1) // 2))
    want = build_rule(base, context())(means, made)
    assert_same(result.update, want.update.numpy())
    if want.kept is None:
        assert result.kept is None
    else:
        assert result.kept is not None
        assert [bool(result.kept[row]) for row in order] == [bool(want.kept[place // size]) for place in range(15)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dnc", {"trials": 0}, r"defence\.trials must be at least 1, got 0"),
        ("dnc", {"removed": 0.0}, r"defence\.removed must be finite and above 0, got 0\.0"),
        ("signguard", {"longest": 0.5}, r"defence\.longest must be finite and at least 1, the median itself, got 0\.5"),
        ("signguard", {"shortest": 1.5}, r"defence\.shortest must be at most 1, the median itself, got 1\.5"),
        ("alignins", {"top_share": 0.0}, r"defence\.top_share must be above 0 and at most 1, got 0\.0"),
        ("centred-clipping", {"radius": -1.0}, r"defence\.radius must be finite and at least 0 .*, got -1\.0"),
        ("fed-nga", {"step": float("inf")}, r"defence\.step must be finite and at least 0 .*, got inf"),
        ("foundation-fl", {"synthetic": 0.0}, r"defence\.synthetic must be finite and above 0, got 0\.0"),
        ("foundation-fl", {"base": BaseRule(name="krum")}, r"defence\.base must be one of trimmed-mean, median, got 'krum'"),
        ("bucketing", {"bucket_size": 0}, r"defence\.bucket_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES.settings_of(name)(**settings)


def test_rules_that_remember_or_wrap_are_no_base() -> None:
    assert not {"fldetector", "centred-clipping", "nnm", "bucketing", "foundation-fl"} & set(base_rule_names())
    with pytest.raises(ValueError, match=r"defence\.base must be one of .*, got 'nnm'"):
        BaseRule(name="nnm")
