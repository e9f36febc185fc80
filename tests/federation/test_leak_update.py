"""An audit of what clients send after several steps on batches, instead of one image's gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.leak.attacking import attacked, batches, first_trials
from skymask_gpu.federation.leak.config import Audit, LeakConfig
from skymask_gpu.federation.leak.judging import lines, lookalikes
from skymask_gpu.federation.leak.recording import check_settings
from skymask_gpu.federation.leak.tables import leak_text
from skymask_gpu.federation.leak.victims import Victims

LEAK = LeakConfig(victims=3, side=12, evaluations=60, attackers=("naive",), observe="update")
RECIPE = LocalTraining(steps=2, batch_size=4, lr=0.05, grad_clip=float("inf"))
AUDIT = Audit(leak=LEAK, local=RECIPE)


def test_victims_send_how_far_training_moved_them_as_a_mean_gradient() -> None:
    victims = Victims.build(AUDIT)
    assert victims.images.shape == (3, 8, 1, 12, 12)
    assert len(victims.samples.unique()) == 3 * 8, "no image has two owners"
    start_P = parameters_to_vector(victims.module.parameters()).detach()
    for images, labels, sent_P in zip(victims.images, victims.labels, victims.gradients, strict=True):
        torch.nn.utils.vector_to_parameters(start_P.clone(), victims.module.parameters())
        optimizer = torch.optim.SGD(victims.module.parameters(), lr=0.05)
        for step in range(2):
            batch = slice(4 * step, 4 * step + 4)
            optimizer.zero_grad()
            F.cross_entropy(victims.module(images[batch]), labels[batch]).backward()
            optimizer.step()
        moved_P = parameters_to_vector(victims.module.parameters()).detach() - start_P
        torch.testing.assert_close(sent_P, moved_P / (-0.05 * 2), rtol=1e-4, atol=1e-5)


def test_one_step_on_one_image_is_its_gradient_and_gives_it_away() -> None:
    one = replace(AUDIT, local=replace(RECIPE, steps=1, batch_size=1), leak=replace(LEAK, evaluations=200))
    victims, plain = Victims.build(one), Victims.build(replace(one, leak=replace(one.leak, observe="gradient")))
    torch.testing.assert_close(victims.gradients, plain.gradients, rtol=1e-3, atol=1e-4)
    assert torch.equal(victims.images, plain.images)
    (batch,) = batches(one, victims, first_trials(one))
    (line,) = lines(attacked(one, victims, batch))
    assert (line.leaked, line.identified) == (1, 1)


def test_a_reconstruction_is_compared_with_the_image_that_is_most_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each victim's sixth image, darker, is found as such; the wrong image is another victim's most similar one."""
    victims = Victims.build(AUDIT)
    (batch,) = batches(AUDIT, victims, first_trials(AUDIT))
    found = (0.5 * victims.images[:, 5] + 0.2).flatten(1)
    monkeypatch.setattr("skymask_gpu.federation.leak.attacking._best", lambda *_: replace_images(found))
    (record,) = attacked(AUDIT, victims, batch)
    for victim, row in enumerate(record["victims"]):
        assert row["sample"] == int(victims.samples[victim, 5])
        assert row["label"] == int(victims.labels[victim, 5])
        assert row["identified"]
        assert row["ssim"] > 0.99 > row["ssim_wrong"]
    assert lookalikes(victims) == []
    text = leak_text("update", AUDIT, victims, lines([record]))
    assert "what a client sends after 2 steps on batches of 4" in text
    assert "that one of the client's 8 images which correlates most" in text


def replace_images(images: torch.Tensor) -> object:
    from skymask_gpu.federation.leak.attacking import _Found

    return _Found(images, [0.0] * len(images), [1] * len(images), ["target"] * len(images))


def test_the_recipe_belongs_to_the_settings_of_an_audit_of_updates_only(tmp_path: Path) -> None:
    assert AUDIT.settings()["local"]["steps"] == 2
    assert "local" not in replace(AUDIT, leak=replace(LEAK, observe="gradient")).settings()
    (tmp_path / "victims.jsonl").write_text("")
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match=r"made with other settings \(.*local"):
        check_settings(AUDIT, tmp_path)


def test_more_images_than_there_are_are_refused() -> None:
    many = replace(AUDIT, leak=replace(LEAK, victims=200))
    with pytest.raises(ValueError, match=r"leak.victims must be at most 179, since each trains on 8 of the 1437 training"):
        Victims.build(many)
