"""F3BA, Chameleon and edge-case samples, against plain loops in float64, to 1e-6, and in a short run."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, Lab, Threat, build_attack
from skymask_gpu.federation.attacks.chameleon import contrast
from skymask_gpu.federation.attacks.focused_flip import wanted_signs
from skymask_gpu.federation.clients import LocalTraining, draw_batches
from skymask_gpu.federation.config import DataConfig, DefenceConfig, RunConfig
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.simulation import Federation

NUM_CLIENTS, NUM_CLASSES = 6, 5
MALICIOUS = torch.arange(NUM_CLIENTS) < 2
# 8 x 8 images become two channels of 6 x 6, then four neurons.
NETWORK = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, NUM_CLASSES))
LAYERS = columns_of({name: value.shape for name, value in NETWORK.named_parameters()})
NUM_PARAMS = sum(value.numel() for value in NETWORK.parameters())
STILL = LocalTraining(steps=1, batch_size=4, lr=1e-300)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_lab(recipe: LocalTraining = STILL) -> Lab:
    inputs = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    module = NETWORK.double()
    return Lab(module, inputs, torch.arange(60) % NUM_CLASSES, list(torch.arange(60).split(10))[:2], recipe)


def built(name: str, lab: Lab | None, **settings: Any) -> Attack:
    context = AttackContext(layers=LAYERS, num_classes=NUM_CLASSES, input_shape=(1, 8, 8), brightest=2.0, lab=lab)
    return build_attack(AttackConfig(name=name, share=0.25, settings=ATTACKS.settings_of(name)(**settings)), context)


def threat(params: Tensor, previous: Tensor | None = None) -> Threat:
    config = AttackConfig(name="sign-flip", share=0.25)
    return Threat(config, torch.Generator().manual_seed(5), torch.arange(NUM_CLIENTS), params, previous)


def assert_close(got: Tensor, want: np.ndarray | Tensor) -> None:
    want = torch.as_tensor(np.asarray(want), dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * max(1.0, float(want.abs().max())))


# --- F3BA ---


def entering(params: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    """What enters the three layers of NETWORK for one image of 8 x 8, by loops."""
    filters, bias = params[:18].reshape(2, 3, 3), params[18:20]
    maps = np.zeros((2, 6, 6))
    for channel in range(2):
        for row in range(6):
            for column in range(6):
                total = bias[channel]
                for i in range(3):
                    for j in range(3):
                        total += filters[channel, i, j] * image[row + i, column + j]
                maps[channel, row, column] = max(total, 0.0)
    weight, bias = params[20:308].reshape(4, 72), params[308:312]
    hidden = [max(bias[n] + sum(weight[n, k] * maps.reshape(-1)[k] for k in range(72)), 0.0) for n in range(4)]
    return [image, maps.reshape(-1), np.array(hidden)]


def flipped_by_loops(params: np.ndarray, previous: np.ndarray, images: np.ndarray, share: float, target: int) -> np.ndarray:
    """F3BA's flips with a trigger of 3 x 3 pixels of brightness 2 in the lower right corner."""
    triggered = images.copy()
    triggered[:, 5:, 5:] = 2.0
    movement, flipped = (params - previous) * params, params.copy()
    for layer, (begin, shape) in enumerate(((0, (2, 9)), (20, (4, 72)), (312, (NUM_CLASSES, 4)))):
        pairs = zip(images, triggered, strict=True)
        change = np.mean([entering(flipped, dark)[layer] - entering(flipped, clean)[layer] for clean, dark in pairs], axis=0)
        # The trigger has the size of the filters: no averaging is needed.
        change = change[5:, 5:].reshape(-1) if layer == 0 else change
        wanted = {}
        for row in range(shape[0]):
            for column in range(shape[1]):
                if abs(change[column]) > 1e-3 * max(abs(change)) and (layer < 2 or row == target):
                    wanted[begin + row * shape[1] + column] = 1.0 if change[column] > 0 else -1.0
        order = sorted(wanted, key=lambda place: movement[place])
        for place in order[: max(1, round(share * len(wanted)))]:
            flipped[place] = wanted[place] * abs(params[place])
    return flipped


