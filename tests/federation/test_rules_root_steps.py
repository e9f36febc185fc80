"""The two controls: what the server's samples give by themselves, and after another rule."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import RootTraining
from skymask_gpu.federation.config import read_config
from skymask_gpu.federation.rules import RULES, RoundInfo, Rule, RuleContext, build_rule
from skymask_gpu.federation.rules.root_steps import FinetunedRule, RootFinetuneSettings

NUM_CLIENTS = 8
# Fewer than two batches of 50: every step is taken on all samples, so that a plain loop is the same.
SAMPLES, STEPS, LR = 24, 5, 0.5


def make_context(dtype: torch.dtype = torch.float64) -> RuleContext:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(4, 3, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % 3
    inputs = (2 * torch.eye(4)[labels] + torch.randn(SAMPLES, 4, generator=generator)).to(dtype)
    training = RootTraining(steps=STEPS, lr=LR, grad_clip=float("inf"))
    return RuleContext(
        module=module, root_inputs=inputs, root_labels=labels, num_clients=NUM_CLIENTS, root_training=training, seed=0
    )


def params_of(module: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in module.parameters()])


def trained_by_loop(context: RuleContext, params: Tensor) -> Tensor:
    """Where plain SGD on the samples leads from ``params``, as a difference."""
    weight, bias = params[:12].view(3, 4).clone().requires_grad_(), params[12:].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(context.root_inputs @ weight.T + bias, context.root_labels).backward()
        optimizer.step()
    return torch.cat([weight.detach().flatten(), bias.detach()]) - params


def make_info(context: RuleContext) -> RoundInfo:
    params = params_of(context.module)
    clients, generator = torch.arange(NUM_CLIENTS), torch.Generator().manual_seed(2)
    return RoundInfo(params, trained_by_loop(context, params), clients, 0, generator)


def random_updates(scale: float = 0.1) -> Tensor:
    return scale * torch.randn(NUM_CLIENTS, 15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def finetuned(context: RuleContext, base: str) -> Rule:
    return build_rule("root-finetune", context, RootFinetuneSettings(base=FinetunedRule(name=base)))


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_root_only_trains_on_the_samples_whatever_clients_send(value: float) -> None:
    context = make_context()
    info = make_info(context)
    result = build_rule("root-only", context)(random_updates() * value, info)
    torch.testing.assert_close(result.update, trained_by_loop(context, info.global_params))
    assert result.kept is None


@pytest.mark.parametrize("base", ["fedavg", "krum", "fltrust", "root-only"])
def test_root_finetune_trains_on_from_where_the_other_rule_leads(base: str) -> None:
    context = make_context()
    info, updates = make_info(context), random_updates()
    first = build_rule(base, context)(updates, info)
    result = finetuned(context, base)(updates, info)
    want = first.update + trained_by_loop(context, info.global_params + first.update)
    torch.testing.assert_close(result.update, want)
    assert (result.kept is None) == (first.kept is None)
    assert first.kept is None or torch.equal(result.kept, first.kept)


def test_the_other_rule_remembers_and_records() -> None:
    context = make_context(torch.float32)
    info = make_info(context)
    updates = info.root_update + random_updates().float()
    alone, both = build_rule("skymask", context), finetuned(context, "skymask")
    first, result = alone(updates, info), both(updates, info)
    assert result.record["agreement"] == first.record["agreement"]
    assert alone.state()
    assert {name: value.tolist() for name, value in both.state().items()} == {
        name: value.tolist() for name, value in alone.state().items()
    }
    again = finetuned(context, "skymask")
    again.restore(both.state())
    assert again.state().keys() == both.state().keys()


@pytest.mark.parametrize("value", [1e308, float("inf")])
def test_no_step_is_taken_where_training_diverges(value: float) -> None:
    context = make_context()
    info = make_info(context)
    updates = torch.full((NUM_CLIENTS, 15), value, dtype=torch.float64)
    with_base = build_rule("fedavg", context)(updates, info)
    result = finetuned(context, "fedavg")(updates, info)
    torch.testing.assert_close(result.update, with_base.update, equal_nan=True)


def test_the_other_rule_is_a_name_or_a_table(tmp_path: Path) -> None:
    def read(line: str) -> Any:
        path = tmp_path / "run.toml"
        path.write_text(f"[defence]\nrule = 'root-finetune'\n{line}\n")
        (run,) = read_config(path)
        return run.defence.settings.base

    assert read("").name == "skymask"
    assert read("base = 'fedavg'").name == "fedavg"
    assert read("base = { name = 'skymask', mean = 'masked' }").settings.mean == "masked"
    with pytest.raises(ValueError, match=r"defence\.base must be one of .*got 'root-finetune'"):
        read("base = 'root-finetune'")
    with pytest.raises(ValueError, match=r"defence\.base.*'krumm'"):
        read("base = 'krumm'")


def test_the_controls_are_rules_with_root_data() -> None:
    assert {field.name for field in dataclasses.fields(RULES.settings_of("root-finetune"))} == {"base"}
    assert not dataclasses.fields(RULES.settings_of("root-only"))
