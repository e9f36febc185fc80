"""Large frozen bases: shared and never written to; losses in parts; inputs by name; tied weights; PEFT."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import SkyMask
from skymask_gpu.engine import FlatModel

LABELS = torch.arange(20) % 3
INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def adapted() -> nn.Module:
    """A frozen base with a layer that is trained on top."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)))


def value_and_gradient(loss: FlatModel, params_P: Tensor) -> tuple[Tensor, Tensor]:
    leaf_P = params_P.clone().requires_grad_()
    value = loss(leaf_P)
    return value.detach(), torch.autograd.grad(value, leaf_P)[0]


def own_gradient(module: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """The gradient by plain autograd, in the order of named_parameters."""
    outputs = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(F.cross_entropy(outputs, labels), trainable)])


# --- sharing ------------------------------------------------------------------------------------------------------------


def test_a_frozen_base_is_in_memory_once() -> None:
    module = adapted()
    flat = FlatModel(module, INPUTS, LABELS)
    place = module[0].weight.data_ptr()
    copies = [flat, flat.to("cpu"), flat.to(torch.float32).to("cpu"), FlatModel(module, INPUTS, LABELS)]
    assert {copied._module[0].weight.data_ptr() for copied in copies} == {place}
    assert all(copied._module[3].weight.is_meta for copied in copies), "trainable parameters need no memory here"
    assert len({id(copied._module) for copied in copies}) == 4, "layers of their own, so that threads do not meet"
    assert flat.to(torch.float64)._module[0].weight.dtype == torch.float64
    assert module[0].weight.data_ptr() == place
    assert module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_another_dtype_is_converted_once(dtype: torch.dtype) -> None:
    module = adapted()
    module[0].to(dtype)
    flat = FlatModel(module, INPUTS, LABELS)
    place = flat._module[0].weight.data_ptr()
    assert flat._module[0].weight.dtype == torch.float32
    assert flat.to("cpu")._module[0].weight.data_ptr() == place
    got, want = flat(flat.initial_params), FlatModel(module.float(), INPUTS, LABELS)(flat.initial_params)
    assert torch.equal(got, want)


def test_a_round_copies_no_frozen_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    module = adapted()
    defence = SkyMask(module, INPUTS, LABELS)
    places = []
    of_round = FlatModel.to

    def watched(flat: FlatModel, *args: Any, **kwargs: Any) -> FlatModel:
        other = of_round(flat, *args, **kwargs)
        places.append(other._module[0].weight.data_ptr())
        return other

    monkeypatch.setattr(FlatModel, "to", watched)
    defence(0.1 * torch.randn(5, defence.settings.flat.num_params, generator=torch.Generator().manual_seed(1)))
    assert set(places) == {module[0].weight.data_ptr()}


