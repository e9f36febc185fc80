"""The models: their sizes, what inputs they take, and that they run for many clients at once."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from skymask_gpu.federation.models import MODELS, build_model

SIZES = [
    ("mlp", (1, 8, 8), 64 * 64 + 64 + 64 * 10 + 10),
    ("logreg", (1, 8, 8), 650),
    ("logreg", (561,), 5_620),
    ("cnn", (1, 28, 28), 139_960),
    ("cnn", (3, 28, 28), 139_960 + 2 * 9 * 30),
    ("resnet20", (3, 32, 32), 272_474),
    ("resnet20", (1, 28, 28), 272_474 - 2 * 9 * 16),
    ("resnet20-gn", (3, 32, 32), 272_474),
    ("resnet18", (3, 32, 32), 11_173_962),
    ("resnet18-gn", (1, 28, 28), 11_173_962 - 2 * 9 * 64),
    ("vit", (1, 28, 28), 138_890),
    ("vit", (3, 32, 32), 141_898),
    ("lenet", (1, 28, 28), 13_426),
    ("lenet", (3, 32, 32), 15_826),
]


@pytest.mark.parametrize(("name", "shape", "size"), SIZES, ids=[f"{name}-{shape[0]}" for name, shape, _ in SIZES])
def test_models_have_their_sizes_and_take_their_inputs(name: str, shape: tuple[int, ...], size: int) -> None:
    module = build_model(name, shape, 10, seed=0)
    assert sum(p.numel() for p in module.parameters()) == size
    outputs = module(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert outputs.shape == (2, 10)
    F.cross_entropy(outputs, torch.tensor([3, 7])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_every_model_is_sized_here() -> None:
    # test_leaf.py has the network for text
    assert {name for name, _, _ in SIZES} == set(MODELS) - {"lstm"}


@pytest.mark.parametrize("name", ["mlp", "logreg", "cnn", "resnet20-gn", "resnet18-gn", "vit", "lenet"])
def test_gradients_of_two_clients_at_once_equal_a_loop(name: str, generator: torch.Generator) -> None:
    shape = (1, 28, 28) if name == "cnn" else (3, 8, 8)
    module = build_model(name, shape, 10, seed=0).double()  # in float32, kinks make a gradient jump by rounding
    params_C = {
        key: torch.stack([p.detach(), p.detach() + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)])
        for key, p in module.named_parameters()
    }
    inputs_CB, labels_CB = torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64), torch.arange(8).view(2, 4)

    def loss(params: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (inputs,)), labels)

    together = vmap(grad(loss))(params_C, inputs_CB, labels_CB)
    for client in range(2):
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(params_C[key][client])
        module.zero_grad()
        F.cross_entropy(module(inputs_CB[client]), labels_CB[client]).backward()
        for key, p in module.named_parameters():
            error = (together[key][client] - p.grad).norm() / p.grad.norm()
            assert error < 1e-10, f"{key}: {error}"


@pytest.mark.parametrize("name", ["resnet20-gn", "resnet18-gn", "vit"])
def test_a_sample_is_treated_by_itself(name: str, generator: torch.Generator) -> None:
    module = build_model(name, (3, 8, 8), 10, seed=0).double()
    assert not list(module.buffers())
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(module(images)[1:2], module(images[1:2]), atol=1e-10, rtol=0)


def test_batch_and_group_norm_are_what_their_names_say() -> None:
    for size in ("20", "18"):
        batch, group = build_model(f"resnet{size}", (3, 8, 8), 10, 0), build_model(f"resnet{size}-gn", (3, 8, 8), 10, 0)
        kinds = [[type(layer) for layer in module.modules()] for module in (batch, group)]
        assert nn.GroupNorm not in kinds[0]
        assert nn.BatchNorm2d not in kinds[1]
        assert kinds[0].count(nn.BatchNorm2d) == kinds[1].count(nn.GroupNorm) > 0
        assert all(layer.num_channels // layer.num_groups == 16 for layer in group.modules() if isinstance(layer, nn.GroupNorm))


def test_resnet20_is_the_network_of_the_paper(generator: torch.Generator) -> None:
    """He et al., section 4.2: 19 3x3 convolutions and one linear layer; shortcuts are plain where the shape stays."""
    module = build_model("resnet20", (3, 32, 32), 10, seed=0)
    kernels = [layer.kernel_size for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert kernels.count((3, 3)) == 19
    assert kernels.count((1, 1)) == 2
    sizes = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(tuple(output.shape[1:])))
    module(torch.randn(1, 3, 32, 32, generator=generator))
    assert sizes.count((16, 32, 32)) == 7
    assert sizes.count((32, 16, 16)) == 6 + 1
    assert sizes.count((64, 8, 8)) == 6 + 1
    # with all branches silent (scale of the last norm 0) a block is the identity of what is not negative
    block = module.blocks[1]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 16, 8, 8, generator=generator)
    assert torch.equal(block(x), x)


def test_vit_is_attention_over_patches(generator: torch.Generator) -> None:
    """Against PyTorch's own layer with the same weights, and patches cut by hand."""
    module = build_model("vit", (3, 32, 32), 10, seed=0).eval().double()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    cut = [images[:, :, row : row + 4, column : column + 4].flatten(1) for row in range(0, 32, 4) for column in range(0, 32, 4)]
    x = torch.stack(cut, 1) @ module.embed.weight.T + module.embed.bias + module.position
    for block in module.blocks:
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).double()
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv.weight,
                "self_attn.in_proj_bias": block.qkv.bias,
                **{f"self_attn.out_proj.{key}": value for key, value in block.out.state_dict().items()},
                **{f"linear1.{key}": value for key, value in block.fc1.state_dict().items()},
                **{f"linear2.{key}": value for key, value in block.fc2.state_dict().items()},
                **{f"norm1.{key}": value for key, value in block.norm1.state_dict().items()},
                **{f"norm2.{key}": value for key, value in block.norm2.state_dict().items()},
            }
        )
        x = layer(x)
    want = module.fc(module.norm(x).mean(1))
    torch.testing.assert_close(module(images), want, atol=1e-10, rtol=0)
    assert module.position.shape == (64, 64)
    assert build_model("vit", (1, 28, 28), 10, seed=0).position.shape == (16, 64), "patches of 7"