@pytest.mark.parametrize(("share", "target"), [(0.01, 0), (0.3, 3), (1.0, 0)])
def test_f3ba_flips_the_least_important_weights_towards_the_trigger(share: float, target: int) -> None:
    """With a learning rate of nearly 0, what is sent is the flips alone."""
    params, previous, lab = draw(0, NUM_PARAMS), draw(1, NUM_PARAMS), make_lab()
    attack = built("f3ba", lab, flip_share=share, target_class=target, trigger_steps=0)
    sent = attack.send(torch.zeros(NUM_CLIENTS, NUM_PARAMS).double(), MALICIOUS, threat(params, previous))
    images = lab.inputs[:20, 0].numpy()
    want = flipped_by_loops(params.numpy(), previous.numpy(), images, share, target) - params.numpy()
    for part in (want[:18], want[20:308], want[312:332]):
        assert (part != 0).any() or share < 1
    assert (want != 0).any()
    for row in sent:
        assert_close(row, want)
    kept = (sent[0] + params).abs() - params.abs()
    assert float(kept.abs().max()) < 1e-12, "magnitudes stay"
    assert torch.equal(attack.state().get("painted", torch.zeros(0)), torch.zeros(0)), "a fixed trigger is no state"


def test_f3ba_flips_nothing_in_the_first_round() -> None:
    attack = built("f3ba", make_lab(), trigger_steps=0)
    sent = attack.send(torch.zeros(NUM_CLIENTS, NUM_PARAMS).double(), MALICIOUS, threat(draw(0, NUM_PARAMS)))
    assert torch.equal(sent, torch.zeros(2, NUM_PARAMS).double())


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 6)])
def test_the_signs_of_a_filter_are_those_of_the_averaged_change(size: tuple[int, int]) -> None:
    """A change in rows 2 to 5 and columns 1 to 6, averaged to a filter of another size."""
    changes, layer = torch.zeros(3, 2, 8, 8, dtype=torch.float64), nn.Conv2d(2, 4, size)
    changes[:, :, 2:6, 1:7] = draw(0, 3, 2, 4, 6)
    signs = wanted_signs(changes, layer)
    assert signs.shape == layer.weight.shape
    cut = changes.mean(0)[:, 2:6, 1:7].numpy()
    for channel in range(2):
        for i in range(size[0]):
            for j in range(size[1]):
                rows = range(math.floor(i * 4 / size[0]), math.ceil((i + 1) * 4 / size[0]))
                columns = range(math.floor(j * 6 / size[1]), math.ceil((j + 1) * 6 / size[1]))
                mean = np.mean([cut[channel, row, column] for row in rows for column in columns])
                # What changes a thousandth as much as the most counts as unchanged.
                assert (signs[:, channel, i, j] == np.sign(mean)).all() or abs(mean) < 1e-3 * np.abs(cut).max()
    assert torch.equal(wanted_signs(torch.zeros_like(changes), layer), torch.zeros(layer.weight.shape).double())
    linear = wanted_signs(torch.tensor([[1.0, -2.0, 0.0, 1e-4], [1.0, 1.0, 0.0, 1e-4]]), nn.Linear(4, 2))
    assert linear.tolist() == [[1, -1, 0, 0]] * 2


