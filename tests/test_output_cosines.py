"""Output cosines against a loop over outputs, and what they are there for."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.defence import Aggregation, RootTraining, SkyMask, root_direction
from skymask_gpu.defence.output_cosines import OutputCosines, linear_layers
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.federation import Federation, RunConfig

Layers = Sequence[tuple[slice, int]]


def layers_of(module: nn.Module) -> Layers:
    return linear_layers({name: parameter.shape for name, parameter in module.named_parameters()})


def plain_mean(update_P: Tensor, direction_P: Tensor, layers: Layers) -> float:
    """The mean over layers of the mean over outputs of the cosine of their weights, in a loop."""
    by_layer = []
    for columns, num_outputs in layers:
        mine = update_P[columns].double().view(num_outputs, -1).tolist()
        wanted = direction_P[columns].double().view(num_outputs, -1).tolist()
        cosines = []
        for weights, along in zip(mine, wanted, strict=True):
            if not any(along):
                continue  # the root data do not move this output
            length = math.hypot(*weights) * math.hypot(*along)
            cosines.append(math.fsum(a * b for a, b in zip(weights, along, strict=True)) / length if length else 0.0)
        if cosines:
            by_layer.append(sum(cosines) / len(cosines))
    return sum(by_layer) / len(by_layer) if by_layer else 0.0


def measured(rows_KP: Tensor, direction_P: Tensor, layers: Layers, lengths: Sequence[int]) -> list[float]:
    cosines = OutputCosines(layers, direction_P, ColumnShards(len(direction_P)))
    for part in rows_KP.split(lengths):
        cosines.add(part)
    return cosines.result().tolist()


@pytest.mark.parametrize(
    ("module", "layers"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [(slice(0, 12), 3), (slice(15, 21), 2)]),
        (nn.Linear(4, 1), [(slice(0, 4), 1)]),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), []),
    ],
)
def test_linear_layers_are_the_parameters_with_two_axes(module: nn.Module, layers: Layers) -> None:
    assert layers_of(module) == layers


@pytest.mark.parametrize(("num_outputs", "width"), [(10, 7), (1, 20), (33, 1)])
def test_cosines_are_those_of_a_loop_however_rows_are_parted(num_outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(num_outputs)
    first, second = 5 + num_outputs * width, 9 + num_outputs * width
    layers = [(slice(5, first), num_outputs), (slice(second, second + 12), 3)]
    rows_KP = torch.randn(6, second + 14, generator=generator)
    direction_P = torch.randn(second + 14, generator=generator)
    rows_KP[2, 5:first] = 0
    rows_KP[3, 5 : 5 + width] = 0
    rows_KP[4] *= 1e18  # nearly the longest that is not rejected
    direction_P[second : second + 4] = 0
    want = [plain_mean(row_P, direction_P, layers) for row_P in rows_KP]
    for lengths in ([6], [1, 4, 1]):
        assert measured(rows_KP, direction_P, layers, lengths) == pytest.approx(want, rel=0, abs=1e-6)


def test_what_the_root_data_do_not_move_is_not_counted() -> None:
    layers = [(slice(0, 4), 2), (slice(4, 8), 2)]
    rows_KP = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 0], [0.0] * 8])
    assert measured(rows_KP, torch.zeros(8), layers, [2]) == [0, 0]
    direction_P = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0])
    assert measured(rows_KP, direction_P, layers, [2]) == [1, 0]


def test_clients_are_judged_by_the_mean_of_both_cosines() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
    labels = torch.arange(60) % 4
    inputs = 2 * torch.eye(12)[labels] + torch.randn(60, 12)
    loss = FlatModel(module, inputs, labels)
    direction_P = root_direction(loss, loss.initial_params, RootTraining(), small_batches=True)
    updates_NP = direction_P + direction_P.std() * torch.randn(9, loss.num_params)
    result = SkyMask(module, inputs, labels).aggregate(updates_NP)
    by_output = [plain_mean(row_P, direction_P, layers_of(module)) for row_P in updates_NP]
    want_K = (result.cosines + torch.tensor(by_output, dtype=torch.float64)) / 2
    torch.testing.assert_close(result.agreement, want_K, rtol=0, atol=1e-6)
    without = SkyMask(nn.BatchNorm1d(12), inputs, torch.randn(60, 12), loss_fn=nn.functional.mse_loss)
    vectors = without.aggregate(0.01 * torch.randn(9, 24))
    assert torch.equal(vectors.agreement, vectors.cosines), "no linear layer"


def test_flipped_labels_stand_out_by_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bold local steps: a few large weights hide in the whole cosine what each output shows."""
    results, aggregate = [], SkyMask.aggregate

    def recorded(*args: Any, **kwargs: Any) -> Aggregation:
        results.append(aggregate(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(SkyMask, "aggregate", recorded)
    config = RunConfig.from_dict(
        {
            "data": {"dataset": "digits", "clients": 50, "bias": 0.5, "root_samples": 100},
            "local": {"steps": 10, "batch_size": 32, "lr": 1.0, "grad_clip": 1.0},
            "attack": {"name": "label-flip", "share": 0.2},
            "defence": {"rule": "skymask"},
        }
    )
    federation = Federation.build(config)
    model = federation.first_model()
    for number in range(4):
        model = federation.play_round(number, model).model
    by_cosine, by_agreement = (
        [_order(getattr(result, name), federation.malicious[result.clients]) for result in results]
        for name in ("cosines", "agreement")
    )
    assert sum(by_agreement) / 4 > sum(by_cosine) / 4 + 0.04


def _order(witness_N: Tensor, bad_N: Tensor) -> float:
    """The share of pairs of an honest client and an attacker that the witness orders rightly."""
    return float((witness_N[~bad_N][:, None] > witness_N[bad_N][None]).double().mean())
