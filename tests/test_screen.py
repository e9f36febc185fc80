"""What is looked at before masks are trained: the cost of large updates is bounded, and whoever breaks the loss is named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skymask_gpu import SkyMask
from skymask_gpu.defence import screen
from skymask_gpu.engine import ClientBlocks

NUM_PARAMS = 3


class Loss:
    """Inf from a length of ``limit`` on, and a count of how often it is asked."""

    def __init__(self, limit: float) -> None:
        self.limit, self.calls = limit, 0

    def __call__(self, params_P: Tensor) -> Tensor:
        self.calls += 1
        length = params_P.abs().sum()
        return length if length.item() < self.limit else length * torch.inf


def rows_of_length(lengths: list[float]) -> tuple[ClientBlocks, Tensor]:
    updates_NP = torch.zeros(len(lengths), NUM_PARAMS)
    updates_NP[:, 0] = torch.tensor(lengths)
    return ClientBlocks([updates_NP]), torch.linalg.vector_norm(updates_NP, dim=1)


def harmful(lengths: list[float], limit: float) -> tuple[dict[int, str], Loss]:
    loss, (rows, norms_K) = Loss(limit), rows_of_length(lengths)
    return screen.harmful(rows, norms_K, list(range(len(rows))), torch.zeros(NUM_PARAMS), loss), loss


@pytest.mark.parametrize("num_harmful", [0, 1, 15, 16, 17, 400, 999, 1000])
def test_however_many_large_updates_are_sent_they_cost_a_bounded_number_of_passes(num_harmful: int) -> None:
    generator = torch.Generator().manual_seed(num_harmful)
    order = torch.randperm(1000, generator=generator)
    lengths_N = torch.empty(1000)
    lengths_N[order] = 2000.0 - torch.arange(1000)
    reasons, loss = harmful(lengths_N.tolist(), limit=2000.0 - num_harmful + 0.5)
    assert sorted(reasons) == sorted(order[:num_harmful].tolist())
    assert loss.calls <= 16 + 10  # 2**10 > 1000 - 16
    assert all("drives the root loss" in reason for reason in reasons.values())


def test_a_few_harmful_updates_are_found_behind_longer_harmless_ones() -> None:
    """Lengths decide only which rows are looked at: here the loss takes offence at a middle one."""
    rows, norms_K = rows_of_length([5.0, 9.0, 7.0])

    def loss(params_P: Tensor) -> Tensor:
        return params_P.sum() if params_P[0] != 7 else params_P.sum() * torch.nan

    assert list(screen.harmful(rows, norms_K, [0, 1, 2], torch.zeros(NUM_PARAMS), loss)) == [2]
    assert screen.harmful(rows, norms_K, [0, 1], torch.zeros(NUM_PARAMS), loss) == {}
    assert screen.harmful(rows, norms_K, [], torch.zeros(NUM_PARAMS), loss) == {}


def counted(defence: SkyMask, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often mask training was begun."""
    from skymask_gpu.defence import judge

    calls: list[int] = []
    train = judge.train_masks

    def train_masks(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return train(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(judge, "train_masks", train_masks)
    return lambda: len(calls)


class Exponential(torch.nn.Module):
    """Logits times the exponential of a sum: many updates, each harmless, drive it out of range together."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.nn.Parameter(torch.zeros(30))
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * self.scales.sum().exp()


def test_updates_that_break_the_loss_only_together_are_found_in_a_bounded_number_of_trainings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of 20 attackers adds 80 in a place of its own, which is finite alone; their mean over 25 clients is 64 too many."""
    torch.manual_seed(0)
    module = Exponential()
    num_params = sum(p.numel() for p in module.parameters())
    honest_NP = 0.01 * torch.randn(5, num_params)
    attackers_NP = torch.zeros(20, num_params)
    attackers_NP[torch.arange(20), torch.arange(20)] = 85.0
    defence = SkyMask(module, torch.randn(30, 4), torch.arange(30) % 2)
    trainings = counted(defence, monkeypatch)
    updates_NP = torch.cat([honest_NP, attackers_NP])
    result = defence.aggregate(updates_NP * 1.02)
    assert result.benign[:5].all()
    assert torch.isfinite(result.update).all()
    assert trainings() <= 4


def test_harmful_updates_that_hide_behind_longer_harmless_ones_cannot_fail_training_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only one of 8 harmful rows at a time is among the 16 longest; the second failure rejects all that are far out."""
    torch.manual_seed(0)
    module = Exponential()
    num_params = sum(p.numel() for p in module.parameters())
    honest_NP = 0.01 * torch.randn(5, num_params)
    harmless_NP, harmful_NP = torch.zeros(15, num_params), torch.zeros(8, num_params)
    harmless_NP[:, 33] = 7000.0  # the weight of an input that is always 0
    harmful_NP[torch.arange(8), torch.arange(8)] = 1000.0 + torch.arange(8)
    inputs = torch.randn(30, 4)
    inputs[:, 3] = 0
    defence = SkyMask(module, inputs, torch.arange(30) % 2)
    trainings = counted(defence, monkeypatch)
    updates_NP = torch.cat([honest_NP, harmless_NP, harmful_NP])
    result = defence.aggregate(updates_NP, root_update=0.01 * torch.randn(num_params))
    assert result.clients.tolist() == [0, 1, 2, 3, 4], "honest clients are judged by their masks, and only they"
    assert torch.isfinite(result.update).all()
    assert trainings() == 3
