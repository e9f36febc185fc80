"""The pill: its chain of neurons against all chains, and the poison's scale against plain loops in float64, to 1e-6."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, BaseAttack, Lab, Threat, build_attack
from skymask_gpu.federation.attacks.pill import Limits, pill_of, strongest_path
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.models import build_model

MALICIOUS = torch.arange(12) < 3
# Two convolutions, two linear layers; the first one sees 2 x 2 places per channel.
NETWORK = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 2, bias=False), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))


def columns(module: nn.Module) -> dict[str, slice]:
    return columns_of({name: value.shape for name, value in module.named_parameters()})


NUM_PARAMS = sum(value.numel() for value in NETWORK.parameters())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(module: nn.Module = NETWORK, with_lab: bool = True, **settings: Any) -> Attack:
    inputs, parts = torch.zeros(24, 2, 4, 4), list(torch.arange(24).split(8))
    lab = Lab(module, inputs, torch.arange(24) % 3, parts, LocalTraining()) if with_lab else None
    context = AttackContext(layers=columns(module), num_classes=3, input_shape=(2, 4, 4), brightest=1.0, lab=lab)
    own = ATTACKS.settings_of("pill")(**settings)
    return build_attack(AttackConfig(name="pill", share=0.25, settings=own), context)


def threat(params: Tensor | None) -> Threat:
    config = AttackConfig(name="sign-flip", share=0.25)
    return Threat(config, torch.Generator().manual_seed(5), torch.arange(12), params)


@pytest.mark.parametrize("widths", [(4, 3, 5, 2), (3, 2), (6, 4, 3), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_the_path_is_the_strongest_of_all(widths: tuple[int, ...], seed: int) -> None:
    before = (1, *widths)
    strengths = [draw(seed + 10 * place, width, before[place]).abs() for place, width in enumerate(widths)]
    paths = {}
    for path in itertools.product(*(range(width) for width in widths[:-1])):
        total = float(strengths[0][path[0], 0])
        for place in range(1, len(path)):
            total += float(strengths[place][path[place], path[place - 1]])
        paths[path] = total + sum(float(strengths[-1][last, path[-1]]) for last in range(widths[-1]))
    assert tuple(strongest_path(strengths)) == max(paths, key=paths.__getitem__)


def chains(params: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """The parameters of each chain of neurons in NETWORK, written out layer by layer."""
    first, first_bias = params[:24].reshape(3, 2, 2, 2), slice(24, 27)
    assert first.size + 3 == first_bias.stop
    found = {}
    for a, b, c in itertools.product(range(3), range(4), range(5)):
        mask = np.zeros(NUM_PARAMS, dtype=bool)
        for place in range(8):
            mask[8 * a + place] = True
        mask[24 + a] = True
        for place in range(4):
            mask[27 + 12 * b + 4 * a + place] = True
        for place in range(4):
            mask[75 + 16 * c + 4 * b + place] = True
        mask[155 + c] = True
        for output in range(3):
            mask[160 + 5 * output + c] = True
            mask[175 + output] = True
        found[a, b, c] = mask
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_pill_is_the_chain_with_the_largest_weights(seed: int) -> None:
    params = draw(seed, NUM_PARAMS)
    assert NUM_PARAMS == 178
    biases = np.isin(np.arange(NUM_PARAMS), [*range(24, 27), *range(155, 160), *range(175, 178)])
    all_chains = chains(params.numpy())
    strength = {key: float(np.abs(params.numpy())[mask & ~biases].sum()) for key, mask in all_chains.items()}
    want = all_chains[max(strength, key=strength.__getitem__)]
    assert np.array_equal(pill_of(params, columns(NETWORK), NETWORK).numpy(), want)
    assert want.sum() == 9 + 4 + 5 + 6


@pytest.mark.parametrize(
    ("model", "shape", "size"),
    [
        # one output of ten with its weights
        ("logreg", (1, 8, 8), 65),
        # 64 inputs and a bias, ten outputs and their biases
        ("mlp", (1, 8, 8), 65 + 20),
        # filters of 3 x 3, one of each pair of channels; 25 places of a channel
        ("cnn", (1, 28, 28), 10 + 10 + 26 + 20),
    ],
)
def test_the_pill_is_slim(model: str, shape: tuple[int, ...], size: int) -> None:
    module = build_model(model, shape, 10, seed=0)
    params = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert int(pill_of(params, columns(module), module).sum()) == size


@pytest.mark.parametrize("model", ["resnet20-gn", "vit"])
def test_shortcuts_and_attention_have_a_pill_too(model: str) -> None:
    module = build_model(model, (1, 28, 28), 10, seed=0)
    params = nn.utils.parameters_to_vector(module.parameters()).detach()
    pill = pill_of(params, columns(module), module)
    assert 0 < pill.double().mean() < 0.02
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert pill[columns(module)[f"{name}.weight"]].any(), name


def test_a_model_without_such_layers_is_named() -> None:
    with pytest.raises(ValueError, match=r"attack\.name 'pill' needs a linear or convolutional layer that is trained"):
        pill_of(torch.zeros(4), {"weight": slice(0, 4)}, nn.LayerNorm(4, bias=False))


def limits(honest: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The honest mean, the largest distance of an honest row from the mean of the others, and the smallest cosine with it."""
    distances, cosines = [], []
    for own, row in enumerate(honest):
        rest = np.mean([other for number, other in enumerate(honest) if number != own], axis=0)
        distances.append(float(np.linalg.norm(row - rest)))
        cosines.append(float(row @ rest) / float(np.linalg.norm(row) * np.linalg.norm(rest)))
    return honest.mean(0), max(distances), min(cosines)


