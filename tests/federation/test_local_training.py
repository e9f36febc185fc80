"""Local training of all clients at once equals a plain loop with PyTorch's own optimiser, for every option and both ways."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skymask_gpu.federation.clients import Batches, LocalTraining, batching_for, draw_batches, train_clients
from skymask_gpu.federation.clients.batches import alike_clients
from skymask_gpu.federation.clients.trainer import Trainer
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.models import build_model

RECIPE = LocalTraining(steps=4, batch_size=6, lr=0.5, grad_clip=0.02)


class NormNet(nn.Module):
    """A convolution and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 6 * 6, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(images))).flatten(1))


def make(model: str) -> nn.Module:
    if model == "norm":
        torch.manual_seed(0)
        return NormNet()
    return build_model(model, (1, 28, 28) if model == "cnn" else (1, 8, 8), 10, seed=0)


def samples(model: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, 28, 28) if model == "cnn" else (1, 8, 8)
    return torch.randn(60, *shape, generator=generator), torch.arange(60) % 10


def flat(module: nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def plain_client(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, index_SB: torch.Tensor, recipe: LocalTraining):
    """What a client does, in the words of PyTorch's tutorial."""
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    for index in index_SB:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast == "bfloat16"):
            outputs = module(inputs[index])
        F.cross_entropy(outputs.float() if recipe.autocast == "bfloat16" else outputs, labels[index]).backward()
        torch.nn.utils.clip_grad_value_(module.parameters(), recipe.grad_clip)
        optimiser.step()
    return module


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "lr": 0.1},
    "weight-decay": {"weight_decay": 0.05},
    "no-clip": {"grad_clip": float("inf"), "lr": 0.05},
    "epochs": {"epochs": 2},
    "all": {"epochs": 1, "momentum": 0.5, "weight_decay": 0.01, "lr": 0.1},
}


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", ["mlp", "cnn", "norm"])
def test_all_clients_at_once_equal_a_plain_loop(
    model: str, option: str, batching: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, batching=batching, **OPTIONS[option])
    # in float64: in float32, rounding decides on which side of a ReLU's or a clip's kink a sample lies
    inputs, labels = samples(model, generator)
    inputs, start = inputs.double(), make(model).double()
    parts = [torch.arange(7), torch.arange(7, 40), torch.arange(40, 60)]  # unequal
    batches = draw_batches(parts, recipe, generator)
    # blocks of two clients, then one
    monkeypatch.setattr(Trainer, "block_size", lambda *_: 2)
    trained = train_clients(start, flat(start), inputs, labels, batches, recipe)
    for client in range(3):
        index_SB = batches.index_CSB[client, : batches.steps_C[client]]
        twin = plain_client(make(model).double(), inputs, labels, index_SB, recipe)
        torch.testing.assert_close(trained.updates[client], flat(twin) - flat(start), atol=1e-11, rtol=0)
        for name, value in twin.named_buffers():
            torch.testing.assert_close(trained.buffers[name][client], value, msg=f"{name} of client {client}")


@pytest.mark.parametrize(("model", "batching"), [("mlp", "vmap"), ("mlp", "loop"), ("norm", "loop")])
def test_mixed_precision_is_pytorchs_own(model: str, batching: str, generator: torch.Generator) -> None:
    recipe = dataclasses.replace(RECIPE, batching=batching, autocast="bfloat16", steps=2, grad_clip=1.0, lr=0.1)
    inputs, labels = samples(model, generator)
    batches = draw_batches([torch.arange(30), torch.arange(30, 60)], recipe, generator)
    updates = train_clients(make(model), flat(make(model)), inputs, labels, batches, recipe).updates
    exact = train_clients(
        make(model), flat(make(model)), inputs, labels, batches, dataclasses.replace(recipe, autocast="float32")
    ).updates
    assert updates.dtype == torch.float32
    for client in range(2):
        twin = plain_client(make(model), inputs, labels, batches.index_CSB[client], recipe)
        want = flat(twin) - flat(make(model))
        rounding = (exact[client] - want).norm()
        assert (updates[client] - exact[client]).norm() > rounding / 3, "bfloat16 was used"
        # a batched product rounds elsewhere than a single one, but no more
        assert (updates[client] - want).norm() < rounding


