"""SkyMask.aggregate: verdicts on a toy federation, and every row of the table of bad input."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import Clustering, MaskTraining, RootTraining, SkyMask
from skymask_gpu.defence import root_direction
from skymask_gpu.engine import SOLVERS, ClientBlocks, FlatModel, evidence, layer_evidence, pack_bits
from skymask_gpu.engine.solvers import fused

NUM_CLIENTS, NUM_INPUTS, NUM_CLASSES = 20, 8, 3


def toy_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))


def toy_data(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three well-separated heaps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % NUM_CLASSES
    centres = 3 * torch.eye(NUM_INPUTS)[:NUM_CLASSES]
    return centres[labels] + torch.randn(num_samples, NUM_INPUTS, generator=generator), labels


def local_update(module: nn.Module, seed: int, steps: int = 10) -> Tensor:
    """An honest client's update: SGD on its own samples."""
    inputs, labels = toy_data(30, seed)
    names = [name for name, _ in module.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in module.parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in params])
    for _ in range(steps):
        loss = F.cross_entropy(torch.func.functional_call(module, dict(zip(names, params, strict=True)), (inputs,)), labels)
        grads = torch.autograd.grad(loss, params)
        params = [(p - 0.1 * g.clamp(-1e-2, 1e-2)).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
    return torch.cat([p.detach().reshape(-1) for p in params]) - start


MODULE = toy_module()
HONEST_NP = torch.stack([local_update(MODULE, 100 + i) for i in range(NUM_CLIENTS)])
NUM_PARAMS = HONEST_NP.shape[1]


def defence(**settings: Any) -> SkyMask:
    return SkyMask(MODULE, *toy_data(60, 1), **settings)


def poisoned(num_malicious: int = 5) -> Tensor:
    updates_NP = HONEST_NP.clone()
    updates_NP[:num_malicious] *= -1
    return updates_NP


def state_dict(update_P: Tensor) -> dict[str, Tensor]:
    sizes = [p.numel() for p in MODULE.parameters()]
    parts = update_P.split(sizes)
    return {name: part.view(p.shape) for (name, p), part in zip(MODULE.named_parameters(), parts, strict=True)}


def assert_is_mean_rounded_once(got_P: Tensor, rows_KP: Tensor) -> None:
    """A mean in float64 that was then rounded to float32: off by half a unit in the last place.

    The tenth of a per cent and the absolute part are for the float64 sums, with roundings of 1e-16.
    """
    want_P = rows_KP.double().mean(0)
    half_unit = torch.finfo(torch.float32).eps / 2
    sums = 1e-14 * rows_KP.abs().max().item()
    torch.testing.assert_close(got_P.double(), want_P, rtol=1.001 * half_unit, atol=sums)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_attackers_are_rejected_and_the_rest_averaged() -> None:
    updates_NP = poisoned()
    before = updates_NP.clone()
    result = defence().aggregate(updates_NP)
    assert result.benign.tolist() == [False] * 5 + [True] * 15
    assert sorted(result.rejected) == [0, 1, 2, 3, 4]
    assert all("keep share" in reason for reason in result.rejected.values())
    assert_is_mean_rounded_once(result.update, updates_NP[5:])
    assert result.factors.tolist() == [0.0] * 5 + [1.0] * 15
    assert torch.equal(updates_NP, before), "the caller's tensor must stay as it is"
    assert result.masks.bits.shape == (NUM_CLIENTS + 1, math.ceil(NUM_PARAMS / 8))
    assert result.clusters.scores.shape == (NUM_CLIENTS + 1, 2)
    assert set(result.seconds) == {"collect", "root", "clustering", "average", "total", "mask_training"}


@pytest.mark.parametrize("rule", ["signed", "two-stage", "published"])
def test_honest_clients_stay_where_most_clients_send_zeros(rule: Literal["signed", "two-stage", "published"]) -> None:
    """The median of all norms is 0. Scaled to it, the root's row would be 0, too."""
    updates_NP = torch.cat([HONEST_NP, torch.zeros(25, NUM_PARAMS)])
    assert defence(clustering=Clustering(rule=rule)).aggregate(updates_NP).benign[:NUM_CLIENTS].all()


def test_copies_are_found_where_most_clients_send_zeros() -> None:
    updates_NP = torch.cat([HONEST_NP, torch.zeros(25, NUM_PARAMS)])
    updates_NP[:5] = -HONEST_NP[0]
    result = defence().aggregate(updates_NP)
    assert result.benign.tolist() == [False] * 5 + [True] * (NUM_CLIENTS + 20)
    assert result.clusters.reason.startswith("5 masks are copies")
    assert_is_mean_rounded_once(result.update, updates_NP[5:])


def test_without_an_attack_everyone_is_kept_and_the_result_is_the_mean() -> None:
    result = defence().aggregate(HONEST_NP)
    assert result.benign.all()
    assert not result.rejected
    assert result.factors.tolist() == [1.0] * NUM_CLIENTS
    assert result.clusters.num_clusters == 1
    assert_is_mean_rounded_once(result.update, HONEST_NP)


def test_calling_gives_the_vector_alone() -> None:
    skymask = defence()
    assert torch.equal(skymask(poisoned()), skymask.aggregate(poisoned()).update)


def test_state_dicts_and_stacked_updates_are_the_same() -> None:
    stacked = defence().aggregate(poisoned())
    listed = defence().aggregate([state_dict(row) for row in poisoned()])
    assert torch.equal(listed.update, stacked.update)
    assert torch.equal(listed.benign, stacked.benign)


def test_blocks_in_memory_and_on_disk_are_judged_like_one_tensor(tmp_path: Path) -> None:
    updates_NP = poisoned()
    updates_NP[7, 3] = math.nan
    for number, block in enumerate(updates_NP.split(6)):
        save_file({"updates": block.contiguous()}, tmp_path / f"{number}.safetensors")
    want = defence(solver="collapsed").aggregate(updates_NP)
    assert want.benign.tolist() == [False] * 5 + [True] * 2 + [False] + [True] * 12
    for blocks in (ClientBlocks(updates_NP.split(6)), ClientBlocks.from_folder(tmp_path)):
        result = defence(solver="collapsed").aggregate(blocks)
        assert torch.equal(result.benign, want.benign)
        assert result.rejected == want.rejected
        assert torch.equal(result.masks.bits, want.masks.bits)
        assert_is_mean_rounded_once(result.update, updates_NP[want.benign])
    assert defence().aggregate(ClientBlocks.from_folder(tmp_path)).masks.solver == "collapsed"


def test_state_dicts_that_are_read_when_needed_are_judged_like_a_list() -> None:
    states = [state_dict(row) for row in poisoned()]
    del states[9]["0.bias"]

    class Files(Sequence):
        reads = 0

        def __len__(self) -> int:
            return len(states)

        def __getitem__(self, client: Any) -> Any:
            Files.reads += 1
            return states[client]

    want = defence(solver="collapsed").aggregate(states)
    result = defence().aggregate(Files())
    assert result.masks.solver == "collapsed"
    assert Files.reads > 3 * len(states), "read for each pass, not kept"
    assert result.rejected == want.rejected
    assert result.rejected[9] == "its state dict lacks 0.bias"
    assert_is_mean_rounded_once(result.update, poisoned()[want.benign])


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_give_the_same_verdict(solver: str) -> None:
    result = defence(solver=solver).aggregate(poisoned())
    assert result.masks.solver == solver
    assert result.benign.tolist() == [False] * 5 + [True] * 15


def test_bfloat16_updates_give_the_same_verdict() -> None:
    result = defence().aggregate(poisoned().bfloat16())
    assert result.benign.tolist() == [False] * 5 + [True] * 15
    assert result.update.dtype == torch.float32


def test_a_root_row_trained_like_a_client_is_used() -> None:
    root_update = local_update(MODULE, 1)
    given_root = defence().aggregate(poisoned(), root_update=root_update)
    own_root = defence().aggregate(poisoned())
    assert torch.equal(given_root.benign, own_root.benign)
    assert not torch.equal(given_root.masks.bits[-1], own_root.masks.bits[-1])


def test_each_clients_keep_share_and_cosine_with_the_root_direction_are_told() -> None:
    updates_NP = poisoned()
    updates_NP[6, 0] = torch.nan  # a client without a mask has neither
    updates_NP[8] = 0
    skymask = defence()
    result = skymask.aggregate(updates_NP)
    assert result.clients.tolist() == [client for client in range(len(updates_NP)) if client != 6]
    assert torch.equal(result.keep_share, result.masks.keep_share()[:-1])
    loss = FlatModel(MODULE, *toy_data(60, 1))
    direction_P = root_direction(loss, loss.initial_params, RootTraining()).double()
    rows_KP = updates_NP[result.clients].double()
    want_K = torch.nn.functional.cosine_similarity(rows_KP, direction_P[None], dim=1)
    # float32 sums of P products, each of at most the product of the two lengths
    torch.testing.assert_close(result.cosines, want_K, rtol=0, atol=NUM_PARAMS * torch.finfo(torch.float32).eps)
    assert result.cosines[7] == 0, "an update of zeros has no direction"


def test_the_root_direction_goes_through_its_batches_in_turn() -> None:
    inputs, labels = toy_data(155, 1)
    loss, settings = FlatModel(MODULE, inputs, labels), RootTraining(steps=7)
    order = torch.randperm(155, generator=torch.Generator().manual_seed(0))
    params_P = loss.initial_params
    # 155 samples give three batches of at least 50
    parts = (order[:52], order[52:104], order[104:])
    for part in (*parts, *parts, parts[0]):
        leaf_P = params_P.clone().requires_grad_()
        (grad_P,) = torch.autograd.grad(FlatModel(MODULE, inputs[part], labels[part])(leaf_P), leaf_P)
        params_P = params_P - settings.lr * grad_P.clamp(-settings.grad_clip, settings.grad_clip)
    direction_P = root_direction(loss, loss.initial_params, settings, small_batches=True)
    torch.testing.assert_close(direction_P, params_P - loss.initial_params)


def test_a_round_costs_the_mask_steps_and_ten_passes_unless_the_rule_trusts_the_roots_row() -> None:
    passed: list[int] = []

    class Counting(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            passed.append(len(inputs))
            return super().forward(inputs)

    # For the root direction, 20 small batches if nobody trusts it as the root's row.
    for rule, root_update, samples in (
        ("signed", None, 50),
        ("signed", local_update(MODULE, 1), 50),
        ("two-stage", None, 100),
        ("two-stage", local_update(MODULE, 1), 50),
        ("published", None, 100),
    ):
        clustering = Clustering(rule=rule)
        skymask = SkyMask(Counting(*toy_module()), *toy_data(100, 1), training=MaskTraining(steps=4), clustering=clustering)
        passed.clear()
        assert skymask.aggregate(HONEST_NP, root_update=root_update).masks.steps == 4
        assert passed == 20 * [samples] + 4 * [100]


def test_global_params_default_to_the_modules() -> None:
    params = nn.utils.parameters_to_vector(MODULE.parameters()).detach()
    a, b = defence().aggregate(poisoned()), defence().aggregate(poisoned(), global_params=params)
    assert torch.equal(a.masks.bits, b.masks.bits)
    moved = defence().aggregate(poisoned(), global_params=params + 0.5)
    assert not torch.equal(a.masks.bits, moved.masks.bits)


def test_the_published_rule_can_be_asked_for() -> None:
    result = defence(clustering=Clustering(rule="published")).aggregate(poisoned())
    assert result.benign.tolist() == [False] * 5 + [True] * 15


def test_evidence_points_at_the_layer_that_was_poisoned() -> None:
    updates_NP = HONEST_NP.clone()
    sizes = [p.numel() for p in MODULE.parameters()]
    names = [name for name, _ in MODULE.named_parameters()]
    begin = sum(sizes[:2])
    poisoned_layer = names[2]
    updates_NP[:5, begin : begin + sizes[2]] *= -1
    result = defence().aggregate(updates_NP)
    assert result.benign.tolist() == [False] * 5 + [True] * 15
    evidence = result.evidence()
    assert evidence.shares.shape == (NUM_CLIENTS, 4)
    assert evidence.layers == names
    attackers, honest = evidence.shares[:5].mean(0), evidence.shares[5:].mean(0)
    assert names[int(attackers.argmax())] == poisoned_layer
    assert attackers[2] > 2 * honest[2]
    assert attackers[2] > 1.5 * attackers[[0, 1]].max()


def test_evidence_counts_bits_unlike_the_benign_majority() -> None:
    flags = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)  # root last
    evidence = layer_evidence(pack_bits(flags), torch.tensor([False, True, True]), [4, 7, 9], {"a": 2, "b": 3})
    # varying: column 0 of a; columns 2, 3 and 4 of b
    assert evidence.varying == [1, 3]
    assert evidence.shares.tolist() == [[1.0, 1 / 3], [0.0, 0.0], [0.0, 0.0]]
    assert evidence.clients == [4, 7, 9]


def test_batch_norm_statistics_are_averaged_over_the_benign_clients() -> None:
    module = nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    updates = []
    for client in range(12):
        row = local_update(module, client)
        sign = -1 if client < 3 else 1
        sizes = [p.numel() for p in module.parameters()]
        state = {n: sign * part.view(p.shape) for (n, p), part in zip(module.named_parameters(), row.split(sizes), strict=True)}
        state["1.running_mean"] = torch.full((16,), float(client))
        state["1.running_var"] = torch.ones(16)
        state["1.num_batches_tracked"] = torch.tensor(client)
        updates.append(state)
    skymask = SkyMask(module, *toy_data(60, 1))
    result = skymask.aggregate(updates)
    kept = [float(i) for i in result.benign.nonzero().flatten()]
    assert result.buffers["1.running_mean"].tolist() == [pytest.approx(sum(kept) / len(kept))] * 16
    assert result.buffers["1.num_batches_tracked"] == sorted(kept)[len(kept) // 2]
    named = result.state_dict()
    assert {name: value.shape for name, value in named.items()} == {n: v.shape for n, v in module.state_dict().items()}
    assert all(torch.equal(named[name], value) for name, value in result.buffers.items())
    assert torch.equal(torch.cat([named[name].flatten() for name, _ in module.named_parameters()]), result.update)
    # client i has i + 1 samples, but the last one says that it has none
    weights = [*range(1, 12), 0]
    result = skymask.aggregate(updates, weights=weights)
    want = sum(weights[int(i)] * i for i in kept) / sum(weights[int(i)] for i in kept)
    assert result.buffers["1.running_mean"].tolist() == [pytest.approx(want)] * 16


def test_a_variance_below_zero_is_rejected_by_name() -> None:
    module = nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    updates = [{name: torch.zeros_like(value) for name, value in module.state_dict().items()} for _ in range(5)]
    for client, update in enumerate(updates):
        update["0.weight"] = 0.1 * local_update(module, client)[: 16 * NUM_INPUTS].view(16, NUM_INPUTS)
    updates[2]["1.running_var"] = torch.full((16,), -1e-6)
    result = SkyMask(module, *toy_data(60, 1)).aggregate(updates)
    assert result.rejected[2] == "1.running_var contains variances below 0"


# --- the table of bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_rejected_and_the_round_goes_on(value: float) -> None:
    updates_NP = poisoned()
    updates_NP[7, 3] = value
    result = defence().aggregate(updates_NP)
    assert result.rejected[7] == f"its update contains NaN or Inf (1 of {NUM_PARAMS} values)"
    without = defence().aggregate(torch.cat([updates_NP[:7], updates_NP[8:]]))
    assert torch.equal(result.update, without.update)
    assert torch.equal(result.masks.bits, without.masks.bits)
    assert result.clients.tolist() == [i for i in range(NUM_CLIENTS) if i != 7]


def test_more_than_half_rejected_this_way_is_a_warning() -> None:
    updates_NP = HONEST_NP.clone()
    updates_NP[:11] = torch.nan
    with pytest.warns(UserWarning, match="11 of 20 clients sent an unusable update"):
        result = defence().aggregate(updates_NP)
    assert result.benign.tolist() == [False] * 11 + [True] * 9


def test_nobody_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"updates: none of 20 clients sent a usable update; .*NaN or Inf"):
        defence().aggregate(torch.full((NUM_CLIENTS, NUM_PARAMS), torch.nan))
    with pytest.raises(ValueError, match=r"updates: none of 2 clients .* lacks 0\.weight"):
        defence().aggregate([{}, {}])


def _without_a_key(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "2.bias"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_a_key, "its state dict lacks 2.bias"),
        (lambda s: {**s, "head.weight": torch.zeros(1)}, "its state dict has unknown head.weight"),
        (lambda s: {**s, "2.bias": torch.zeros(7)}, "2.bias must have shape (3,), got (7,)"),
        (lambda s: {**s, "2.bias": torch.zeros(3, dtype=torch.int64)}, "2.bias must be floating point, got torch.int64"),
        (lambda s: {**s, "2.bias": [0.0, 0.0, 0.0]}, "2.bias is a list instead of a tensor"),
        (
            lambda s: {**s, "2.bias": torch.zeros(3, dtype=torch.complex64)},
            "2.bias must be floating point, got torch.complex64",
        ),
        (lambda s: {**s, "2.bias": torch.zeros(3).to(torch.float8_e4m3fn)}, "2.bias must be floating point, got torch.float8"),
        (lambda s: {**s, "2.bias": torch.zeros(3).to_sparse()}, "2.bias must be a plain dense tensor, got a torch.sparse_coo"),
        (lambda s: {**s, "2.bias": torch.zeros(3, device="meta")}, "2.bias must be a plain dense tensor, got a meta tensor"),
        (lambda s: {**s, "2.bias": torch.full((3,), torch.nan)}, f"its update contains NaN or Inf (3 of {NUM_PARAMS} values)"),
        (lambda s: {**s, "2.bias": torch.full((3,), 1e300, dtype=torch.float64)}, "its update contains NaN or Inf"),
        (lambda s: None, "sent a NoneType instead of a state dict"),
    ],
    ids=["missing", "unknown", "shape", "integer", "list", "complex", "float8", "sparse", "meta", "nan", "overflow", "none"],
)
def test_a_malformed_state_dict_is_rejected_and_the_round_goes_on(spoil: Callable[[Any], Any], reason: str) -> None:
    states = [state_dict(row) for row in poisoned()]
    states[9] = spoil(states[9])
    result = defence().aggregate(states)
    assert result.rejected[9].startswith(reason)
    assert result.benign.tolist() == [False] * 5 + [i != 4 for i in range(15)]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (torch.zeros(4, 9), rf"updates must have shape \(N, {NUM_PARAMS}\) .* got \(4, 9\)"),
        (torch.zeros(NUM_PARAMS), rf"updates must have shape \(N, {NUM_PARAMS}\)"),
        (torch.zeros(0, NUM_PARAMS), "with N >= 1 clients"),
        (
            torch.zeros(4, NUM_PARAMS, dtype=torch.float64),
            r"must be float32 or bfloat16, got torch\.float64; cast with",
        ),
        (torch.zeros(4, NUM_PARAMS, dtype=torch.int32), r"updates must be float32 or bfloat16, got torch\.int32"),
        ([], "updates must hold at least one client's update"),
        ("updates.pt", r"updates must be an \(N, P\) tensor or array, ClientBlocks, or a list .* per client, got str"),
        (None, "got NoneType"),
    ],
    ids=["wrong-P", "one-dimensional", "empty", "float64", "integer", "no-dicts", "string", "none"],
)
def test_updates_that_do_not_fit_are_an_error_before_any_work(
    updates: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skymask_gpu.defence.ahead.train_direction", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        defence().aggregate(updates)


def test_mixed_devices_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"global_params must be on cpu like updates, got meta; move it with \.to"):
        defence().aggregate(poisoned(), global_params=torch.zeros(NUM_PARAMS, device="meta"))
    with pytest.raises(ValueError, match="root_update must be on cpu like updates, got meta"):
        defence().aggregate(poisoned(), root_update=torch.zeros(NUM_PARAMS, device="meta"))


