"""What three gloo ranks do together.

Tested are: who holds which columns, sums and gathers, the loss on one rank, and distances.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skymask_gpu.engine import distances, layer_evidence, pack_bits
from skymask_gpu.engine.clustering import sampled
from skymask_gpu.engine.clustering.sampled import SampledDistances
from skymask_gpu.engine.distances import mask_distances, sharded_distances
from skymask_gpu.engine.sharding import ColumnShards, ShardedLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NUM_RANKS, NUM_PARAMS = 3, 11  # 4, 4 and 3 columns


class FakeMesh:
    """Enough of a mesh to say who holds what."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks

    def get_group(self) -> str:
        return "group"

    def get_local_rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._num_ranks


def fake_shards(num_params: int, num_ranks: int) -> list[ColumnShards]:
    return [ColumnShards(num_params, FakeMesh(rank, num_ranks)) for rank in range(num_ranks)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_params", "num_ranks"), [(11, 3), (12, 3), (7, 7), (1001, 8), (5, 1)])
def test_columns_are_divided_as_dtensor_divides_them(num_params: int, num_ranks: int) -> None:
    want = torch.arange(num_params).chunk(num_ranks)
    shards = fake_shards(num_params, num_ranks)
    assert all(torch.equal(s.own(torch.arange(num_params)), w) for s, w in zip(shards, want, strict=True))
    sizes = (2, 0, num_params - 3, 1)
    own_sizes = torch.tensor([s.own_sizes(sizes) for s in shards])
    assert own_sizes.sum(0).tolist() == list(sizes)
    assert own_sizes.sum(1).tolist() == [len(w) for w in want]
    assert (own_sizes >= 0).all()


@pytest.mark.parametrize(("num_params", "num_ranks"), [(2, 3), (9, 4)])
def test_a_rank_without_columns_is_an_error(num_params: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{num_params} columns over {num_ranks} ranks leave one without any"):
        fake_shards(num_params, num_ranks)


def test_one_process_holds_everything_and_sends_nothing() -> None:
    shards, vector = ColumnShards(5), torch.arange(5.0)
    assert shards.gather(vector) is vector
    assert shards.sum(vector) is vector
    assert torch.equal(shards.own(vector), vector)
    assert shards.from_first(lambda: vector, vector) is vector
    assert shards.own_sizes((2, 3)) == (2, 3)


class Loss:
    """Of all parameters together; ``bad`` says what is wrong with it."""

    layer_sizes = (6, 5)

    def __init__(self, bad: str = "") -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, params_P: Tensor) -> Tensor:
        self.calls += 1
        if self.bad == "raises":
            raise ZeroDivisionError("no root data")
        if self.bad == "gradient":  # infinite in the first column alone
            return params_P.sum() + (params_P[0] - params_P[0].detach()).abs().sqrt()
        scale_P = torch.arange(1.0, NUM_PARAMS + 1)
        return math.nan * params_P.sum() if self.bad == "value" else (params_P * scale_P).sin().prod()


def bits_of_rows(num_rows: int, num_params: int) -> Tensor:
    """(R, P) bool, every row unlike the others."""
    return (
        torch.rand(num_rows, num_params, generator=torch.Generator().manual_seed(1))
        < torch.linspace(0.1, 0.9, num_rows)[:, None]
    )


def on_rank(folder: Path, mesh: "DeviceMesh") -> None:
    rank = mesh.get_rank()
    shards = ColumnShards(NUM_PARAMS, mesh)
    params_P = torch.linspace(0.1, 0.7, NUM_PARAMS)
    found: dict[str, Any] = {
        "sum": shards.sum(torch.tensor([rank, 10])),
        "gather": shards.gather(shards.own(params_P)),
        "first": shards.from_first(lambda: torch.full((2,), float(rank) + 7), like=torch.empty(2)),
    }
    for bad in ("", "value", "gradient"):
        loss = Loss(bad)
        own_loss = ShardedLoss(loss, shards)
        own_L = shards.own(params_P).clone().requires_grad_()
        value = own_loss(own_L)
        (grad_L,) = torch.autograd.grad(2 * value, own_L)
        assert loss.calls == (rank == 0), "only the first rank evaluates the loss"
        found |= {f"value{bad}": value.detach(), f"grad{bad}": grad_L, f"sizes{bad}": torch.tensor(own_loss.layer_sizes)}
    try:
        ShardedLoss(Loss("raises"), shards)(shards.own(params_P))
    except (ZeroDivisionError, RuntimeError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")

    flags = bits_of_rows(21, 70_001)
    wide = ColumnShards(flags.shape[1], mesh)
    own_bits = pack_bits(flags[:, wide.columns])
    found["counts"] = sharded_distances(own_bits, wide).stored.clone()
    found["shares"] = layer_evidence(own_bits, torch.arange(20) < 12, list(range(20)), {"a": 30_000, "b": 40_001}, wide).shares
    distances._EXACT_ROWS = 10  # three groups of rows, the last of one
    rounded = sharded_distances(own_bits, wide)
    assert rounded.stored.dtype == torch.uint16
    found["rounded"] = rounded.stored.int() * rounded.unit
    sampled.SAMPLED = 6
    few = SampledDistances.of_masks(own_bits, wide)
    numbers, blocks = zip(*few.to_sample(), strict=True)
    found |= {"drawn": few.clients_S, "alike": few.alike_N, "to sample": torch.cat(blocks)[torch.cat(numbers).argsort()]}
    save_file(found, folder / f"{rank}.safetensors")


@pytest.fixture(scope="module")
def found(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], str]]:
    """What each rank found, and the error it met."""
    folder = tmp_path_factory.mktemp("ranks")
    script = checkout / "tests" / "run_on_ranks.py"
    command = [sys.executable, "-P", script, __file__, folder, f"on_rank:{NUM_RANKS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(load_file(folder / f"{r}.safetensors"), (folder / f"{r}.txt").read_text()) for r in range(NUM_RANKS)]


def test_sums_and_gathers(found: list[tuple[dict[str, Tensor], str]]) -> None:
    params_P = torch.linspace(0.1, 0.7, NUM_PARAMS)
    for got, _ in found:
        assert got["sum"].tolist() == [3, 30]
        assert torch.equal(got["gather"], params_P)
        assert got["first"].tolist() == [7, 7]


def test_the_loss_of_one_rank_is_that_of_all(found: list[tuple[dict[str, Tensor], str]]) -> None:
    params_P = torch.linspace(0.1, 0.7, NUM_PARAMS, requires_grad=True)
    value = Loss()(params_P)
    (grad_P,) = torch.autograd.grad(2 * value, params_P)
    assert all(torch.equal(got["value"], value.detach()) for got, _ in found)
    assert torch.equal(torch.cat([got["grad"] for got, _ in found]), grad_P)
    assert [got["sizes"].tolist() for got, _ in found] == [[4, 0], [2, 2], [0, 3]]


def test_every_rank_notices_what_is_not_finite(found: list[tuple[dict[str, Tensor], str]]) -> None:
    for got, _ in found:
        assert got["valuevalue"].isnan()
        assert got["valuegradient"].isfinite()
        assert got["gradgradient"].isnan().all()


def test_an_error_on_the_first_rank_leaves_no_other_waiting(found: list[tuple[dict[str, Tensor], str]]) -> None:
    first, *others = [error for _, error in found]
    assert first == "ZeroDivisionError: no root data"
    assert others == ["RuntimeError: the first rank of the mesh failed; its own error says why"] * 2


def test_distances_and_evidence_are_those_of_all_columns(
    found: list[tuple[dict[str, Tensor], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = bits_of_rows(21, 70_001)
    bits = pack_bits(flags)
    counts = mask_distances(bits, flags.shape[1]).stored
    evidence = layer_evidence(bits, torch.arange(20) < 12, list(range(20)), {"a": 30_000, "b": 40_001})
    monkeypatch.setattr(distances, "_EXACT_ROWS", 10)
    rounded = mask_distances(bits, flags.shape[1])
    for got, _ in found:
        assert torch.equal(got["counts"], counts)
        assert torch.equal(got["shares"], evidence.shares)
        assert torch.equal(got["rounded"], rounded.stored.int() * rounded.unit), "rounded once, after the sum"
    assert not torch.equal(rounded.stored.int() * 2, counts), "units of two bits"


def test_every_rank_draws_the_same_sample_and_compares_all_columns_with_it(found: list[tuple[dict[str, Tensor], str]]) -> None:
    flags = bits_of_rows(21, 70_001)
    distances_RR = mask_distances(pack_bits(flags), flags.shape[1])
    drawn = found[0][0]["drawn"]
    assert len(drawn) == 6
    want = torch.stack([distances_RR.row(row)[torch.cat([drawn, torch.tensor([20])])] for row in range(21)])
    for got, _ in found:
        assert torch.equal(got["drawn"], drawn)
        assert got["alike"].tolist() == [1] * 20
        assert torch.equal(got["to sample"], want)
