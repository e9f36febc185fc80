"""Attacks have their defining properties."""

import dataclasses
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skymask_gpu.federation.attacks
from skymask_gpu.federation.attacks import (
    ATTACKS,
    Attack,
    AttackConfig,
    AttackContext,
    BaseAttack,
    Lab,
    Threat,
    build_attack,
)
from skymask_gpu.federation.attacks.partial import base_names
from skymask_gpu.federation.clients import LocalTraining

LAYERS = {"conv1.weight": slice(0, 100), "conv1.bias": slice(100, 110), "conv10.weight": slice(110, 300)}


class TwoLayers(nn.Module):
    """A model with the parameters of LAYERS."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv10 = nn.Linear(10, 10), nn.Linear(10, 19, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.conv10(self.conv1(inputs.flatten(1)[:, -10:]).relu())


def make_lab() -> Lab:
    """Ten samples for each of twenty clients."""
    generator = torch.Generator().manual_seed(3)
    inputs, parts = torch.rand(200, 1, 8, 8, generator=generator), list(torch.arange(200).split(10))
    return Lab(TwoLayers(), inputs, torch.arange(200) % 10, parts, LocalTraining(steps=2, batch_size=4, lr=1.0))


CONTEXT = AttackContext(layers=LAYERS, num_classes=10, input_shape=(1, 8, 8), brightest=3.0, lab=make_lab())
# These act while clients train, and send what they got.
IN_TRAINING = ("label-flip", "neurotoxin", "lga", "dba", "edge-case")


def configured(name: str, **settings: Any) -> AttackConfig:
    if name == "layers":
        settings.setdefault("layers", ("conv1",))
    if "base" in settings:
        settings["base"] = BaseAttack(name=settings["base"])
    return AttackConfig(name=name, share=0.0 if name == "none" else 0.2, settings=ATTACKS.settings_of(name)(**settings))


def threat(name: str, seed: int = 0, **settings: Any) -> Threat:
    params = torch.linspace(-0.3, 0.3, 300)
    return Threat(
        configured(name, **settings),
        torch.Generator().manual_seed(seed),
        clients=torch.arange(20),
        global_params=params,
        previous_params=params.flip(0) / 2,
        rule=lambda rows: rows.sort(0).values[2:-2].mean(0),
    )


def attack(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    threat = dataclasses.replace(threat, clients=torch.arange(len(malicious_N)))
    return build_attack(threat.config, CONTEXT).replaced(updates_NP, malicious_N, threat)


def built(name: str, context: AttackContext = CONTEXT, **settings: Any) -> Attack:
    return build_attack(configured(name, **settings), context)


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return torch.randn(20, 300, generator=generator, dtype=torch.float64) * 0.1 + 0.05


@pytest.fixture
def malicious() -> Tensor:
    return torch.arange(20) % 5 == 0


def assert_same_in_float64(got: Tensor, want: Tensor) -> None:
    """Both computed in float64, to 1e-9 of the largest value.

    A rounding to float64 is 1e-16 of a value, so that thousands of them stay far below 1e-9. A single
    rounding to float32, 6e-8 of a value, is far above it.
    """
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item())


# What all attacks have in common


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_leave_honest_rows_and_the_input_alone(name: str, updates: Tensor, malicious: Tensor) -> None:
    updates = updates.float()
    before = updates.clone()
    sent = attack(updates, malicious, threat(name))
    assert torch.equal(updates, before)
    assert torch.equal(sent[~malicious], before[~malicious])
    assert sent.dtype == torch.float32
    assert torch.equal(sent, attack(updates, malicious, threat(name))), "the same generator gives the same"
    assert torch.equal(attack(updates, torch.zeros(20, dtype=torch.bool), threat(name)), before)
    changes = name not in ("none", *IN_TRAINING)
    assert (sent[malicious] != before[malicious]).any(1).all() == changes


@pytest.mark.parametrize("num_honest", [0, 1, 2])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_defined_for_few_honest_clients(name: str, num_honest: int, updates: Tensor) -> None:
    updates = updates[: 4 + num_honest]
    malicious = torch.arange(len(updates)) < 4
    sent = attack(updates, malicious, threat(name))
    assert sent.isfinite().all()
    assert torch.equal(sent[4:], updates[4:])
    needed = {"ipm": 1, "krum": 1, "trim": 1, "lie": 2, "lie-backdoor": 2, "min-max": 2, "min-sum": 2}
    if name in needed:
        assert torch.equal(sent, updates) == (num_honest < needed[name])


@pytest.mark.parametrize("name", ["noise", "sparse", "trim", "krum"])
def test_rounds_draw_anew(name: str, updates: Tensor, malicious: Tensor) -> None:
    assert not torch.equal(attack(updates, malicious, threat(name)), attack(updates, malicious, threat(name, seed=1)))


# Against each client's own update


def test_sign_flip_negates(updates: Tensor, malicious: Tensor) -> None:
    assert torch.equal(attack(updates, malicious, threat("sign-flip"))[malicious], -updates[malicious])
    assert torch.equal(attack(updates, malicious, threat("none")), updates)


@pytest.mark.parametrize("std", [0.05, 2.0])
def test_noise_is_gaussian_of_the_given_width(std: float, malicious: Tensor, generator: torch.Generator) -> None:
    updates = torch.randn(20, 20_000, generator=generator)
    noise = (attack(updates, malicious, threat("noise", std=std)) - updates)[malicious].double() / std
    assert abs(noise.mean().item()) < 0.015  # 4 * 20,000 draws: four standard errors
    assert abs(noise.std().item() - 1) < 0.01
    assert abs((noise.abs() < 1).double().mean().item() - math.erf(math.sqrt(0.5))) < 0.007
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.03, "each client's own"


@pytest.mark.parametrize("name", ["scaling", "scaling-backdoor"])
def test_scaled_updates_replace_the_mean(name: str, updates: Tensor, malicious: Tensor) -> None:
    """The defining property: with honest updates of zero the mean of all is that of the malicious clients."""
    updates = updates * malicious[:, None]
    assert_same_in_float64(attack(updates, malicious, threat(name)).mean(0), updates[malicious].mean(0))
    assert torch.equal(attack(updates, malicious, threat(name, factor=3.0))[malicious], 3 * updates[malicious])


# Against the honest updates


@pytest.mark.parametrize(("epsilon", "sign"), [(0.5, 1), (3.9, 1), (4.1, -1)])
def test_ipm_turns_the_mean_around_beyond_honest_to_malicious(
    epsilon: float, sign: int, updates: Tensor, malicious: Tensor
) -> None:
    """The defining property: <mean of all, honest mean> = (H - epsilon F) / N |honest mean|^2, of 16 honest and 4 malicious."""
    sent = attack(updates, malicious, threat("ipm", epsilon=epsilon))
    honest_mean = updates[~malicious].mean(0)
    product = sent.mean(0) @ honest_mean / (honest_mean @ honest_mean)
    assert product.sign() == sign
    assert product.item() == pytest.approx((16 - epsilon * 4) / 20, rel=1e-9)


def check_direction(sent_P: Tensor, honest_HP: Tensor, kind: str) -> None:
    """From the honest mean, along the perturbation of that name."""
    mean_P = honest_HP.mean(0)
    want_P = {"std": -honest_HP.std(0), "unit": -mean_P, "sign": -mean_P.sign()}[kind]
    gamma = (sent_P - mean_P) @ want_P / (want_P @ want_P)
    assert gamma > 0
    assert_same_in_float64(sent_P - mean_P, gamma * want_P)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_is_as_far_out_as_honest_updates_allow(direction: str, updates: Tensor, malicious: Tensor) -> None:
    """The defining property: the largest distance to an honest update equals the largest among honest updates."""
    honest = updates[~malicious]
    sent = attack(updates, malicious, threat("min-max", direction=direction))[malicious]
    assert (sent == sent[0]).all()
    widest = torch.pdist(honest).max()
    assert torch.cdist(sent[:1], honest).max().item() == pytest.approx(widest.item(), rel=1e-9)
    check_direction(sent[0], honest, direction)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_sum_is_as_far_out_in_sum_as_honest_updates_are(direction: str, updates: Tensor, malicious: Tensor) -> None:
    """The defining property: the sum of squared distances to honest updates equals the largest among honest updates."""
    honest = updates[~malicious]
    sent = attack(updates, malicious, threat("min-sum", direction=direction))[malicious]
    assert (sent == sent[0]).all()
    sums = torch.cdist(honest, honest).square().sum(1)
    assert (sent[0] - honest).square().sum().item() == pytest.approx(sums.max().item(), rel=1e-9)
    check_direction(sent[0], honest, direction)


@pytest.mark.parametrize("name", ["ipm", "lie", "min-max", "min-sum", "strike"])
def test_jitter_parts_the_colluders(name: str, generator: torch.Generator) -> None:
    """The defining property: what all send without jitter, plus noise of that many honest standard deviations."""
    updates = torch.randn(20, 20_000, generator=generator) * torch.rand(20_000, generator=generator) + 0.05
    malicious = torch.arange(20) % 5 == 0
    still, parted = threat(name), threat(name, jitter=0.3)
    state = still.generator.get_state()
    together = attack(updates, malicious, still)[malicious]
    assert torch.equal(still.generator.get_state(), state), "nothing is drawn without jitter"
    assert (together == together[0]).all()
    noise = (attack(updates, malicious, parted)[malicious] - together).double() / updates[~malicious].double().std(0)
    assert torch.pdist(noise).min() > 0.3 * math.sqrt(20_000), "no two are alike"
    # four standard errors of 4 * 20,000 draws: of the mean 4 * 0.3 / sqrt(80,000), of the deviation 1 / sqrt(2) of it
    assert abs(noise.mean().item()) < 0.0043
    assert abs(noise.std().item() - 0.3) < 0.003
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 4 / math.sqrt(20_000)


def test_what_is_drawn_after_the_jitter_does_not_depend_on_its_size() -> None:
    after = []
    for num_malicious, num_params in ((4, 300), (6, 7)):
        one = threat("ipm", jitter=0.1)
        attack(torch.randn(20, num_params), torch.arange(20) < num_malicious, one)
        after.append(torch.rand(3, generator=one.generator))
    assert torch.equal(*after)


@pytest.mark.parametrize("name", ["min-max", "min-sum"])
@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_equal_updates_leave_no_room(name: str, direction: str, malicious: Tensor) -> None:
    ones = torch.ones(20, 5, dtype=torch.float64)
    assert_same_in_float64(attack(ones, malicious, threat(name, direction=direction)), ones)


def test_the_krum_attack_is_finite_where_all_updates_are_equal(malicious: Tensor) -> None:
    assert attack(torch.ones(20, 5), malicious, threat("krum")).isfinite().all()


# z of the attack on 50 clients, 12 of them malicious: 14 supporters are needed of 38, so that Phi(z) = 24 / 38
Z = NormalDist().inv_cdf(24 / 38)


@pytest.mark.parametrize(
    ("num_clients", "num_malicious", "z"), [(50, 12, Z), (100, 20, NormalDist().inv_cdf(49 / 80)), (10, 6, 3.0)]
)
def test_a_little_is_enough_goes_z_standard_deviations(num_clients: int, num_malicious: int, z: float) -> None:
    updates = torch.randn(num_clients, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    malicious = torch.arange(num_clients) < num_malicious
    honest = updates[~malicious]
    sent = attack(updates, malicious, threat("lie"))[malicious]
    steps = (honest.mean(0) - sent) / honest.std(0)
    assert_same_in_float64(steps, torch.full_like(steps, z))


def test_the_backdoor_of_a_little_is_enough_stays_in_the_band() -> None:
    """The first 12 of 50 clients attack, as above. A value outside the band becomes its nearest end; others stay."""
    updates = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    malicious = torch.arange(50) < 12
    honest, own = updates[~malicious], updates[malicious]
    steps = (attack(updates, malicious, threat("lie-backdoor"))[malicious] - honest.mean(0)) / honest.std(0)
    own_steps = (own - honest.mean(0)) / honest.std(0)
    outside = own_steps.abs() > Z
    assert 0.5 < outside.double().mean() < 0.9
    assert_same_in_float64(steps[outside], Z * own_steps[outside].sign())
    assert_same_in_float64(steps[~outside], own_steps[~outside])


def test_a_single_backdoored_client_has_no_band_at_all(updates: Tensor) -> None:
    """Of 20 clients, 1 malicious, s = 10 supporters are needed of 19: Phi(z) = 9 / 19, and z is below 0."""
    malicious = torch.arange(20) == 3
    sent = attack(updates, malicious, threat("lie-backdoor"))
    assert_same_in_float64(sent[3], updates[~malicious].mean(0))


# Fine-grained attacks


@pytest.mark.parametrize("base", base_names())
def test_layers_poisons_the_named_layers_only(base: str, updates: Tensor, malicious: Tensor) -> None:
    """A module's name stands for its parameters, and not for another one's that begins alike."""
    whole = attack(updates, malicious, threat(base))
    for names, columns in ((("conv1",), slice(0, 110)), (("conv1.bias", "conv10"), slice(100, 300))):
        sent = attack(updates, malicious, threat("layers", layers=names, base=base))
        want = updates.clone()
        want[:, columns] = whole[:, columns]
        assert torch.equal(sent, want)


def test_unknown_layers_are_named(updates: Tensor, malicious: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"attack\.layers must name .*, got 'conv'; the model has conv1\.weight, conv1\.bias, conv10"
    ):
        attack(updates, malicious, threat("layers", layers=("conv1", "conv")))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 1.0])
def test_sparse_poisons_a_share_of_the_parameters(share: float, updates: Tensor, malicious: Tensor) -> None:
    sent = attack(updates, malicious, threat("sparse", params_share=share))
    changed = (sent != updates)[malicious]
    assert (changed == changed[0]).all(), "the same in all malicious clients"
    assert changed[0].sum() == max(1, round(share * 300))
    assert torch.equal(sent[malicious][changed], -updates[malicious][changed])
    other = (attack(updates, malicious, threat("sparse", params_share=share, base="ipm")) != updates)[malicious]
    assert torch.equal(other, changed)


def test_attacks_on_updates_alone_need_no_run(updates: Tensor, malicious: Tensor) -> None:
    sent = skymask_gpu.federation.attacks.attack(updates, malicious, Threat(AttackConfig(name="sign-flip", share=0.2)))
    assert torch.equal(sent[malicious], -updates[malicious])
    with pytest.raises(ValueError, match=r"attack\.name 'label-flip' needs a run's model and data; use build_attack"):
        skymask_gpu.federation.attacks.attack(updates, malicious, threat("label-flip"))


# The configuration


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("min-max", {"direction": "mean"}, r"attack\.direction must be one of std, unit, sign, got 'mean'"),
        ("layers", {"base": "label-flip"}, r"attack\.base must be one of sign-flip, .*, got 'label-flip'"),
        ("sparse", {"base": "layers"}, r"attack\.base must be one of sign-flip, .*, got 'layers'"),
        ("noise", {"std": 0.0}, r"attack\.std must be finite and above 0, got 0\.0"),
        ("ipm", {"epsilon": math.inf}, r"attack\.epsilon must be finite and above 0, got inf"),
        ("lie", {"jitter": -0.1}, r"attack\.jitter must be finite and at least 0 \(0: all send the same\), got -0\.1"),
        ("min-sum", {"jitter": math.nan}, r"attack\.jitter must be finite and at least 0 .*, got nan"),
        ("ipm", {"jitter": math.inf}, r"attack\.jitter must be finite and at least 0 .*, got inf"),
        ("decoys", {"decoys": 1}, r"attack\.decoys must be at least 2, since one client has no copy, got 1"),
        ("replay", {"copies": 0}, r"attack\.copies must be at least 1, got 0; use the base attack itself for none"),
        ("hostage-root", {"hostages": 0.0}, r"attack\.hostages must be above 0 and at most 1, got 0\.0"),
        ("hostage-root", {"params_share": 1.5}, r"attack\.params_share must be above 0 and at most 1, got 1\.5"),
        ("better-than-honest", {"alignment": 0.0}, r"attack\.alignment must be finite and above 0, got 0\.0"),
        ("bridges", {"base": "decoys"}, r"attack\.base must be one of sign-flip, .*, got 'decoys'"),
        ("scaling", {"factor": -1.0}, r"attack\.factor must be finite and at least 0 .*, got -1\.0"),
        ("scaling-backdoor", {"factor": -1.0}, r"attack\.factor must be finite and at least 0 .*, got -1\.0"),
        ("scaling-backdoor", {"target_class": -1}, r"attack\.target_class must be at least 0, got -1"),
        ("lie-backdoor", {"poison_share": 0.0}, r"attack\.poison_share must be above 0 and at most 1, got 0\.0"),
        ("sparse", {"params_share": 1.5}, r"attack\.params_share must be above 0 and at most 1, got 1\.5"),
        ("layers", {"layers": ()}, r"attack\.layers must name at least one parameter or module for attack 'layers', got none"),
    ],
)
def test_mistakes_in_an_attacks_own_settings_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(name, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "copycat"}, r"attack\.name must be one of none, sign-flip, .*, sparse, .*, got 'copycat'"),
        ({"name": "min-mx"}, r"attack\.name .*; did you mean 'min-max'\?"),
        ({"share": 1.0}, r"attack\.share must be from 0 to below 1, got 1\.0"),
        ({"share": -0.1}, r"attack\.share must be from 0 to below 1, got -0\.1"),
        ({"share": math.nan}, r"attack\.share must be from 0 to below 1, got nan"),
        ({"share": 0.0}, r"attack\.share must be above 0 for attack 'lie', got 0\.0"),
        ({"name": "none"}, r"attack\.share must be 0 for attack 'none', got 0\.2"),
        ({"name": "layers"}, r"attack\.layers must name at least one parameter or module for attack 'layers', got none"),
        ({"name": "lie", "settings": BaseAttack()}, r"attack\.name 'lie' has settings of the type Jitter, got BaseAttack"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttackConfig(**{"name": "lie", "share": 0.2, **settings})


def test_the_share_says_how_many_are_malicious() -> None:
    config = AttackConfig(name="lie", share=0.2)
    assert [config.num_malicious(n) for n in (2, 8, 50, 99, 100)] == [1, 2, 10, 20, 20]
    assert AttackConfig().num_malicious(10) == 0
    wanted = (
        r"attack\.share must leave an honest client, got 0\.95 of 10: 10 malicious; use a smaller share or more data\.clients"
    )
    with pytest.raises(ValueError, match=wanted):
        AttackConfig(name="lie", share=0.95).num_malicious(10)
    with pytest.raises(ValueError, match="must leave an honest client"):
        config.num_malicious(1)


def test_which_attacks_poison_data_and_which_have_a_backdoor() -> None:
    attacks = {name: built(name) for name in ATTACKS}
    backdoors = {"lie-backdoor", "scaling-backdoor", "neurotoxin", "lga", "dba", "collapois", "edge-case"}
    assert {name for name, one in attacks.items() if one.poisons_data} == {"label-flip", *backdoors}
    # these train their poisoned models apart from the clients' own training
    assert {name for name, one in attacks.items() if one.target_class == 0} == {"lp", "f3ba", "chameleon", *backdoors}