@pytest.mark.parametrize("value", [1e30, -3e38])
def test_a_huge_update_is_rejected_and_the_others_are_as_if_it_had_not_been_there(value: float) -> None:
    updates_NP = poisoned()
    updates_NP[7] = value
    result = defence().aggregate(updates_NP)
    assert result.rejected[7] == "its update is so large that its norm overflows float32"
    without = defence().aggregate(torch.cat([updates_NP[:7], updates_NP[8:]]))
    assert torch.equal(result.masks.bits, without.masks.bits)
    assert torch.equal(result.update, without.update)


def test_huge_updates_of_most_clients_are_rejected() -> None:
    updates_NP = HONEST_NP.clone()
    updates_NP[:16] = 1e30
    updates_NP[:8] *= -1  # they cancel in the mean
    result = defence().aggregate(updates_NP)
    assert result.benign.tolist() == [False] * 16 + [True] * 4


def test_a_huge_bias_that_leaves_the_loss_finite_is_rejected_for_its_norm() -> None:
    updates_NP = poisoned()
    updates_NP[7] = 0
    updates_NP[7, -NUM_CLASSES:] = 1e30  # equal logits: the loss is log 3
    assert defence().aggregate(updates_NP).rejected[7] == "its update is so large that its norm overflows float32"


class Scaled(nn.Module):
    """Logits times an exponential, as in CLIP: a short update can drive the loss out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_INPUTS, NUM_CLASSES)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * (20 * self.scale).exp()


@pytest.mark.parametrize("num_malicious", [1, 3, 5])
def test_short_updates_that_drive_the_loss_out_of_range_are_rejected(num_malicious: int) -> None:
    module = Scaled()
    honest_NP = torch.stack([local_update(module, i) for i in range(12)])
    names = [name for name, _ in module.named_parameters()]
    at = names.index("scale")
    column = sum(p.numel() for p in list(module.parameters())[:at])
    for size in (6.0, 1000.0):
        updates_NP = honest_NP.clone()
        updates_NP[:num_malicious, column] += size
        result = SkyMask(module, *toy_data(60, 1)).aggregate(updates_NP)
        for client in range(num_malicious):
            too_long = "its update is more than ten times as long as the model and as the median update"
            assert result.rejected[client].startswith("its update drives" if size < 100 else too_long)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e18])
def test_an_update_that_is_far_too_long_is_rejected_and_changes_nothing_for_the_others(size: int) -> None:
    updates_NP = poisoned()
    others = defence().aggregate(updates_NP[:-1])
    updates_NP[-1] *= size / torch.linalg.vector_norm(updates_NP[-1])
    result = defence().aggregate(updates_NP)
    assert "ten times as long" in result.rejected[NUM_CLIENTS - 1]
    assert torch.equal(result.benign[:-1], others.benign)
    torch.testing.assert_close(result.update, others.update)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_buffers_that_one_kept_client_makes_up_do_not_decide_the_model(name: str) -> None:
    module = nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    states = []
    for client in range(12):
        trained = copy.deepcopy(module)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(module.parameters()) + local_update(copy.deepcopy(module), client),
            trained.parameters(),
        )
        for _ in range(3):
            trained(toy_data(30, client)[0])
        states.append(trained.state_dict())
    skymask = SkyMask(module, *toy_data(60, 1))
    honest = skymask.aggregate(states, local_models=True)
    made_up = states[11][f"1.{name}"]
    states[11] = {**states[11], f"1.{name}": torch.full_like(made_up, 10**6)}
    result = skymask.aggregate(states, local_models=True)
    assert result.benign[11]
    assert torch.equal(result.benign, honest.benign)
    values = torch.stack([states[client][f"1.{name}"].double() for client in result.benign.nonzero().flatten().tolist()])
    middle = values.quantile(0.5, dim=0)
    reach = 10 * 1.4826 * (values - middle).abs().quantile(0.5, dim=0)
    expected = values.clamp(middle - reach, middle + reach).mean(0) if made_up.is_floating_point() else middle
    torch.testing.assert_close(result.buffers[f"1.{name}"].double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected < 1000).all()


def test_updates_that_are_harmless_alone_but_not_together_are_rejected() -> None:
    updates_NP = HONEST_NP.clone()
    first, last = 16 * NUM_INPUTS, 16 * NUM_CLASSES + NUM_CLASSES
    updates_NP[3, :first] = 1e19 / 16  # huge hidden units
    updates_NP[4, -last:-NUM_CLASSES] = 1e19 / 16  # times huge weights
    updates_NP[4, -NUM_CLASSES:] = 0
    result = defence().aggregate(updates_NP)
    assert torch.isfinite(result.update).all()
    assert not result.benign[3]
    assert not result.benign[4]


@pytest.mark.parametrize("num_clients", [1, 2])
def test_fewer_than_three_clients_are_all_kept(num_clients: int) -> None:
    result = defence().aggregate(poisoned()[:num_clients])
    assert result.benign.all()
    assert result.clusters.num_clusters == 1


@pytest.mark.parametrize("row", [HONEST_NP[0], torch.zeros(NUM_PARAMS)], ids=["equal", "zero"])
def test_equal_updates_are_all_kept(row: Tensor) -> None:
    result = defence().aggregate(row.expand(6, -1))
    assert result.benign.all()
    assert result.clusters.num_clusters == 1
    torch.testing.assert_close(result.update, row)


def test_equal_masks_are_all_kept() -> None:
    """Steps too small to move any logit across the threshold."""
    result = defence(training=MaskTraining(lr=1e-3)).aggregate(poisoned())
    assert result.benign.all()
    assert result.clusters.num_clusters == 1
    assert result.clusters.reason == "all masks are equal: all kept"


def test_without_a_trusted_root_there_is_no_verdict() -> None:
    inputs, labels = toy_data(60, 1)
    with pytest.raises(ValueError, match="root_inputs and root_labels must have the same number of samples, at least 1"):
        SkyMask(MODULE, inputs[:0], labels[:0])
    with pytest.raises(ValueError, match="root_inputs and root_labels must be finite"):
        SkyMask(MODULE, inputs * torch.nan, labels)
    with pytest.raises(ValueError, match="root_update must be finite"):
        defence().aggregate(poisoned(), root_update=torch.full((NUM_PARAMS,), torch.nan))
    with pytest.raises(ValueError, match=rf"root_update must have shape \({NUM_PARAMS},\)"):
        defence().aggregate(poisoned(), root_update=torch.zeros(3))
    with pytest.raises(ValueError, match="global_params: the loss of the global model on the root data is nan"):
        defence().aggregate(poisoned(), global_params=torch.full((NUM_PARAMS,), torch.nan))
    with pytest.raises(ValueError, match=rf"global_params must have shape \({NUM_PARAMS},\)"):
        defence().aggregate(poisoned(), global_params=torch.zeros(3))
    with pytest.raises(ValueError, match=r"RootTraining\.lr must"):
        RootTraining(lr=0)


def test_out_of_memory_in_the_evidence_shrinks_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking more than 256 columns at a time fails; the evidence is the same."""
    module = nn.Sequential(nn.Linear(NUM_INPUTS, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES))
    updates_NP = torch.stack([local_update(module, i) * (-1 if i < 3 else 1) for i in range(12)])
    result = SkyMask(module, *toy_data(60, 1)).aggregate(updates_NP)
    want = result.evidence()
    unpack = evidence.unpack_bits

    def small_memory(bits: Tensor, num_params: int) -> Tensor:
        if num_params > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unpack(bits, num_params)

    monkeypatch.setattr(evidence, "unpack_bits", small_memory)
    assert torch.equal(result.evidence().shares, want.shares)