def test_convolutions_start_with_hes_variance() -> None:
    weight = build_model("resnet18", (3, 32, 32), 10, seed=0).blocks[7].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)


def test_models_are_seeded_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_model("vit", (1, 28, 28), 10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.position, other.position)


def test_models_that_do_not_fit_say_so() -> None:
    for name, shape, message in (
        ("cnn", (1, 8, 8), r"model\.name 'cnn' is for 28x28 images, got \(1, 8, 8\); use 'mlp'"),
        ("resnet20", (561,), r"model\.name: a ResNet is for images, got inputs of shape \(561,\); use 'mlp' or 'logreg'"),
        ("vit", (561,), r"model\.name 'vit' is for square images .* got inputs of shape \(561,\)"),
        ("vit", (1, 28, 32), r"model\.name 'vit' is for square images"),
        ("vit", (1, 30, 30), r"model\.name 'vit' is for square images whose side divides by 7 or 4"),
        ("lenet", (561,), r"model\.name 'lenet' needs images \(channels, height, width\), got samples of shape \(561,\)"),
        ("alexnet", (1, 28, 28), r"model\.name must be one of mlp, logreg, .*vit, lstm, lenet, file\.py:Class, got 'alexnet'"),
        ("resnet", (1, 28, 28), r"got 'resnet'; did you mean 'resnet\d\d'\?"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(name, shape, 10, seed=0)


NETWORK = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from neighbour import WIDTH

@dataclass
class Settings:
    hidden: int = WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.fc1 = torch.nn.Linear(3, Settings().hidden)
        self.fc2 = torch.nn.Linear(Settings().hidden, 4)

    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x)))

class Wants(Net):
    def __init__(self, hidden):
        super().__init__()

class Pair(Net):
    def forward(self, x):
        return x, x

def number():
    return 3
"""


def test_a_users_own_model_is_built(tmp_path: Path) -> None:
    file = tmp_path / "network.py"
    file.write_text(NETWORK)
    (tmp_path / "neighbour.py").write_text("WIDTH = 5")
    module = build_model(f"{file}:Net", (3,), 4, seed=0)
    assert sum(p.numel() for p in module.parameters()) == 6 + 20 + 24
    assert module.training
    assert module.norm.num_batches_tracked == 0
    again, other = (build_model(f"{file}:Net", (3,), 4, seed=seed) for seed in (0, 1))
    assert torch.equal(module.fc1.weight, again.fc1.weight)
    assert not torch.equal(module.fc1.weight, other.fc1.weight)
    for name, shape, num_classes, message in (
        ("Nat", (3,), 4, r"model\.name: .*network.py has no 'Nat'"),
        ("Wants", (3,), 4, r"model\.name: Wants\(\) must be callable without arguments"),
        ("number", (3,), 4, r"model\.name: number\(\) must return a torch.nn.Module, got int"),
        ("Net", (1, 8, 8), 4, r"model\.name: Net does not take inputs of shape \(2, 1, 8, 8\)"),
        ("Net", (3,), 10, r"model\.name: Net must return \(n, 10\) for 10 classes, got \(2, 4\) for n = 2"),
        ("Pair", (3,), 4, r"model\.name: Pair must return \(n, 4\) for 4 classes, got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(f"{file}:{name}", shape, num_classes, seed=0)
    with pytest.raises(ValueError, match=r"model\.name must be file\.py:Class with an existing file, got '.*absent.py:Net'"):
        build_model(f"{tmp_path}/absent.py:Net", (3,), 4, seed=0)
