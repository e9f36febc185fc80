"""FlatModel: order, batch norm, and that the user's module is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.flat_model import fast_layout


def net_with_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def root_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=generator), torch.arange(20) % 3


def test_flatten_follows_named_parameters_and_round_trips() -> None:
    module = net_with_norm()
    flat = FlatModel(module, *root_data())
    names = [name for name, _ in module.named_parameters()]
    assert list(flat.shapes) == names
    assert flat.num_params == sum(p.numel() for p in module.parameters()) == sum(flat.layer_sizes)
    assert torch.equal(flat.flatten(flat.unflatten(flat.initial_params)), flat.initial_params)
    assert torch.equal(flat.initial_params, nn.utils.parameters_to_vector(module.parameters()))


def test_frozen_parameters_are_not_part_of_the_vector() -> None:
    module = net_with_norm()
    module[0].weight.requires_grad_(False)
    flat = FlatModel(module, *root_data())
    assert "0.weight" not in flat.shapes
    assert torch.isfinite(flat(flat.initial_params))


def test_batch_buffers_use_the_root_batch_and_no_dropout() -> None:
    module = net_with_norm()
    inputs, labels = root_data()
    loss = FlatModel(module, inputs, labels)(nn.utils.parameters_to_vector(module.parameters()))
    hidden = module[0](inputs)
    normal = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + module[1].eps).sqrt()
    want = F.cross_entropy(module[4](F.relu(normal * module[1].weight + module[1].bias)), labels)
    torch.testing.assert_close(loss, want)


def test_fixed_buffers_use_mean_0_and_variance_1() -> None:
    module = net_with_norm()
    module[1].running_mean.fill_(3.0)
    inputs, labels = root_data()
    flat = FlatModel(module, inputs, labels, buffers="fixed")
    normal = module[0](inputs) / (1 + module[1].eps) ** 0.5
    want = F.cross_entropy(module[4](F.relu(normal * module[1].weight + module[1].bias)), labels)
    torch.testing.assert_close(flat(flat.initial_params), want)


def test_instance_norm_with_running_statistics_works_in_both_modes() -> None:
    module = nn.Sequential(nn.Conv1d(1, 4, 2), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten())
    inputs = torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(0))
    for buffers in ("batch", "fixed"):
        flat = FlatModel(module, inputs, torch.arange(6), buffers=buffers)
        assert torch.isfinite(flat(flat.initial_params))


def test_root_data_are_cast_or_refused_by_name() -> None:
    module, (inputs, labels) = net_with_norm(), root_data()
    want = FlatModel(module, inputs, labels)
    for cast in (FlatModel(module, inputs.double(), labels), FlatModel(module, inputs, labels.int())):
        assert torch.equal(cast(cast.initial_params), want(want.initial_params))
    for bad_inputs, bad_labels in ((inputs[:, :3], labels), (inputs, labels + 1), (inputs.numpy(), labels.numpy())):
        with pytest.raises(ValueError, match="root_inputs and root_labels"):
            FlatModel(module, bad_inputs, bad_labels)


def test_the_module_is_never_modified() -> None:
    module = net_with_norm().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flat = FlatModel(module, *root_data(), buffers="fixed")
    flat(flat.initial_params)
    flat.to(torch.float64)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_to_casts_inputs_and_parameters_but_not_class_labels() -> None:
    flat = FlatModel(net_with_norm(), *root_data()).to(torch.float64)
    assert flat.initial_params.dtype == torch.float64
    assert flat(flat.initial_params).dtype == torch.float64


def test_a_part_is_the_loss_on_those_samples() -> None:
    module, (inputs, labels) = net_with_norm(), root_data()
    flat, samples = FlatModel(module, inputs, labels), torch.tensor([7, 3, 12, 5])
    part, want = flat.part(samples), FlatModel(module, inputs[samples], labels[samples])
    assert (flat.num_samples, part.num_samples) == (20, 4)
    assert torch.equal(part(flat.initial_params), want(want.initial_params))


def test_bad_arguments_are_named() -> None:
    module, (inputs, labels) = net_with_norm(), root_data()
    with pytest.raises(ValueError, match=r"root_inputs and root_labels .* got 0 and 0"):
        FlatModel(module, inputs[:0], labels[:0])
    with pytest.raises(ValueError, match="got 20 and 19"):
        FlatModel(module, inputs, labels[:19])
    with pytest.raises(ValueError, match="buffers must be"):
        FlatModel(module, inputs, labels, buffers="running")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="requires_grad"):
        FlatModel(nn.ReLU(), inputs, labels)
    flat = FlatModel(module, inputs, labels)
    with pytest.raises(ValueError, match=r"missing 0\.bias"):
        flat.flatten({"0.weight": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match=r"0\.weight must have shape \(6, 4\), got \(4, 6\)"):
        flat.flatten({**flat.unflatten(flat.initial_params), "0.weight": torch.zeros(4, 6)})


def test_images_have_channels_last_on_a_cpu_and_the_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    seen: list[bool] = []

    class Net(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return super().forward(images)

    module = Net(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double()
    images, labels = torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.arange(7) % 3
    loss = FlatModel(module, images, labels)
    params = loss.initial_params.clone().requires_grad_()
    value = loss(params)
    assert seen[-1]
    (grad,) = torch.autograd.grad(value, params)
    want = nn.functional.cross_entropy(nn.Sequential.forward(module, images), labels)
    want_grad = torch.cat([g.flatten() for g in torch.autograd.grad(want, list(module.parameters()))])
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad)


def test_weights_begin_at_multiples_of_16_bytes_on_a_gpu() -> None:
    """Whatever is not a CPU: the meta device has places in memory, but no values."""
    vector_P = torch.empty(100, device="meta")
    for shape, first, moved in [
        ((5, 5), 4, False),
        ((5, 5), 5, True),
        ((1, 1, 5, 5), 7, True),
        ((1, 1, 5, 5), 8, False),
        ((25,), 5, False),
    ]:
        part = vector_P[first : first + 25].view(shape)
        fast = fast_layout(part)
        assert fast.storage_offset() == (0 if moved else first)
        assert fast.shape == part.shape
    assert fast_layout(torch.empty(100, dtype=torch.float64, device="meta")[2:6].view(2, 2)).storage_offset() == 2
    # on a CPU a copy would cost time and save none
    assert fast_layout(torch.empty(100)[5:30].view(5, 5)).storage_offset() == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_any_floating_dtype_has_the_loss_of_its_float32_copy(dtype: torch.dtype) -> None:
    rounded = net_with_norm().to(dtype)
    before = {name: value.clone() for name, value in rounded.state_dict().items()}
    flat = FlatModel(rounded, *root_data())
    want = FlatModel(copy.deepcopy(rounded).float(), *root_data())
    assert flat.initial_params.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(flat(flat.initial_params).float(), want(want.initial_params))
    for name, value in rounded.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_a_module_of_several_dtypes_computes_in_float32() -> None:
    module = net_with_norm()
    module[0].half()
    module[1].bfloat16()
    module[4].double()
    module[4].bias.requires_grad_(False)
    flat = FlatModel(module, *root_data())
    assert flat.initial_params.dtype == torch.float32
    want = FlatModel(copy.deepcopy(module).float(), *root_data())
    torch.testing.assert_close(flat(flat.initial_params), want(want.initial_params))


def test_what_was_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        module, (inputs, labels) = net_with_norm(), root_data()
        module[0].weight.requires_grad_(False)
        inside = FlatModel(module, inputs, labels)
    for flat in (FlatModel(module, inputs, labels), inside):
        params = flat.initial_params.clone().requires_grad_()
        (grad,) = torch.autograd.grad(flat(params), params)
        assert grad.abs().sum() > 0


def test_what_is_no_module_or_no_loss_is_named() -> None:
    inputs, labels = root_data()
    with pytest.raises(ValueError, match=r"module must be a torch\.nn\.Module, got ReLU itself"):
        FlatModel(nn.ReLU, inputs, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss_fn must be a function .* got a str"):
        FlatModel(net_with_norm(), inputs, labels, loss_fn="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="module must have real parameters"):
        FlatModel(nn.Linear(4, 3, dtype=torch.complex64), inputs, labels)
    with pytest.raises(ValueError, match="the same number of samples, at least 1, got 20 and 0"):
        FlatModel(net_with_norm(), inputs, torch.tensor(1))