def test_out_of_memory_in_training_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "first_step", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"solver 'fused' on 21 rows .* MiB beyond the updates; pass"):
        defence().aggregate(poisoned())


def test_a_solver_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.engine.choice.why_not_solver", lambda *_: "numba is not installed")
    with pytest.raises(ValueError, match="solver 'fused' cannot run here: numba is not installed"):
        defence(solver="fused").aggregate(poisoned())


# --- anything at all ----------------------------------------------------------------------------------------------------

TINY = nn.Linear(2, 2)
TINY_PARAMS = 6
numbers = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-40, 1e-38, 3.4e38, -3.4e38, 1e19, -1e30]),
)
shapes = st.one_of(
    st.tuples(st.integers(1, 7), st.just(TINY_PARAMS)),
    st.tuples(st.integers(0, 4), st.integers(0, 8)),
    st.tuples(st.integers(0, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
)
dtypes = st.sampled_from([torch.float32] * 6 + [torch.bfloat16] * 3 + [torch.float16, torch.float64, torch.int64, torch.bool])


@st.composite
def any_updates(draw: st.DrawFn) -> Tensor:
    shape = draw(shapes)
    size = math.prod(shape)
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    tensor = torch.tensor(values, dtype=torch.float32).reshape(shape)
    dtype = draw(dtypes)
    return (tensor.nan_to_num(0, 1, -1) if dtype in (torch.int64, torch.bool) else tensor).to(dtype)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(updates=any_updates())
@pytest.mark.filterwarnings("ignore:.*unusable update")
def test_any_updates_give_a_finite_verdict_or_an_error_that_names_them(updates: Tensor) -> None:
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]])
    skymask = SkyMask(TINY, inputs, torch.tensor([0, 1, 0, 1]), root_training=RootTraining(steps=3))
    before = updates.clone()
    try:
        result = skymask.aggregate(updates)
    except ValueError as error:
        assert "updates" in str(error)
    else:
        assert torch.isfinite(result.update).all()
        assert result.benign.any()
        assert set(result.rejected) == set((~result.benign).nonzero().flatten().tolist())
        assert torch.isfinite(result.clusters.scores).all()
    assert torch.equal(updates.nan_to_num(7.0) if updates.is_floating_point() else updates,
                       before.nan_to_num(7.0) if before.is_floating_point() else before)  # fmt: skip


def test_the_model_is_compiled_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    module, inputs, labels = torch.nn.Linear(4, 3), torch.randn(9, 4), torch.arange(9) % 3
    SkyMask(module, inputs, labels)
    assert not compiled
    SkyMask(module, inputs, labels, compile=True)
    assert len(compiled) == 1