def test_the_triggers_pixels_follow_the_signs_of_the_gradient() -> None:
    """One step from the brightest pixels, against differences of the objective."""
    params, lab = draw(0, NUM_PARAMS), make_lab()
    images = lab.inputs[:20, 0].numpy()
    clean = [entering(params.numpy(), image)[1] for image in images]

    def objective(pixels: np.ndarray) -> float:
        total = 0.0
        for image, before in zip(images, clean, strict=True):
            triggered = image.copy()
            triggered[5:, 5:] = pixels
            total += float(np.sum((entering(params.numpy(), triggered)[1] - before) ** 2))
        return total

    darkest, want = float(lab.inputs.min()), np.full((3, 3), 2.0)
    for place in np.ndindex(3, 3):
        higher, lower = np.full((3, 3), 2.0), np.full((3, 3), 2.0)
        higher[place] += 1e-5
        lower[place] -= 1e-5
        if objective(higher) < objective(lower):
            want[place] -= 0.1 * (2.0 - darkest)
    assert 0 < (want < 2).sum() < 9
    attack = built("f3ba", make_lab(), trigger_steps=1)
    assert float(attack.trigger(lab.inputs[:1])[0, 0, 7, 7]) == 2.0, "until it has attacked, the trigger is the plain one"
    attack.send(torch.zeros(NUM_CLIENTS, NUM_PARAMS).double(), MALICIOUS, threat(params))
    triggered = attack.trigger(lab.inputs)
    for image, before in zip(triggered, lab.inputs, strict=True):
        assert_close(image[0, 5:, 5:], want)
        assert torch.equal(image[0, :5], before[0, :5])
        assert torch.equal(image[0, :, :5], before[0, :, :5])
    # It goes on from there, in a process that was stopped, too, and stays within the range of the data.
    other = built("f3ba", lab, trigger_steps=30)
    other.restore(attack.state())
    assert torch.equal(other.trigger(lab.inputs), triggered)
    other.send(torch.zeros(NUM_CLIENTS, NUM_PARAMS).double(), MALICIOUS, threat(params))
    pixels = other.trigger(lab.inputs)[0, 0, 5:, 5:].numpy()
    assert objective(pixels) > objective(want) > objective(np.full((3, 3), 2.0))
    assert pixels.min() >= darkest
    assert pixels.max() <= 2.0
    other.restore({})
    assert float(other.trigger(lab.inputs[:1])[0, 0, 5:, 5:].min()) == 2.0


# --- Chameleon ---


def contrast_by_loops(features: Tensor, labels: list[int], temperature: float, target: int, weight: float) -> Tensor:
    units = [row / row.square().sum().sqrt() for row in features]
    losses = []
    for own, unit in enumerate(units):
        peers = [other for other in range(len(units)) if other != own and labels[other] == labels[own]]
        total = sum((unit @ units[other] / temperature).exp() for other in range(len(units)) if other != own)
        logs = [((unit @ units[peer] / temperature).exp() / total).log() for peer in peers]
        mean = -sum(logs) / len(logs) if logs else features.sum() * 0
        losses.append((weight if labels[own] == target else 1.0) * mean)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 0, 2], [0, 1, 2, 3, 4, 5, 6], [1] * 7, [3]])
def test_the_contrast_is_the_loop_over_pairs(labels: list[int]) -> None:
    features = draw(0, len(labels), 6).requires_grad_()
    got = contrast(features, torch.tensor(labels), 0.5, 0, 1.7)
    want = contrast_by_loops(features, labels, 0.5, 0, 1.7)
    assert got.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
    if len(set(labels)) < len(labels):
        gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
        assert float(gradients[0].abs().max()) > 0.01


def test_chameleon_trains_the_encoder_by_contrast_and_then_the_last_layer() -> None:
    recipe = LocalTraining(steps=3, batch_size=6, lr=0.5, grad_clip=0.05)
    lab, params = make_lab(recipe), 0.3 * draw(0, NUM_PARAMS)
    # No sample's features are all zero, which have no direction.
    params[308:312] += 1
    attack = built("chameleon", lab, temperature=0.3, target_weight=3.0, target_class=2)
    sent = attack.send(torch.zeros(NUM_CLIENTS, NUM_PARAMS).double(), MALICIOUS, threat(params))
    generator = torch.Generator().manual_seed(5)
    for client in range(2):
        model = copy.deepcopy(NETWORK).double()
        nn.utils.vector_to_parameters(params.clone(), model.parameters())
        for stage, trained in enumerate((model[:5], model[5])):
            batches = draw_batches([lab.parts[client]], recipe, generator)
            optimiser = torch.optim.SGD(trained.parameters(), lr=0.5)
            for index in batches.index_CSB[0]:
                inputs, labels = lab.inputs[index].clone(), lab.labels[index].clone()
                inputs[:3, :, 5:, 5:], labels[:3] = 2.0, 2
                features = model[:5](inputs)
                loss = F.cross_entropy(model[5](features), labels)
                if stage == 0:
                    loss = contrast_by_loops(features, labels.tolist(), 0.3, 2, 3.0)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_value_(trained.parameters(), 0.05)
                optimiser.step()
        want = nn.utils.parameters_to_vector(model.parameters()).detach() - params
        assert float(want[:312].norm()) > 0.05
        assert float(want[312:].norm()) > 0.05
        assert_close(sent[client], want)