def test_steps_draw_with_replacement_and_epochs_see_every_sample(generator: torch.Generator) -> None:
    parts = [torch.arange(7), torch.arange(7, 40), torch.arange(40, 60)]
    batches = draw_batches(parts, RECIPE, generator)
    assert batches.steps_C.tolist() == [4, 4, 4]
    assert all(torch.isin(batches.index_CSB[i], part).all() for i, part in enumerate(parts))
    batches = draw_batches(parts, dataclasses.replace(RECIPE, epochs=2), generator)
    assert batches.steps_C.tolist() == [3, 11, 7]  # ceil(2 n / 6)
    for client, part in enumerate(parts):
        seen = batches.index_CSB[client, : batches.steps_C[client]].flatten()
        counts = torch.bincount(seen, minlength=60)[part]
        assert counts.sum() == len(seen)
        assert counts.min() >= 2, "every sample as often as there are epochs"
        assert counts.max() <= 3, "the last batch is filled up from one more shuffle"


def test_poisoned_clients_alone_train_on_what_poison_makes(generator: torch.Generator) -> None:
    inputs, labels = samples("mlp", generator)
    inputs, module = inputs.double(), make("mlp").double()  # other blocks round otherwise, and kinks make that large
    batches = draw_batches([torch.arange(20 * i, 20 * i + 20) for i in range(3)], RECIPE, generator)
    poisoned = torch.tensor([False, True, False])

    def poison(
        batch_inputs: torch.Tensor, batch_labels: torch.Tensor, clients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert clients.tolist() == [1]
        return batch_inputs, 9 - batch_labels

    start = flat(module)
    honest = train_clients(module, start, inputs, labels, batches, RECIPE).updates
    flipped = train_clients(module, start, inputs, 9 - labels, batches, RECIPE).updates
    sent = train_clients(module, start, inputs, labels, batches, RECIPE, poison=poison, poisoned=poisoned).updates
    torch.testing.assert_close(sent[~poisoned], honest[~poisoned])
    torch.testing.assert_close(sent[1], flipped[1])
    assert (sent[1] - honest[1]).norm() > 0.1 * honest[1].norm()


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_a_round_starts_from_the_global_buffers(batching: str, generator: torch.Generator) -> None:
    inputs, labels = samples("norm", generator)
    recipe = dataclasses.replace(RECIPE, batching=batching)
    batches = draw_batches([torch.arange(30)], recipe, generator)
    start = {
        "norm.running_mean": torch.full((4,), 3.0),
        "norm.running_var": torch.ones(4),
        "norm.num_batches_tracked": torch.tensor(7),
    }
    trained = train_clients(make("norm"), flat(make("norm")), inputs, labels, batches, recipe, buffers=start)
    assert trained.buffers["norm.num_batches_tracked"].tolist() == [11]
    assert (trained.buffers["norm.running_mean"] > 1.5).all(), "0.9^4 of 3 is left"
    assert (start["norm.running_mean"] == 3).all(), "the caller's are not written to"


def test_the_way_is_chosen_by_the_model_and_the_batch() -> None:
    small, images = torch.zeros(32, 1, 8, 8), torch.zeros(32, 1, 28, 28)
    on_gpu = torch.zeros(32, 1, 28, 28, device="meta")
    vit = build_model("vit", (1, 28, 28), 10, seed=0)
    assert batching_for(make("mlp"), small, RECIPE) == "vmap"
    assert batching_for(make("cnn"), images, RECIPE) == "loop"
    assert batching_for(vit, images, RECIPE) == "loop"
    assert batching_for(vit, images[:1], RECIPE) == "vmap"
    assert batching_for(make("cnn"), on_gpu, RECIPE) == "vmap"
    assert batching_for(make("cnn"), images, dataclasses.replace(RECIPE, batching="vmap")) == "vmap"
    mixed = dataclasses.replace(RECIPE, autocast="bfloat16")
    assert [batching_for(make(model), on_gpu, mixed) for model in ("mlp", "norm")] == ["vmap", "loop"]


def test_alike_clients_are_honest_first_and_those_with_most_steps_first() -> None:
    """As a stable sort by (poisons, fewer steps) has them, and no group is empty."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        steps_C = torch.randint(1, 5, (12,), generator=generator)
        poisoned_C = torch.rand(12, generator=generator) < 0.3
        groups = alike_clients(steps_C, poisoned_C)
        want = sorted(range(12), key=lambda c: (bool(poisoned_C[c]), -int(steps_C[c])))
        assert [client for _, clients in groups for client in clients] == want
        assert all(clients and {bool(poisoned_C[c]) for c in clients} == {poisons} for poisons, clients in groups)


class Branching(nn.Module):
    """Decides by a value, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.head(images.flatten(1))
        return outputs if outputs.sum() > 0 else -outputs


def test_a_model_that_vmap_does_not_take_is_named(generator: torch.Generator) -> None:
    inputs, labels = samples("mlp", generator)
    batches = draw_batches([torch.arange(20)], RECIPE, generator)
    with pytest.raises(ValueError, match=r"local\.batching: the model does not run under vmap, use 'loop'"):
        train_clients(Branching(), flat(Branching()), inputs, labels, batches, RECIPE)
    loop = dataclasses.replace(RECIPE, batching="loop")
    assert train_clients(Branching(), flat(Branching()), inputs, labels, batches, loop).updates.isfinite().all()


def test_blocks_shrink_when_memory_runs_out(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = samples("mlp", generator)
    parts = [torch.arange(10 * i, 10 * i + 10) for i in range(6)]
    batches = draw_batches(parts, RECIPE, generator)
    want = train_clients(make("mlp"), flat(make("mlp")), inputs, labels, batches, RECIPE).updates
    train, sizes = Trainer.at_once, []

    def narrow(self: Trainer, start, buffers, index_CSB, *rest):
        sizes.append(len(index_CSB))
        if len(index_CSB) > 2:
            raise torch.OutOfMemoryError("no")
        return train(self, start, buffers, index_CSB, *rest)

    monkeypatch.setattr(Trainer, "at_once", narrow)
    done: list[int] = []
    got = train_clients(make("mlp"), flat(make("mlp")), inputs, labels, batches, RECIPE, progress=done.append).updates
    torch.testing.assert_close(got, want)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert done == [1, 2, 3, 4, 5, 6]


def test_the_block_follows_from_what_a_client_keeps(generator: torch.Generator) -> None:
    inputs, labels = samples("mlp", generator)
    trainer = Trainer(make("mlp"), inputs, labels, RECIPE, None)
    small = trainer.block_size(flat(make("mlp")), {}, torch.arange(6))
    large = trainer.block_size(flat(make("mlp")), {}, torch.arange(60))
    assert small > large > 1


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_the_block_on_a_gpu_does_not_depend_on_what_ran_before(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped and resumed finds memory free that it had kept; its blocks, and so its rounding, are the same."""
    inputs, labels = samples("mlp", generator)
    trainer = Trainer(make("mlp"), inputs, labels, RECIPE, None)
    start_P, whole = flat(make("mlp")).as_subclass(OnGPU), 80 * 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=whole))
    blocks = []
    for kept, used in ((0, 0), (50 * 2**30, 2**30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, kept=kept: (whole - kept, whole))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=kept: kept)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, used=used: used)
        blocks.append(trainer.block_size(start_P, {}, torch.arange(6)))
    assert blocks[0] == blocks[1] > 1000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "at least 1"),
        ("epochs", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("lr", 0, "finite and above 0"),
        ("grad_clip", 0, "above 0"),
        ("grad_clip", float("nan"), "above 0"),
        ("momentum", 1, "below 1"),
        ("weight_decay", -1, "at least 0"),
        ("autocast", "float16", "one of float32, bfloat16"),
        ("batching", "fast", "one of auto, vmap, loop"),
    ],
)
def test_bad_recipes_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"local\.{field} must be .*{message}"):
        LocalTraining(**{field: value})


def test_batches_are_the_same_for_the_same_seed() -> None:
    labels = load_dataset("digits").train_labels
    parts = [torch.arange(10), torch.arange(10, len(labels))]
    draws: list[Batches] = [draw_batches(parts, LocalTraining(), torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(draws[0].index_CSB, draws[1].index_CSB)
