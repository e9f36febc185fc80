"""The hook after each local step sees every client's parameters, and local training goes on from what it returns."""

import pytest
import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.clients import LocalTraining, draw_batches, train_clients
from skymask_gpu.federation.models import build_model


def problem(model: str) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if model == "cnn" else (1, 8, 8)
    module, labels = build_model(model, shape, 10, seed=0), torch.arange(60) % 10
    inputs = torch.randn(60, *shape, generator=generator)
    # the last clients have the fewest samples, and with epochs the fewest steps
    parts = [torch.arange(20), torch.arange(20, 44), torch.arange(44, 54), torch.arange(54, 60)]
    return module, inputs, labels, FlatModel(module, inputs[:2], labels[:2]).initial_params, parts


@pytest.mark.parametrize(("model", "batching"), [("mlp", "vmap"), ("mlp", "loop"), ("cnn", "loop")])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_goes_on_from_what_the_hook_returns(model: str, batching: str, momentum: float) -> None:
    """With the columns of a mask put back after each step, they end where they began, and one step at a time does the same."""
    module, inputs, labels, start_P, parts = problem(model)
    recipe = LocalTraining(epochs=1, batch_size=6, momentum=momentum, batching=batching)
    batches = draw_batches(parts, recipe, torch.Generator().manual_seed(1))
    frozen_P = torch.arange(len(start_P)) % 3 == 0
    seen: set[tuple[int, int]] = set()

    def project(params_CP: Tensor, step: int, clients_C: Tensor) -> Tensor:
        assert params_CP.shape == (len(clients_C), len(start_P))
        seen.update((client, step) for client in clients_C.tolist())
        return torch.where(frozen_P, start_P, params_CP)

    poisoned = torch.tensor([False, True, False, True])
    arguments = (module, start_P, inputs, labels, batches, recipe)
    sent = train_clients(*arguments, poisoned=poisoned, after_step=project).updates
    assert seen == {(client, step) for client, steps in enumerate(batches.steps_C.tolist()) for step in range(steps)}
    assert (sent[:, frozen_P] == 0).all()
    plain = train_clients(*arguments, poisoned=poisoned).updates
    assert (plain[:, frozen_P] != 0).any()
    # the last client takes one step only, so that what the hook left alone is as without it
    torch.testing.assert_close(sent[3, ~frozen_P], plain[3, ~frozen_P], rtol=0, atol=0)
    assert not torch.equal(sent[0, ~frozen_P], plain[0, ~frozen_P])


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_a_hook_that_returns_none_changes_nothing(batching: str) -> None:
    module, inputs, labels, start_P, parts = problem("mlp")
    recipe = LocalTraining(steps=3, batch_size=6, batching=batching)
    batches = draw_batches(parts, recipe, torch.Generator().manual_seed(1))
    arguments = (module, start_P, inputs, labels, batches, recipe)
    hooked = train_clients(*arguments, after_step=lambda params, step, clients: None).updates
    assert torch.equal(hooked, train_clients(*arguments).updates)
