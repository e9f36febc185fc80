"""Local training equals a loop over clients; attacks have their defining properties."""

import pytest
import torch
from torch.nn import functional as F

from skymask_gpu.federation import local_training
from skymask_gpu.federation.attacks import ATTACKS, attack
from skymask_gpu.federation.data import load_dataset
from skymask_gpu.federation.local_training import LocalTraining, draw_batches, train_clients
from skymask_gpu.federation.models import build_model


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_all_clients_at_once_equal_a_loop(model: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 8, 8) if model == "mlp" else (1, 28, 28)
    inputs, labels = torch.randn(60, *shape, generator=generator), torch.arange(60) % 10
    module = build_model(model, shape, 10, seed=0)
    parts = [torch.arange(7), torch.arange(7, 40), torch.arange(40, 60)]
    recipe = LocalTraining(steps=4, batch_size=6, lr=0.5, grad_clip=0.02)
    batches = draw_batches(parts, recipe, generator)
    assert all(torch.isin(batches[i], part).all() for i, part in enumerate(parts))
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    monkeypatch.setattr(local_training, "_BLOCK_VALUES", {"cpu": 2 * 6 * inputs[0].numel()})  # blocks of two, then one
    updates_CP = train_clients(module, start, inputs, labels, batches, recipe)
    for client in range(3):
        twin = build_model(model, shape, 10, seed=0)
        optimiser = torch.optim.SGD(twin.parameters(), lr=0.5)
        for step in range(4):
            index = batches[client, step]
            optimiser.zero_grad()
            F.cross_entropy(twin(inputs[index]), labels[index]).backward()
            torch.nn.utils.clip_grad_value_(twin.parameters(), 0.02)
            optimiser.step()
        want = torch.nn.utils.parameters_to_vector(twin.parameters()).detach() - start
        torch.testing.assert_close(updates_CP[client], want, atol=2e-6, rtol=1e-4)


def test_the_papers_cnn_has_its_size_and_models_are_seeded() -> None:
    cnn = build_model("cnn", (1, 28, 28), 10, seed=3)
    assert sum(p.numel() for p in cnn.parameters()) == 139_960
    again = build_model("cnn", (1, 28, 28), 10, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(cnn.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model\.name 'cnn' is for 28x28 images"):
        build_model("cnn", (1, 8, 8), 10, seed=0)
    with pytest.raises(ValueError, match=r"model\.name must be one of"):
        build_model("vit", (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("field", ["steps", "batch_size", "lr", "grad_clip"])
def test_bad_recipes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"local\.{field} must"):
        LocalTraining(**{field: 0})


@pytest.fixture
def updates(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(20, 300, generator=generator) * 0.1 + 0.05


@pytest.fixture
def malicious() -> torch.Tensor:
    return torch.arange(20) % 5 == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_leave_honest_rows_and_the_input_alone(name: str, updates: torch.Tensor, malicious: torch.Tensor) -> None:
    before = updates.clone()
    sent = attack(name, updates, malicious)
    assert torch.equal(updates, before)
    assert torch.equal(sent[~malicious], before[~malicious])
    assert torch.equal(attack(name, updates, torch.zeros(20, dtype=torch.bool)), before)


def test_sign_flip_negates(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    assert torch.equal(attack("sign-flip", updates, malicious)[malicious], -updates[malicious])
    assert torch.equal(attack("none", updates, malicious), updates)


def test_min_max_is_as_far_out_as_honest_updates_allow(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    """The defining property: the largest distance to an honest update equals the largest among honest updates."""
    honest = updates[~malicious].double()
    sent = attack("min-max", updates, malicious)[malicious].double()
    assert (sent == sent[0]).all()
    widest = torch.pdist(honest).max()
    assert torch.cdist(sent[:1], honest).max().item() == pytest.approx(widest.item(), rel=1e-5)
    # along minus the standard deviation
    direction = (sent[0] - honest.mean(0)) / -honest.std(0)
    assert direction.min() > 0
    assert direction.std() / direction.mean() < 1e-4


def test_min_max_on_equal_updates_sends_their_mean(malicious: torch.Tensor) -> None:
    updates = torch.ones(20, 5)
    assert torch.equal(attack("min-max", updates, malicious), updates)


def test_min_sum_is_as_far_out_in_sum_as_honest_updates_are(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    """The defining property: the sum of squared distances to honest updates equals the largest among honest updates."""
    honest = updates[~malicious].double()
    sent = attack("min-sum", updates, malicious)[malicious].double()
    assert (sent == sent[0]).all()
    sums = torch.cdist(honest, honest).square().sum(1)
    assert (sent[0] - honest).square().sum().item() == pytest.approx(sums.max().item(), rel=1e-5)
    direction = (sent[0] - honest.mean(0)) / -honest.std(0)
    assert direction.min() > 0
    assert direction.std() / direction.mean() < 1e-4


@pytest.mark.parametrize(("num_clients", "num_malicious", "z"), [(50, 12, 0.3360), (100, 20, 0.2858), (10, 6, 3.0)])
def test_a_little_is_enough_goes_z_standard_deviations(num_clients: int, num_malicious: int, z: float) -> None:
    """By hand: of 50 clients, 12 malicious, s = 14 supporters are needed of 38: Phi(z) = 24 / 38 gives z = 0.336."""
    updates = torch.randn(num_clients, 200, generator=torch.Generator().manual_seed(0))
    malicious = torch.arange(num_clients) < num_malicious
    honest = updates[~malicious].double()
    sent = attack("lie", updates, malicious)[malicious].double()
    steps = (honest.mean(0) - sent) / honest.std(0)
    torch.testing.assert_close(steps, torch.full_like(steps, z), atol=2e-4, rtol=0)


def test_trim_lies_beyond_the_honest_extreme_against_the_mean(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    updates = updates + 0.2 * updates[0].sign()  # some parameters have one sign in all clients
    honest, sent = updates[~malicious], attack("trim", updates, malicious)[malicious]
    lowest, highest, rises = honest.min(0).values, honest.max(0).values, honest.mean(0) > 0
    assert (sent <= lowest)[:, rises].all()
    assert (sent >= highest)[:, ~rises].all()
    extreme = torch.where(rises, lowest, highest)
    ratio = sent / extreme
    assert (ratio >= 0.5).all()
    assert (ratio <= 2).all()
    assert ratio.std() > 0.1, "drawn, not all alike"
    assert torch.equal(sent, attack("trim", updates, malicious)[malicious])


def test_scaled_updates_replace_the_mean(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    """The defining property: with honest updates of zero the mean of all is that of the malicious clients."""
    updates = updates * malicious[:, None]
    torch.testing.assert_close(attack("scaling", updates, malicious).mean(0), updates[malicious].mean(0))


def test_unknown_attacks_are_named(updates: torch.Tensor, malicious: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"attack\.name must be one of none, lie, min-max, .*, trim, got 'mimic'"):
        attack("mimic", updates, malicious)


def test_digits_batches_are_the_same_for_the_same_seed() -> None:
    labels = load_dataset("digits").train_labels
    parts = [torch.arange(10), torch.arange(10, len(labels))]
    draws = [draw_batches(parts, LocalTraining(), torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
