"""Output cosines against a loop over outputs, and what they are there for."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.defence import Aggregation, RootTraining, SkyMask, root_direction
from skymask_gpu.defence.measured import measure
from skymask_gpu.defence.output_cosines import Groups
from skymask_gpu.engine import ClientBlocks, FlatModel
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.federation import Federation, RunConfig

Shapes = dict[str, torch.Size]


def shapes_of(module: nn.Module) -> Shapes:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def plain_mean(update_P: Tensor, direction_P: Tensor, shapes: Shapes) -> float:
    """The mean over linear layers of the mean over outputs of the cosine of their weights, in a loop."""
    by_layer, begin = [], 0
    for shape in shapes.values():
        columns = slice(begin, begin + shape.numel())
        begin += shape.numel()
        if len(shape) != 2:
            continue
        mine, wanted = (vector_P[columns].double().view(shape).tolist() for vector_P in (update_P, direction_P))
        cosines = []
        for weights, along in zip(mine, wanted, strict=True):
            if not any(along):
                continue  # the root data do not move this output
            length = math.hypot(*weights) * math.hypot(*along)
            cosines.append(math.fsum(a * b for a, b in zip(weights, along, strict=True)) / length if length else 0.0)
        if cosines:
            by_layer.append(sum(cosines) / len(cosines))
    return sum(by_layer) / len(by_layer) if by_layer else 0.0


def measured(rows_KP: Tensor, direction_P: Tensor, shapes: Shapes, *lengths: int) -> list[float]:
    blocks = ClientBlocks(list(rows_KP.split(lengths or len(rows_KP))))
    found = measure(blocks, direction_P, torch.ones_like(direction_P), ColumnShards(len(direction_P)), Groups.of(shapes))
    assert found.by_output is not None
    return found.by_output.tolist()


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), Groups((0, 4, 8, 12, 15, 18, 21, 23), ((0, 3), (4, 6)))),
        (nn.Linear(4, 1, bias=False), Groups((0, 4), ((0, 1),))),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(2, 2)), Groups((0, 63, 65, 67, 69), ((1, 3),))),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), Groups((0, 63), ())),
    ],
)
def test_each_output_of_a_linear_layer_is_a_group(module: nn.Module, groups: Groups) -> None:
    assert Groups.of(shapes_of(module)) == groups


@pytest.mark.parametrize(("num_outputs", "width"), [(10, 7), (1, 20), (33, 1)])
def test_cosines_are_those_of_a_loop_however_rows_are_parted(num_outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(num_outputs)
    sizes = {"a": (5,), "b": (num_outputs, width), "c": (2, 1, 2), "d": (3, 4), "e": (2,)}
    shapes = {name: torch.Size(size) for name, size in sizes.items()}
    num_params = sum(shape.numel() for shape in shapes.values())
    rows_KP = torch.randn(6, num_params, generator=generator)
    direction_P = torch.randn(num_params, generator=generator)
    rows_KP[2, 5 : 5 + num_outputs * width] = 0
    rows_KP[3, 5 : 5 + width] = 0
    rows_KP[4] *= 1e17  # nearly the longest that is not rejected
    direction_P[-14:-10] = 0
    want = [plain_mean(row_P, direction_P, shapes) for row_P in rows_KP]
    # The direction's unit vector is rounded to float32.
    for lengths in ((), (1, 4, 1)):
        assert measured(rows_KP, direction_P, shapes, *lengths) == pytest.approx(want, rel=0, abs=1e-6)


def test_what_the_root_data_do_not_move_is_not_counted() -> None:
    shapes = {"a": torch.Size((2, 2)), "b": torch.Size((2, 2))}
    rows_KP = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 0], [0.0] * 8])
    assert measured(rows_KP, torch.zeros(8), shapes) == [0, 0]
    assert measured(rows_KP, torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0]), shapes) == [1, 0]


def test_norms_that_overflow_float32_are_infinite() -> None:
    rows_KP = torch.tensor([[1e19, 1e19], [3e38, 0.0], [1e-30, 0.0], [torch.nan, 0.0]])
    found = measure(ClientBlocks([rows_KP]), torch.ones(2), torch.ones(2), ColumnShards(2), Groups((0, 2), ()))
    assert found.norms[:3].tolist() == pytest.approx([2**0.5 * 1e19, torch.inf, 1e-30])
    assert found.norms[3].isnan()
    assert found.by_output is None


def test_clients_are_judged_by_the_mean_of_both_cosines() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
    labels = torch.arange(60) % 4
    inputs = 2 * torch.eye(12)[labels] + torch.randn(60, 12)
    loss = FlatModel(module, inputs, labels)
    direction_P = root_direction(loss, loss.initial_params, RootTraining(), small_batches=True)
    updates_NP = direction_P + direction_P.std() * torch.randn(9, loss.num_params)
    result = SkyMask(module, inputs, labels).aggregate(updates_NP)
    by_output = [plain_mean(row_P, direction_P, shapes_of(module)) for row_P in updates_NP]
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