def test_chameleon_needs_an_encoder() -> None:
    lab = dataclasses.replace(make_lab(), module=nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double())
    with pytest.raises(ValueError, match=r"attack\.name 'chameleon' needs a layer before the last one; use another model"):
        built("chameleon", lab).send(torch.zeros(NUM_CLIENTS, 325), MALICIOUS, threat(draw(0, 325)))


# --- edge cases ---


def distances_by_loops(inputs: Tensor, mean: np.ndarray) -> list[float]:
    return [sum((float(a) - b) ** 2 for a, b in zip(one.flatten(), mean, strict=True)) for one in inputs]


def test_edge_cases_are_the_samples_furthest_from_their_class_mean() -> None:
    lab = make_lab()
    attack = built("edge-case", lab, source_class=3, target_class=1, tail_share=0.5, poison_share=0.5)
    own = [sample for sample in range(20) if sample % NUM_CLASSES == 3]
    mean = np.mean([lab.inputs[sample].flatten().numpy() for sample in own], axis=0)
    ranked = sorted(own, key=lambda sample: -distances_by_loops(lab.inputs[sample, None], mean)[0])
    rare = ranked[:2]
    inputs, labels = draw(7, 4, 6, 1, 8, 8), torch.arange(24).view(4, 6) % NUM_CLASSES
    clients = torch.tensor([0, 1, 4, 7])
    before = inputs.clone(), labels.clone()
    sent, sent_labels = attack.poison_of(inputs, labels, clients)
    assert torch.equal(inputs, before[0])
    assert torch.equal(labels, before[1])
    for row, client in enumerate(clients.tolist()):
        for place in range(6):
            if place < 3:
                assert torch.equal(sent[row, place], lab.inputs[rare[(3 * client + place) % 2]])
                assert sent_labels[row, place] == 1
            else:
                assert torch.equal(sent[row, place], inputs[row, place])
                assert sent_labels[row, place] == labels[row, place]
    assert torch.equal(attack.poison(inputs[0], labels[0])[0], sent[0])
    held_out, classes = draw(8, 30, 1, 8, 8), torch.arange(30) % NUM_CLASSES
    tested = attack.test_inputs(held_out, classes)
    theirs = [sample for sample in range(30) if sample % NUM_CLASSES == 3]
    ranked = sorted(theirs, key=lambda sample: -distances_by_loops(held_out[sample, None], mean)[0])
    assert torch.equal(tested, held_out[ranked[:3]])
    assert len(attack.test_inputs(held_out, torch.zeros(30))) == 0


