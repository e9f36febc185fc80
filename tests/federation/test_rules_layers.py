"""MARS, LASA, FLGuardian and FedLAW against loops written from the papers, and what sets each of them apart."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.federation.rules import (
    RULES,
    RoundInfo,
    RuleContext,
    RuleResult,
    build_rule,
    fedlaw,
    mars,
    reference_layers,
)
from skymask_gpu.federation.rules.fedlaw import FedLawSettings
from skymask_gpu.federation.rules.flguardian import FLGuardian, FLGuardianSettings, _most_trusted
from skymask_gpu.federation.rules.mars import Mars, MarsSettings


def digits(part: int, size: int = 60) -> tuple[Tensor, Tensor]:
    """Real samples: handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    samples = slice(part * size, (part + 1) * size)
    return torch.from_numpy(loaded.images[samples] / 16)[:, None], torch.from_numpy(loaded.target[samples])


def conv_module() -> nn.Module:
    """Convolutions with more and with fewer inputs than their window has places, batch norm, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 21, 1),
        nn.ReLU(),
        nn.Conv2d(21, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def linear_module() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10, bias=False))


MODULES = {"conv": conv_module, "linear": linear_module}
SEEDS = pytest.mark.parametrize("seed", range(2))
OF_BOTH_MODULES = pytest.mark.parametrize("model", MODULES)
UPDATES = pytest.mark.parametrize("kind", ["random", "real"])


@cache
def context(model: str) -> RuleContext:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MODULES[model]().double()
    inputs, labels = digits(0)
    return RuleContext(
        module=module, root_inputs=inputs, root_labels=labels, num_clients=20, root_training=RootTraining(steps=3), seed=0
    )


@cache
def root_loss(model: str) -> FlatModel:
    made = context(model)
    return FlatModel(made.module, made.root_inputs, made.root_labels)


def gradient(loss: FlatModel, params: Tensor) -> Tensor:
    params = params.clone().requires_grad_()
    return torch.autograd.grad(loss(params), params)[0]


@cache
def real_updates(model: str) -> Tensor:
    """16 clients that took three steps of gradient descent on digits of their own."""
    made, rows = context(model), []
    for client in range(16):
        loss = FlatModel(made.module, *digits(client + 1))
        params = loss.initial_params
        for _ in range(3):
            params = params - 0.5 * gradient(loss, params)
        rows.append(params - loss.initial_params)
    return torch.stack(rows)


def random_updates(model: str, seed: int) -> Tensor:
    """Rows of unlike lengths and directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(16, root_loss(model).num_params, generator=generator, dtype=torch.float64) + 0.2
    return 0.1 * rows * torch.randn(16, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()


def updates_of(kind: str, model: str, seed: int) -> Tensor:
    """Some in which the first four clients have poisoned one layer."""
    updates = random_updates(model, seed) if kind == "random" else real_updates(model).clone()
    layers = list(columns_of(root_loss(model).shapes).values())
    updates[:4, layers[2 * seed % len(layers)]] *= -3
    return updates


def info_of(updates: Tensor, model: str, num_malicious: int = 0) -> RoundInfo:
    params, generator = root_loss(model).initial_params, torch.Generator().manual_seed(2)
    return RoundInfo(params, updates[-1].clone(), torch.arange(len(updates)), num_malicious, generator)


def apply(name: str, updates: Tensor, model: str, num_malicious: int = 0, **settings: Any) -> RuleResult:
    own = RULES.settings_of(name)(**settings)
    result = build_rule(name, context(model), own)(updates, info_of(updates, model, num_malicious))
    assert result.kept is not None
    return result


def assert_same(got: Tensor, want: np.ndarray | list[float]) -> None:
    """Both in float64, to 1e-9 of the largest value."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))


# --- MARS -------------------------------------------------------------------------------------------------------------


@SEEDS
@UPDATES
@OF_BOTH_MODULES
@pytest.mark.parametrize("energy_share", [0.05, 0.4])
def test_mars_is_the_loop(kind: str, model: str, seed: int, energy_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(kind, model, seed)
    info = info_of(updates, model)
    shapes = root_loss(model).shapes
    want = [reference_layers.concentrated_energy(row, shapes, energy_share) for row in (updates + info.global_params).numpy()]
    rule = Mars(context(model), MarsSettings(energy_share=energy_share))
    assert_same(rule._energies(updates, info.global_params), np.array(want))
    monkeypatch.setattr(mars, "_BLOCK_ELEMENTS", 100)
    assert_same(rule._energies(updates, info.global_params), np.array(want))
    verdicts = []
    for bound in (1e-9, 0.03, 0.1, 10.0):
        result = apply("mars", updates, model, energy_share=energy_share, cluster_distance=bound)
        kept = reference_layers.mars_kept(want, bound)
        assert result.kept.tolist() == kept
        assert_same(result.update, updates.numpy()[kept].mean(0))
        verdicts.append(sum(kept))
    assert verdicts[0] < verdicts[-1] == 16


def test_the_distance_of_mars_is_that_of_the_papers_example() -> None:
    lists = torch.tensor([[1, 2, 3, 4, 5], [5, 5, 3, 2, 2], [1, 1, 1, 1, 1]], dtype=torch.float64)
    want = [[0.0, 0.4, 2.0], [0.4, 0.0, 2.4], [2.0, 2.4, 0.0]]
    assert_same(mars._wasserstein(lists, lists), np.array(want))


def inflated(updates: Tensor, clients: list[int], factor: float) -> Tensor:
    """These clients' models have a first convolution in which one channel, each another, is larger."""
    updates, start = updates.clone(), root_loss("conv").initial_params
    for client in clients:
        channel = slice(9 * (client % 6), 9 * (client % 6 + 1))
        updates[client, channel] = (factor - 1) * start[channel] + factor * updates[client, channel]
    return updates


def test_mars_keeps_everyone_without_an_attack_and_rejects_inflated_channels() -> None:
    honest = real_updates("conv")
    assert apply("mars", honest, "conv").kept.all()
    few = [0, 1, 2]
    for clients in (few, [client for client in range(16) if client not in few]):
        result = apply("mars", inflated(honest, clients, 4), "conv")
        assert result.kept.tolist() == [client not in clients for client in range(16)], "a majority of attackers is no matter"
    assert apply("mars", inflated(honest, few, 1.02), "conv").kept.all(), "this little is no difference"


def test_mars_needs_neurons() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(10))

    with pytest.raises(ValueError, match=r"'mars' needs a model with a weight.*, got shift \(10,\) as its parameters; use"):
        build_rule("mars", dataclasses.replace(context("linear"), module=Shift()))


