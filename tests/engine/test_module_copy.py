"""Copies of modules that keep what autograd made, as the old weight norm does."""

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from skymask_gpu.engine import FlatModel

Wrap = Callable[[nn.Module], nn.Module]


def net(wrap: Wrap) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PyTorch says that the old functions are old.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 3)))


def root_data() -> tuple[Tensor, Tensor]:
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def loss_and_gradient(flat: FlatModel, scales_P: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of masked parameters, and its gradient with respect to the mask."""
    scales_P = scales_P.clone().requires_grad_()
    loss = flat(flat.initial_params * scales_P)
    return loss.detach(), torch.autograd.grad(loss, scales_P)[0]


@pytest.mark.parametrize("called", [False, True])
def test_masks_reach_what_the_old_weight_norm_computes_its_weight_from(called: bool) -> None:
    old, new = net(nn.utils.weight_norm), net(parametrizations.weight_norm)
    inputs, labels = root_data()
    if called:
        old(inputs)
    kept = old[0].weight
    flat, wanted = FlatModel(old, inputs, labels), FlatModel(new, inputs, labels)
    assert list(flat.shapes) == [f"{layer}.{name}" for layer in "02" for name in ("bias", "weight_g", "weight_v")]
    for seed in range(2):
        scales_P = torch.rand(flat.num_params, generator=torch.Generator().manual_seed(seed))
        loss, gradient_P = loss_and_gradient(flat, scales_P)
        wanted_loss, wanted_P = loss_and_gradient(wanted, scales_P)
        torch.testing.assert_close(loss, wanted_loss)
        torch.testing.assert_close(gradient_P, wanted_P)
        for start, name in zip(torch.tensor([0, *flat.layer_sizes]).cumsum(0), flat.shapes, strict=False):
            assert gradient_P[start : start + flat.shapes[name].numel()].abs().sum() > 0
    assert old[0].weight is kept, "the user's module is not modified"


def test_masks_reach_what_the_old_spectral_norm_computes_its_weight_from() -> None:
    """The gradient is that of the user's module itself."""
    module = net(nn.utils.spectral_norm)
    inputs, labels = root_data()
    module(inputs)
    module.eval()
    flat = FlatModel(module, inputs, labels)
    loss, gradient_P = loss_and_gradient(flat, torch.ones(flat.num_params))
    own = nn.functional.cross_entropy(module(inputs), labels)
    own_P = nn.utils.parameters_to_vector(torch.autograd.grad(own, list(module.parameters())))
    torch.testing.assert_close(loss, own.detach())
    torch.testing.assert_close(gradient_P, own_P * flat.initial_params)


def test_results_that_a_module_keeps_do_not_hinder_its_copy() -> None:
    module, plain = net(lambda layer: layer), net(lambda layer: layer)
    inputs, labels = root_data()
    module.cache = module(inputs)
    module[0].seen = [{"last": (module(inputs), 3)}]
    flat, wanted = FlatModel(module, inputs, labels), FlatModel(plain, inputs, labels)
    ones_P = torch.ones(flat.num_params)
    for mine, theirs in zip(loss_and_gradient(flat, ones_P), loss_and_gradient(wanted, ones_P), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert module.cache.grad_fn is not None


def test_a_result_that_cannot_be_copied_is_named() -> None:
    class Kept:
        def __init__(self, result: Tensor) -> None:
            self.result = result

    module = net(lambda layer: layer)
    inputs, labels = root_data()
    module[2].kept = Kept(module(inputs))
    with pytest.raises(ValueError, match=r"module: its attribute 2\.kept must be .*detach it.*parametrizations.*weight_norm"):
        FlatModel(module, inputs, labels)
    # What fails otherwise is said by copy itself, as it was.
    module[2].kept = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        FlatModel(module, inputs, labels)
