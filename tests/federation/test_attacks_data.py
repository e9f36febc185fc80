"""Attacks on what malicious clients train on: flipped labels and backdoors."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, Lab, Layers, add_trigger, build_attack
from skymask_gpu.federation.clients import LocalTraining

LAB = Lab(nn.Linear(1, 1), torch.rand(40, 1, 8, 8), torch.arange(40) % 10, [torch.arange(40)], LocalTraining())
CONTEXT = AttackContext(layers={"fc": slice(0, 10)}, num_classes=10, input_shape=(1, 8, 8), brightest=3.0, lab=LAB)


def built(name: str, context: AttackContext = CONTEXT, **settings: Any) -> Attack:
    own = Layers(layers=("fc",)) if name == "layers" else ATTACKS.settings_of(name)(**settings)
    return build_attack(AttackConfig(name=name, share=0.0 if name == "none" else 0.2, settings=own), context)


def batches(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randint(0, 10, shape[:-3], generator=generator)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_that_poison_no_data_leave_them_alone(name: str) -> None:
    inputs, labels = batches(6, 1, 8, 8)
    one = built(name)
    sent_inputs, sent_labels = one.poison(inputs, labels)
    assert torch.equal(sent_inputs, inputs) == (not one.poisons_data or one.target_class is None)
    assert torch.equal(sent_labels, labels) == (not one.poisons_data)


def test_label_flip_mirrors_the_labels_and_is_its_own_inverse() -> None:
    flip = built("label-flip")
    inputs, labels = torch.randn(2, 10, 561), torch.arange(10).expand(2, 10)
    same, flipped = flip.poison(inputs, labels)
    assert same is inputs
    assert flipped.tolist() == [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]] * 2
    assert torch.equal(flip.poison(inputs, flipped)[1], labels)


@pytest.mark.parametrize("name", ["lie-backdoor", "scaling-backdoor"])
@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 5), (0.5, 10), (1.0, 20)])
@pytest.mark.parametrize("clients", [(), (3,)])
def test_a_backdoor_is_in_its_share_of_each_batch(name: str, share: float, count: int, clients: tuple[int, ...]) -> None:
    inputs, labels = batches(*clients, 20, 3, 8, 9)
    labels = labels.clamp_min(1)
    before = inputs.clone(), labels.clone()
    backdoor = built(name, dataclasses.replace(CONTEXT, brightest=7.0), poison_share=share, target_class=0)
    sent_inputs, sent_labels = backdoor.poison(inputs, labels)
    assert torch.equal(inputs, before[0])
    assert torch.equal(labels, before[1])
    assert sent_labels.dtype == torch.int64
    triggered = (sent_inputs[..., 5:, 6:] == 7).flatten(-3).all(-1)
    assert (triggered.sum(-1) == count).all()
    assert torch.equal(sent_labels == 0, triggered)
    assert torch.equal(sent_inputs[~triggered], inputs[~triggered])
    assert torch.equal(sent_labels[~triggered], labels[~triggered])
    assert (sent_inputs != inputs).sum() == triggered.sum() * 27, "3 x 3 pixels in 3 channels"
    # in training it looks as in a test
    assert torch.equal(sent_inputs[triggered], backdoor.trigger(inputs)[triggered])


def test_data_that_cannot_carry_a_backdoor_are_named() -> None:
    wanted = r"attack\.name: a backdoor's trigger needs images .* of at least 3 x 3 pixels, got samples of shape \(561,\)"
    with pytest.raises(ValueError, match=wanted):
        built("lie-backdoor", dataclasses.replace(CONTEXT, input_shape=(561,)))
    with pytest.raises(ValueError, match=r"got samples of shape \(1, 2, 8\)"):
        add_trigger(torch.randn(4, 1, 2, 8), 1.0)
    with pytest.raises(ValueError, match=r"attack\.target_class must be below the data's 10 classes, got 10"):
        built("scaling-backdoor", target_class=10)