# --- LASA -------------------------------------------------------------------------------------------------------------


@SEEDS
@UPDATES
@OF_BOTH_MODULES
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_lasa_is_the_loop(kind: str, model: str, seed: int, sparsity: float) -> None:
    updates = updates_of(kind, model, seed)
    for bounds in ({"magnitude_bound": 1.0, "purity_bound": 1.0}, {"magnitude_bound": 2.0, "purity_bound": 0.5}):
        want, counting = reference_layers.lasa(updates.numpy(), root_loss(model).shapes, sparsity, **bounds)
        result = apply("lasa", updates, model, sparsity=sparsity, **bounds)
        assert_same(result.update, want)
        assert result.kept.tolist() == [any(counts) for counts in zip(*counting.values(), strict=True)]
        assert result.record["kept_by_layer"] == {name: sum(counts) for name, counts in counting.items()}
        assert min(map(sum, counting.values())) < 16


@pytest.mark.parametrize("poison", ["scaled", "flipped"])
@pytest.mark.parametrize("layer", ["1.weight", "3.weight", "8.bias"])
def test_lasa_drops_a_poisoned_layer_and_keeps_the_others_of_the_client(poison: str, layer: str) -> None:
    shapes = root_loss("conv").shapes
    generator = torch.Generator().manual_seed(0)
    # Two positive values to a negative one, and lengths from 0.9 to 1.1.
    direction = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).repeat(1000)[: root_loss("conv").num_params]
    noise = torch.randn(16, len(direction), generator=generator, dtype=torch.float64)
    updates = (direction + 0.05 * noise) * torch.linspace(0.9, 1.1, 16, dtype=torch.float64)[:, None]
    columns = columns_of(shapes)[layer]
    updates[8, columns] *= 1.4 if poison == "scaled" else -1
    _, counting = reference_layers.lasa(updates.numpy(), shapes, 0.0, 2.0, 2.0)
    assert {name: counts[8] for name, counts in counting.items()} == {name: name != layer for name in shapes}
    result = apply("lasa", updates, "conv", sparsity=0.0, magnitude_bound=2.0, purity_bound=2.0)
    assert result.kept[8]
    others = updates[[client for client in range(16) if client != 8]]
    cosine = torch.nn.functional.cosine_similarity(result.update[columns], others[:, columns].mean(0), dim=0)
    assert cosine > 0.99