class Writes(nn.Module):
    """Writes to a frozen parameter and to a buffer whenever it is called, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.top = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.frozen.mul_(0.5)
        return self.top(inputs * self.frozen) + self.calls


def test_a_module_that_writes_to_itself_corrupts_neither_the_users_nor_another_copy() -> None:
    module = seeded(Writes)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first = FlatModel(module, INPUTS, LABELS)
    second, third = FlatModel(module, INPUTS, LABELS), first.to("cpu")
    want = [second(second.initial_params).item() for _ in range(3)]
    for _ in range(5):
        third(third.initial_params)
    assert [first(first.initial_params).item() for _ in range(3)] == want
    assert want[0] != want[1], "this module's loss changes with each call"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_buffers_of_the_users_module_may_change_later() -> None:
    """Training changes them in place."""

    class Scaled(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * self.scale

    module = seeded(lambda: Scaled(nn.Linear(4, 3)))
    module.register_buffer("scale", torch.tensor(2.0))
    flat = FlatModel(module, INPUTS, LABELS)
    want = flat(flat.initial_params)
    module.scale.zero_()
    assert torch.equal(flat(flat.initial_params), want)
    place = flat._module.scale.data_ptr()
    assert flat.to("cpu")._module.scale.data_ptr() == place, "nor are buffers copied in each round"


# --- parts of the root data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root_batch", [1, 3, 19, 20, 50])
def test_the_loss_in_parts_has_value_and_gradient_of_the_whole(root_batch: int) -> None:
    module = adapted().double()
    whole = FlatModel(module, INPUTS, LABELS)
    parts = FlatModel(module, INPUTS, LABELS, root_batch=root_batch)
    params_P = whole.initial_params * 1.1
    got, want = value_and_gradient(parts, params_P), value_and_gradient(whole, params_P)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(parts(params_P), want[0], rtol=1e-12, atol=0)
    single = value_and_gradient(FlatModel(module.float(), INPUTS, LABELS, root_batch=root_batch), params_P.float())
    torch.testing.assert_close(single[1].double(), want[1], rtol=1e-4, atol=1e-6)
    # in a sum, the gradient is scaled by what comes after
    leaf_P = params_P.clone().requires_grad_()
    (tripled_P,) = torch.autograd.grad(3 * parts(leaf_P), leaf_P)
    torch.testing.assert_close(tripled_P, 3 * want[1], rtol=1e-12, atol=1e-14)
    assert parts.part(torch.arange(7)).root_batch == root_batch


def test_no_more_samples_than_asked_for_are_evaluated_at_a_time() -> None:
    sizes: list[int] = []

    class Noted(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return super().forward(inputs)

    defence = SkyMask(Noted(4, 3), INPUTS, LABELS, root_batch=8)
    defence(0.1 * torch.randn(5, 15, generator=torch.Generator().manual_seed(1)))
    assert max(sizes) == 8
    assert sizes.count(4) > 10, "the last part of 20 samples"


def test_a_judgement_in_parts_is_that_of_the_whole() -> None:
    module = adapted()
    updates = 0.1 * torch.randn(9, 43, generator=torch.Generator().manual_seed(1))
    whole, parts = (SkyMask(module, INPUTS, LABELS, root_batch=size).aggregate(updates) for size in (None, 6))
    assert torch.equal(whole.benign, parts.benign)
    torch.testing.assert_close(whole.masks.losses, parts.masks.losses, rtol=1e-4, atol=1e-5)


def test_parts_that_would_change_the_loss_are_refused() -> None:
    norm = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"root_batch must be None for a module with batch norm \(1\), got 1: .* group norm"):
        FlatModel(norm, INPUTS, LABELS, root_batch=1)
    FlatModel(norm, INPUTS, LABELS, root_batch=1, buffers="fixed")
    with pytest.raises(ValueError, match=r"root_batch: loss_fn must be a mean over samples, but 8 root samples"):
        FlatModel(adapted(), INPUTS, LABELS, root_batch=8, loss_fn=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    for wrong in (0, -1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="root_batch must be a number of samples of at least 1"):
            SkyMask(adapted(), INPUTS, LABELS, root_batch=wrong)  # type: ignore[arg-type]


# --- inputs ---------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Tokens and a mask of those that count, as language models take them; the embedding is tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        counted = self.mix(self.embed(tokens)) * attention_mask[..., None]
        return self.head(torch.tanh(counted.sum(1)))


TOKENS = torch.randint(7, (12, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6) < torch.arange(12)[:, None] % 6 + 1
NEXT = torch.arange(12) % 7


@pytest.mark.parametrize("form", ["dict", "tuple", "list"])
def test_inputs_by_name_or_in_order_and_tied_weights(form: str) -> None:
    module = seeded(Reader)
    assert len(list(module.parameters())) == 3
    inputs: Any = {"tokens": TOKENS, "attention_mask": MASK} if form == "dict" else (TOKENS, MASK)
    flat = FlatModel(module, list(inputs) if form == "list" else inputs, NEXT)
    assert flat.num_samples == 12
    assert flat.num_params == 7 * 5 + 5 * 5 + 5, "a tied weight is one parameter"
    _, grad_P = value_and_gradient(flat, flat.initial_params)
    torch.testing.assert_close(grad_P, own_gradient(module, inputs, NEXT))
    part = flat.part(torch.tensor([3, 4]))
    some = {name: value[3:5] for name, value in inputs.items()} if form == "dict" else [value[3:5] for value in inputs]
    torch.testing.assert_close(value_and_gradient(part, flat.initial_params)[1], own_gradient(module, some, NEXT[3:5]))
    in_parts = FlatModel(module, inputs, NEXT, root_batch=5)
    torch.testing.assert_close(value_and_gradient(in_parts, flat.initial_params)[1], grad_P, rtol=1e-4, atol=1e-6)


def test_tokens_and_tied_weights_are_judged_and_the_whole_state_dict_is_taken() -> None:
    module = seeded(Reader)
    defence = SkyMask(module, {"tokens": TOKENS, "attention_mask": MASK}, NEXT, root_batch=5)
    rows = 0.1 * torch.randn(6, 65, generator=torch.Generator().manual_seed(1))
    want = defence.aggregate(rows)
    # a state dict has both names of the tied weight
    flat = defence.settings.flat
    states = [{**flat.unflatten(row), "head.weight": row[:35].view(7, 5)} for row in rows]
    assert set(states[0]) == set(module.state_dict())
    for form in (states, [[state[name].numpy() for name in module.state_dict()] for state in states]):
        got = defence.aggregate(form)
        assert torch.equal(got.update, want.update)
        assert not got.rejected.keys() - want.rejected.keys()


def test_inputs_that_are_no_tensors_of_samples_are_named() -> None:
    module = seeded(Reader)
    for inputs, message in (
        ({"tokens": TOKENS, "attention_mask": None}, "a tuple or dict of tensors, got a NoneType; .* wrap the module"),
        ((TOKENS, MASK[:1]), r"root_inputs must all have one row per sample, got \[1, 12\] rows"),
        ((), "the same number of samples, at least 1, got 0 and 12"),
        ({"tokens": TOKENS}, "root_inputs and root_labels do not fit the module"),
        ((TOKENS.float(), MASK), "root_inputs and root_labels do not fit the module"),
    ):
        with pytest.raises(ValueError, match=message):
            FlatModel(module, inputs, NEXT)
    with pytest.raises(ValueError, match="root_inputs and root_labels must be finite"):
        SkyMask(adapted(), (INPUTS.log(),), LABELS)


# --- PEFT -----------------------------------------------------------------------------------------------------------------


def test_what_peft_saves_is_taken() -> None:
    peft = pytest.importorskip("peft", reason="pip install --no-deps peft, transformers and what they import")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"])
    module = seeded(lambda: peft.get_peft_model(adapted(), config))
    defence = SkyMask(module, INPUTS, LABELS)
    flat = defence.settings.flat
    rows = 0.1 * torch.randn(5, flat.num_params, generator=torch.Generator().manual_seed(1))
    saved = []
    for row in rows:
        nn.utils.vector_to_parameters(row, [p for p in module.parameters() if p.requires_grad])
        saved.append({name: value.clone() for name, value in peft.get_peft_model_state_dict(module).items()})
    assert set(saved[0]) != set(flat.shapes)
    got, want = defence.aggregate(saved), defence.aggregate(rows)
    assert torch.equal(got.update, want.update)
    assert got.rejected == want.rejected


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_rounds_with_a_frozen_base_of_a_gigabyte_need_little_more_than_one_pass() -> None:
    """The study prints the figures; a process of its own, because memory is measured."""
    command = [sys.executable, "-P", "-m", "skymask_gpu.bench.studies.frozen_base"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\n".join(lines))
    assert float(lines[-1].split()[-1]) < 1.2
