"""How far mask training is: told after each step of every solver, and it changes nothing but what is told."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from skymask_gpu import ClientHistory, SkyMask
from skymask_gpu.cli import options
from skymask_gpu.engine import SOLVERS, FlatModel, MaskTraining, train_masks
from skymask_gpu.engine.progress import step_done

NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES, NUM_CLIENTS = 8, 16, 3, 12


def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, NUM_CLASSES))


def data(seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(60) % NUM_CLASSES
    noise = torch.randn(60, NUM_INPUTS, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.eye(NUM_INPUTS)[:NUM_CLASSES][labels] + noise, labels


def local_update(seed: int) -> Tensor:
    loss = FlatModel(module(), *data(seed))
    params_P = loss.initial_params
    for _ in range(10):
        (grad_P,) = torch.autograd.grad(loss(params_P.requires_grad_()), params_P)
        params_P = (params_P - 0.1 * grad_P.clamp(-0.01, 0.01)).detach()
    return params_P - loss.initial_params


HONEST_NP = torch.stack([local_update(100 + client) for client in range(NUM_CLIENTS)])


def poisoned() -> Tensor:
    updates_NP = HONEST_NP.clone()
    updates_NP[:3] *= -1
    return updates_NP


def defence(**settings: Any) -> SkyMask:
    return SkyMask(module(), *data(1), **settings)


class Told(list[tuple[int, int]]):
    """What a callback was told."""

    def __call__(self, done: int, steps: int) -> None:
        self.append((done, steps))


def every(steps: int, total: int | None = None) -> list[tuple[int, int]]:
    return [(done, total or steps) for done in range(1, steps + 1)]


ALWAYS = {"min_improvement": -1e9}
CONFIGS = {
    "20 steps": (MaskTraining(**ALWAYS), 20),
    "1 step": (MaskTraining(steps=1), 1),
    "2 steps": (MaskTraining(steps=2), 2),
    "11 steps": (MaskTraining(steps=11, **ALWAYS), 11),
    "31 steps": (MaskTraining(steps=31, check_every=7, **ALWAYS), 31),
    "a plateau": (MaskTraining(check_every=7, min_improvement=1e9), 8),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_each_step_is_told_once_and_in_order_and_the_masks_are_the_same(solver: str, config: str) -> None:
    training, steps = CONFIGS[config]
    loss, told = FlatModel(module(), *data(1)), Told()
    arguments: dict[str, Any] = {"config": training, "solver": solver, "keep_logits": True}
    want = train_masks(poisoned(), loss.initial_params, loss, **arguments)
    got = train_masks(poisoned(), loss.initial_params, loss, progress=told, **arguments)
    assert told == every(steps, training.steps)
    assert got.steps == steps
    assert got.losses == want.losses
    assert torch.equal(got.bits, want.bits)
    assert got.logits is not None
    assert want.logits is not None
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("solver", SOLVERS)
def test_aggregate_hands_it_on_and_gives_the_same_model(solver: str) -> None:
    told = Told()
    want = defence(solver=solver).aggregate(poisoned())
    got = defence(solver=solver).aggregate(poisoned(), progress=told)
    assert told == every(got.masks.steps, 20)
    assert torch.equal(got.update, want.update)
    assert got.rejected == want.rejected
    assert list(got.rejected) == [0, 1, 2]


class Scaled(nn.Module):
    """Logits times an exponential: updates shorter than the model drive the loss out of range, which only training shows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.ballast = nn.Parameter(torch.full((1,), 1e4))
        self.linear = nn.Linear(NUM_INPUTS, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(inputs) * self.scale.exp()
        return logits


def test_if_masks_are_trained_again_the_count_begins_anew() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scaled = Scaled()
    num_params = sum(parameter.numel() for parameter in scaled.parameters())
    updates_NP = 0.01 * torch.randn(NUM_CLIENTS, num_params, generator=torch.Generator().manual_seed(0))
    updates_NP[:5, 0] += 1000
    told = Told()
    result = SkyMask(scaled, *data(1)).aggregate(updates_NP, progress=told)
    assert {0, 1, 2, 3, 4} <= set(result.rejected)
    begins = [place for place, (done, _) in enumerate(told) if done == 1]
    assert len(begins) == 2
    assert told[: begins[1]] == every(begins[1], 20)
    assert told[begins[1] :] == every(result.masks.steps, 20)


def test_nothing_is_told_of_a_round_that_is_refused_before_training() -> None:
    told = Told()
    for updates, message in (
        (torch.full_like(HONEST_NP, torch.nan), "none of 12 clients sent a usable update"),
        (HONEST_NP[:, 1:], "updates must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            defence().aggregate(updates, progress=told)
    with pytest.raises(ValueError, match="progress must be a function of two numbers, steps done and steps in all, got 3"):
        defence().aggregate(HONEST_NP, progress=3)  # type: ignore[arg-type]
    loss = FlatModel(module(), *data(1))
    with pytest.raises(ValueError, match="progress must be a function"):
        train_masks(HONEST_NP, loss.initial_params, loss, progress=[])  # type: ignore[arg-type]
    assert told == []


@pytest.mark.parametrize("last", [4, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_error_of_the_callback_ends_the_round_and_leaves_nothing(solver: str, last: int) -> None:
    class StopError(Exception):
        pass

    told, history = Told(), ClientHistory()

    def stop(done: int, steps: int) -> None:
        told(done, steps)
        if done == last:
            raise StopError("enough")

    judging = defence(solver=solver, training=MaskTraining(**ALWAYS))
    names = [f"client {number}" for number in range(NUM_CLIENTS)]
    with pytest.raises(StopError, match="enough"):
        judging.aggregate(poisoned(), client_ids=names, history=history, progress=stop)
    assert told == every(last, 20)
    assert len(history) == 0
    step_done()
    assert len(told) == last, "nobody counts any more"
    got = judging.aggregate(poisoned(), client_ids=names, history=history)
    want = defence(solver=solver, training=MaskTraining(**ALWAYS)).aggregate(poisoned())
    assert torch.equal(got.update, want.update)
    assert len(history) == NUM_CLIENTS


def test_a_callback_may_train_masks_itself() -> None:
    loss, told = FlatModel(module(), *data(1)), Told()
    inner = MaskTraining(steps=2)

    def progress(done: int, steps: int) -> None:
        told(done, steps)
        train_masks(HONEST_NP, loss.initial_params, loss, config=inner)

    train_masks(HONEST_NP, loss.initial_params, loss, config=MaskTraining(steps=3), progress=progress)
    assert told == every(3)


@pytest.fixture
def a_round(tmp_path: Path) -> list[object]:
    """The arguments of the command that judges a round."""
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        f"    return nn.Sequential(nn.Linear({NUM_INPUTS}, {NUM_HIDDEN}), nn.ReLU(), nn.Linear({NUM_HIDDEN}, {NUM_CLASSES}))\n"
    )
    inputs, labels = data(1)
    np.savez(tmp_path / "root.npz", inputs=inputs.numpy(), labels=labels.numpy())
    save_file(module().state_dict(), tmp_path / "global.safetensors")
    save_file({"updates": poisoned()}, tmp_path / "updates.safetensors")
    return [
        "aggregate", "--global", tmp_path / "global.safetensors", "--updates", tmp_path / "updates.safetensors",
        "--model", f"{tmp_path / 'my_model.py'}:net", "--root", tmp_path / "root.npz", "--out", tmp_path / "new.safetensors",
    ]  # fmt: skip


def test_the_command_shows_a_bar_on_a_terminal_only(a_round: list[object], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = run(*a_round)
    assert code == 0, printed
    assert "/20" not in printed
    screen = io.StringIO()
    monkeypatch.setattr(options, "console", Console(file=screen, force_terminal=True, width=120))
    bars: list[Any] = []
    make = options.progress_bar
    monkeypatch.setattr("skymask_gpu.cli.aggregate.progress_bar", lambda *a, **k: bars.append(make(*a, **k)) or bars[-1])
    code, printed = run(*a_round)
    assert code == 0, printed
    assert f"12 masks of {HONEST_NP.shape[1]} parameters" in screen.getvalue()
    assert "/20" in screen.getvalue()
    (bar,) = bars
    (task,) = bar.tasks
    assert 1 < task.completed <= task.total == 20