def test_lasa_zeroes_the_smallest_values() -> None:
    row = real_updates("conv")[:1]
    result = apply("lasa", row, "conv", sparsity=0.3)
    assert result.kept.all(), "there is nobody to compare with"
    order = row[0].abs().argsort()
    num_zeros = int(0.3 * len(order))
    assert not result.update[order[:num_zeros]].any()
    assert torch.equal(result.update[order[num_zeros:]], row[0][order[num_zeros:]])


# --- FLGuardian -------------------------------------------------------------------------------------------------------


@SEEDS
@UPDATES
@OF_BOTH_MODULES
@pytest.mark.parametrize("depth_weight", [2.0, 0.5])
def test_flguardian_is_the_loop(kind: str, model: str, seed: int, depth_weight: float) -> None:
    updates = updates_of(kind, model, seed)
    want = reference_layers.flguardian_trust(updates.numpy(), root_loss(model).shapes, depth_weight)
    rule = FLGuardian(context(model), FLGuardianSettings(depth_weight=depth_weight))
    assert_same(rule._trust(updates), want)
    assert len(set(want)) > 1
    for num_malicious in (0, 2, 4, 8, 16):
        result = apply("flguardian", updates, model, num_malicious, depth_weight=depth_weight)
        kept = reference_layers.most_trusted(want, max(1, 16 - num_malicious))
        assert result.kept.tolist() == kept
        assert_same(result.update, updates.numpy()[kept].mean(0))