def furthest(start: np.ndarray, step: np.ndarray, honest: np.ndarray, most: float) -> float:
    """The largest multiple of a step from a start, by halving an interval, with both limits written out."""
    mean, reach, cosine = limits(honest)

    def within(multiple: float) -> bool:
        row = start + multiple * step
        near = float(np.sqrt(sum((row - mean) ** 2))) <= reach
        return near and float(row @ mean) >= cosine * float(np.linalg.norm(row) * np.linalg.norm(mean))

    if within(most):
        return most
    low, high = 0.0, most
    while high - low > 1e-13 * most:
        low, high = ((low + high) / 2, high) if within((low + high) / 2) else (low, (low + high) / 2)
    return low


# How strong the clients' common direction is; the three attackers' own updates are then within both limits, beyond the
# distances, or turned away.
@pytest.mark.parametrize(("common", "own"), [(0.05, 1.0), (0.3, 2.0), (1.0, -1.0)])
@pytest.mark.parametrize("base", ["sign-flip", "ipm", "min-max"])
def test_the_row_goes_as_far_as_honest_updates(common: float, own: float, base: str) -> None:
    updates = 0.1 * draw(1, 12, NUM_PARAMS) + common * draw(2, NUM_PARAMS)
    updates[MALICIOUS] *= own
    params = draw(0, NUM_PARAMS)
    attack = built(base=BaseAttack(name=base))
    sent = attack.send(updates, MALICIOUS, threat(params)).numpy()
    honest = updates[~MALICIOUS].numpy()
    mean, reach, _ = limits(honest)
    nothing = AttackContext(layers={}, num_classes=3, input_shape=(), brightest=1.0)
    plain = build_attack(AttackConfig(name=base, share=0.25), nothing)
    poison = plain.send(updates, MALICIOUS, threat(params)).numpy()
    pill = pill_of(params, columns(NETWORK), NETWORK).numpy()
    for client in range(3):
        update = updates[client].numpy()
        share = furthest(mean, update - mean, honest, 1.0)
        carrier = mean + share * (update - mean)
        change = np.where(pill, poison[client] - update, 0.0)
        scale = furthest(carrier, change, honest, 1e4)
        want = carrier + scale * change
        np.testing.assert_allclose(sent[client], want, rtol=0, atol=1e-6 * np.abs(want).max())
        assert (share == 1.0) == (own == 1.0)
        assert scale > 0 or share < 1
        assert np.linalg.norm(sent[client] - mean) <= reach * (1 + 1e-9)


@pytest.mark.parametrize("stops", ["cosine", "distance"])
def test_both_limits_stop_a_poison(stops: str) -> None:
    """What turns a row away from the honest mean meets the cosine first, and what makes it longer meets the distance."""
    honest = 0.1 * draw(1, 9, NUM_PARAMS) + 0.3 * draw(2, NUM_PARAMS)
    mean, reach, cosine = limits(honest.numpy())
    along, across = torch.from_numpy(mean), draw(3, NUM_PARAMS)
    row = Limits(honest).injected(along, 0.1 * along if stops == "distance" else 0.3 * across - along).numpy()
    far, turned = np.linalg.norm(row - mean) / reach, row @ mean / np.linalg.norm(row) / np.linalg.norm(mean)
    assert far <= 1 + 1e-9
    assert turned >= cosine - 1e-9
    assert (far > 1 - 1e-9) == (stops == "distance")
    assert (turned < cosine + 1e-9) == (stops == "cosine")


def test_few_honest_clients_and_no_run() -> None:
    updates = draw(0, 4, NUM_PARAMS)
    one = torch.tensor([True, True, True, False])
    assert torch.equal(built().send(updates, one, threat(draw(1, NUM_PARAMS))), updates[:3])
    for attack, params in ((built(with_lab=False), draw(1, NUM_PARAMS)), (built(), None)):
        with pytest.raises(ValueError, match=r"attack\.name 'pill' poisons neurons .* which only a run has"):
            attack.send(updates, one, threat(params))
    alike = torch.ones(4, NUM_PARAMS, dtype=torch.float64)
    sent = built().send(alike, torch.tensor([True, False, False, False]), threat(draw(1, NUM_PARAMS)))
    torch.testing.assert_close(sent, alike[:1], rtol=0, atol=1e-12)