def test_edge_cases_that_do_not_fit_are_named() -> None:
    lab = make_lab()
    cases = [
        (lab, {"source_class": 5}, r"attack\.source_class must be below the data's 5 classes, got 5"),
        (lab, {"target_class": 7}, r"attack\.target_class must be below the data's 5 classes, got 7"),
        (dataclasses.replace(lab, inputs=torch.zeros(60, 8).long()), {}, r"'edge-case' needs inputs with distances"),
        (dataclasses.replace(lab, labels=torch.zeros(60).long()), {}, r"that malicious clients have samples of, got 1; choose"),
    ]
    for own, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            built("edge-case", own, **settings)
    with pytest.raises(ValueError, match=r"'edge-case' poisons with the attackers' samples, which only a run has"):
        built("edge-case", None).poison(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("f3ba", {"flip_share": 0.0}, r"attack\.flip_share must be above 0 and at most 1, got 0\.0"),
        ("f3ba", {"trigger_steps": -1}, r"attack\.trigger_steps must be at least 0 \(0: a fixed trigger\), got -1"),
        ("f3ba", {"trigger": "blended"}, r"attack\.trigger_steps must be 0 for attack\.trigger 'blended', .* got 10"),
        ("chameleon", {"temperature": 0.0}, r"attack\.temperature must be finite and above 0, got 0\.0"),
        ("chameleon", {"target_weight": -1.0}, r"attack\.target_weight must be finite and above 0, got -1\.0"),
        ("edge-case", {"source_class": -1}, r"attack\.source_class must be at least 0, got -1"),
        ("edge-case", {"source_class": 0}, r"attack\.source_class must not be attack\.target_class, got 0 for both"),
        ("edge-case", {"tail_share": 0.0}, r"attack\.tail_share must be above 0 and at most 1, got 0\.0"),
        ("edge-case", {"poison_share": 2.0}, r"attack\.poison_share must be above 0 and at most 1, got 2\.0"),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS.settings_of(name)(**settings)


@pytest.mark.parametrize("name", ["f3ba", "chameleon"])
def test_attacks_that_train_need_a_run(name: str) -> None:
    with pytest.raises(ValueError, match=rf"attack\.name '{name}' trains .* which only a run has"):
        built(name, None).send(torch.zeros(NUM_CLIENTS, NUM_PARAMS), MALICIOUS, threat(draw(0, NUM_PARAMS)))


# --- in a run ---


@pytest.mark.parametrize("name", ["f3ba", "chameleon", "edge-case"])
def test_the_backdoor_succeeds_in_an_undefended_run(name: str, tmp_path: Path) -> None:
    """Digits, FedAvg, 4 attackers of 10, who come after some honest rounds; a stop in between changes nothing."""
    config = RunConfig(
        rounds=8,
        data=DataConfig(clients=10, root_samples=20, partition="iid"),
        local=LocalTraining(steps=10, batch_size=32, lr=0.5, grad_clip=1.0),
        attack=AttackConfig(name=name, share=0.4, first_round=4),
        defence=DefenceConfig(rule="fedavg"),
    )
    digits = load_dataset("digits", None)
    whole = list(play(Federation.build(config, digits), tmp_path / "whole"))
    rates = [record["attack_success_rate"] for record in whole]
    # With four seeds, the success was 0 before the attack and at least 0.98 in the end.
    assert rates[3] < 0.3
    assert rates[-1] > 0.6
    assert whole[-1]["accuracy"] > 0.8
    half = dataclasses.replace(config, rounds=6)
    list(play(Federation.build(half, digits), tmp_path / "half"))
    rest = list(play(Federation.build(config, digits), tmp_path / "half"))
    assert [*rest] == whole[6:]


def test_the_success_of_edge_cases_is_counted_on_rare_test_samples() -> None:
    config = RunConfig(
        data=DataConfig(clients=10, root_samples=20),
        attack=AttackConfig(name="edge-case", share=0.4, settings=ATTACKS.settings_of("edge-case")(source_class=3)),
        defence=DefenceConfig(rule="fedavg"),
    )
    federation = Federation.build(config, load_dataset("digits", None))
    data, attackers = federation.dataset, torch.cat(federation.parts[:4])
    own = data.train_inputs[[sample for sample in attackers.tolist() if data.train_labels[sample] == 3]]
    mean = own.flatten(1).double().mean(0).numpy()
    theirs = [sample for sample in range(len(data.test_labels)) if data.test_labels[sample] == 3]
    ranked = sorted(theirs, key=lambda sample: -distances_by_loops(data.test_inputs[sample, None], mean)[0])
    rare = ranked[: round(0.1 * len(theirs))]
    assert len(rare) == 3
    # A fresh model hardly takes any of them for the target class, so that every class is counted.
    model = federation.first_model()
    federation.module.eval()
    guesses = federation.module(data.test_inputs[rare]).argmax(1).tolist()
    for target in range(10):
        federation.attack.target_class = target
        assert federation.attack_success_rate(model) == guesses.count(target) / len(rare)
    empty = dataclasses.replace(federation, dataset=dataclasses.replace(data, test_labels=torch.zeros_like(data.test_labels)))
    with pytest.raises(ValueError, match=r"attack\.name 'edge-case': no test sample is of a class that it attacks"):
        empty.attack_success_rate(model)