@pytest.mark.parametrize("poison", [-1.0, 4.0])
@pytest.mark.parametrize("layer", ["0.weight", "3.weight", "8.weight"])
def test_a_client_loses_the_trust_of_the_layer_that_it_poisons(poison: float, layer: str) -> None:
    """The five modules weigh 1, 2, 4, 8 and 16 of 31, so that 31 times the trust has a bit for each."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(root_loss("conv").num_params, generator=generator, dtype=torch.float64)
    updates = common + 0.1 * torch.randn(16, len(common), generator=generator, dtype=torch.float64)
    updates[5, columns_of(root_loss("conv").shapes)[layer]] *= poison
    trust = 31 * FLGuardian(context("conv"), FLGuardianSettings())._trust(updates)
    weight = {"0.weight": 1, "3.weight": 4, "8.weight": 16}[layer]
    assert [bool(bits & weight) for bits in trust.round().long().tolist()] == [client != 5 for client in range(16)]
    if layer == "8.weight":
        # All others together weigh less than the last layer.
        assert apply("flguardian", updates, "conv", 1).kept.tolist() == [client != 5 for client in range(16)]


def test_clients_who_tie_for_the_last_places_are_not_kept_unless_they_are_the_best() -> None:
    trust = torch.tensor([1.0, 0.2, 0.5, 1.0, 0.5, 0.0], dtype=torch.float64)
    kept = {num: _most_trusted(trust, num).nonzero().flatten().tolist() for num in range(1, 7)}
    assert kept == {1: [0, 3], 2: [0, 3], 3: [0, 3], 4: [0, 2, 3, 4], 5: [0, 1, 2, 3, 4], 6: [0, 1, 2, 3, 4, 5]}


# --- FedLAW -----------------------------------------------------------------------------------------------------------


def gradient_after(model: str) -> Callable[[np.ndarray], np.ndarray]:
    loss = root_loss(model)
    return lambda update: gradient(loss, loss.initial_params + torch.from_numpy(update)).numpy()


@SEEDS
@UPDATES
@OF_BOTH_MODULES
@pytest.mark.parametrize("settings", [FedLawSettings(), FedLawSettings(weight_steps=3, weight_lr=2.0, cap=3.0)], ids=str)
def test_fedlaw_is_the_loop(kind: str, model: str, seed: int, settings: FedLawSettings) -> None:
    updates = updates_of(kind, model, seed)
    weights, want = reference_layers.fedlaw_weights(
        updates.numpy(), gradient_after(model), 12, settings.cap, settings.weight_lr, settings.weight_steps
    )
    result = apply("fedlaw", updates, model, 4, **dataclasses.asdict(settings))
    assert_same(result.update, want)
    assert result.kept.tolist() == [weight > 0 for weight in weights]
    assert len({round(weight, 9) for weight in weights}) > 2, "they are learnt"


@SEEDS
@pytest.mark.parametrize(("most", "cap"), [(12, 1.1), (12, 1.0), (5, 3.0), (16, 4.0), (1, 1.0)])
def test_weights_are_projected_on_the_sparse_capped_simplex(seed: int, most: int, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-6, 0.1, 1e6):
        values = scale * torch.randn(16, generator=generator, dtype=torch.float64)
        weights = fedlaw._projected(values, most, cap)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
        assert weights.min() >= 0
        assert weights.max() <= cap / most + 1e-12
        assert (weights > 0).sum() <= most
        largest = values.argsort(descending=True)[:most]
        assert_same(weights[largest], reference_layers.capped_simplex(values[largest].tolist(), cap / most))
        # No other point of the simplex is nearer: from there, each direction leads away.
        for _ in range(50):
            other = torch.zeros_like(values)
            chosen = torch.randperm(16, generator=generator)[:most]
            other[chosen] = torch.tensor(
                reference_layers.capped_simplex(torch.rand(most, generator=generator).tolist(), cap / most), dtype=torch.float64
            )
            assert (values - weights).norm() <= (values - other).norm() * (1 + 1e-12)


def test_fedlaw_gives_attackers_no_weight_and_lowers_the_loss() -> None:
    loss = root_loss("conv")
    params = loss.initial_params
    updates = real_updates("conv").clone()
    updates[:5] *= -torch.tensor([1, 2, 5, 100, 1e6], dtype=torch.float64)[:, None]
    result = apply("fedlaw", updates, "conv", 5)
    assert result.kept.tolist() == [False] * 5 + [True] * 11
    assert loss(params + result.update) < loss(params) < loss(params + updates.mean(0))


def test_fedlaw_stays_without_a_gradient() -> None:
    updates = torch.full((4, root_loss("conv").num_params), 1e100, dtype=torch.float64)
    result = apply("fedlaw", updates, "conv", 1)
    assert not result.kept.any()
    assert not result.update.any()


# --- what they refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mars", "lasa", "flguardian"])
def test_a_model_that_is_not_the_clients_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"defence.rule '{name}' .* trainable parameters, got none; give the clients' model"):
        build_rule(name, dataclasses.replace(context("conv"), module=nn.Module()))
    rule = build_rule(name, context("conv"))
    updates = real_updates("linear")
    with pytest.raises(ValueError, match=rf"'{name}' needs updates of the model's 729 .*, got 1500 per client; give the"):
        rule(updates, info_of(updates, "linear"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mars", {"energy_share": 0.0}, r"defence\.energy_share must be above 0 and at most 1, got 0\.0"),
        ("mars", {"cluster_distance": 0.0}, r"defence\.cluster_distance must be finite and above 0, got 0\.0"),
        ("lasa", {"sparsity": 1.0}, r"defence\.sparsity must be at least 0 and below 1, got 1\.0"),
        ("lasa", {"magnitude_bound": float("nan")}, r"defence\.magnitude_bound must be finite and above 0, got nan"),
        ("lasa", {"purity_bound": -1.0}, r"defence\.purity_bound must be finite and above 0, got -1\.0"),
        ("flguardian", {"depth_weight": 0.0}, r"defence\.depth_weight must be finite and above 0, got 0\.0"),
        ("fedlaw", {"weight_steps": 0}, r"defence\.weight_steps must be at least 1, got 0"),
        ("fedlaw", {"weight_lr": float("inf")}, r"defence\.weight_lr must be finite and above 0, got inf"),
        ("fedlaw", {"cap": 0.9}, r"defence\.cap must be finite and at least 1, the equal weight itself, got 0\.9"),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES.settings_of(name)(**settings)
