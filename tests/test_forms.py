"""The forms in which updates may come: each is judged bit for bit like the ``(N, P)`` tensor, hostile rows by name."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu import Aggregation, RootTraining, SkyMask
from skymask_gpu.defence import root_direction
from skymask_gpu.defence.suspicion import suspicion
from skymask_gpu.engine import FlatModel

NUM_CLIENTS = 12
LABELS = torch.arange(60) % 3
INPUTS = 3 * torch.eye(8)[LABELS] + torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


MODULE = net()
FLAT = FlatModel(MODULE, INPUTS, LABELS)
NAMES = list(FLAT.shapes)
P = FLAT.num_params
BUFFERS = {name: value.clone() for name, value in MODULE.named_buffers()}


def sent_updates() -> Tensor:
    """Clients that learnt what the root learns, but for noise; the first two send the opposite."""
    learnt_P = root_direction(FLAT, FLAT.initial_params, RootTraining())
    noise_NP = torch.randn(NUM_CLIENTS, P, generator=torch.Generator().manual_seed(1))
    updates_NP = learnt_P + 0.5 * learnt_P.std() * noise_NP
    updates_NP[:2] *= -2
    return updates_NP


UPDATES = sent_updates()


def arrays(row_P: Tensor) -> list[np.ndarray]:
    return [value.numpy() for value in FLAT.unflatten(row_P).values()]


def whole_state(row_P: Tensor) -> list[np.ndarray]:
    """What a Flower client makes of its module's state dict, in its order, counters included."""
    named = {**FLAT.unflatten(row_P), **BUFFERS}
    return [named[name].numpy() for name in MODULE.state_dict()]


class ReadAnew(Sequence):
    """A sequence that is no list, which the defence reads whenever it needs an entry."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        return self.entries[index]


ONE_BY_ONE: dict[str, Callable[[Tensor], Any]] = {
    "rows": lambda row_P: row_P.clone(),
    "strided rows": lambda row_P: torch.stack([row_P, row_P], 1)[:, 0],
    "arrays": lambda row_P: row_P.numpy(),
    "float64 arrays": lambda row_P: row_P.numpy().astype(np.float64),
    "big-endian arrays": lambda row_P: row_P.numpy().astype(">f4"),
    "reversed arrays": lambda row_P: row_P.numpy()[::-1].copy()[::-1],
    "state dicts of arrays": lambda row_P: dict(zip(NAMES, arrays(row_P), strict=True)),
    "Flower's arrays": arrays,
    "tuples of tensors": lambda row_P: tuple(FLAT.unflatten(row_P).values()),
    "Flower's whole state": whole_state,
}


def one_by_one(one: Callable[[Tensor], Any]) -> Callable[[Tensor], list[Any]]:
    return lambda updates_NP: [one(row_P) for row_P in updates_NP]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda updates_NP: updates_NP.numpy().copy(),
    "float64 array": lambda updates_NP: updates_NP.numpy().astype(np.float64),
    "Fortran array": lambda updates_NP: np.asfortranarray(updates_NP.numpy()),
    **{name: one_by_one(one) for name, one in ONE_BY_ONE.items()},
    "read anew": lambda updates_NP: ReadAnew([arrays(row) for row in updates_NP]),
}


def judged(updates: Any, **arguments: Any) -> Aggregation:
    """By the solver that takes rows from anywhere: one in memory would get other bits from the exact solver."""
    return SkyMask(MODULE, INPUTS, LABELS, solver="collapsed").aggregate(updates, **arguments)


@pytest.fixture(scope="module")
def plain() -> Aggregation:
    return judged(UPDATES)


def assert_same(got: Aggregation, want: Aggregation) -> None:
    assert torch.equal(got.benign, want.benign)
    assert torch.equal(got.update, want.update)
    assert torch.equal(got.masks.bits, want.masks.bits)
    assert got.rejected == want.rejected


def test_the_tensor_is_judged_as_expected(plain: Aggregation) -> None:
    assert list(plain.rejected) == [0, 1]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_judged_like_the_tensor(form: str, plain: Aggregation) -> None:
    result = judged(FORMS[form](UPDATES))
    assert_same(result, plain)
    assert set(result.buffers) == (set(BUFFERS) if form == "Flower's whole state" else set())


def test_an_array_that_must_not_be_written_to_is_left_alone(plain: Aggregation, recwarn: pytest.WarningsRecorder) -> None:
    array = UPDATES.numpy().copy()
    array.flags.writeable = False
    assert_same(judged(array), plain)
    assert_same(judged(list(array)), plain)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("form", [*ONE_BY_ONE, "array"])
def test_nan_is_rejected_by_name_in_every_form(form: str) -> None:
    spoilt = UPDATES.clone()
    spoilt[5, 7] = torch.nan
    result = judged(FORMS[form](spoilt))
    assert result.rejected[5] == f"its update contains NaN or Inf (1 of {P} values)"
    assert list(result.rejected) == [0, 1, 5]


FORGED = np.broadcast_to(np.float32(0), (10**12,))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (torch.zeros(P - 1), rf"its update must have shape ({P},), got ({P - 1},)"),
        (torch.zeros(1, P), rf"its update must have shape ({P},), got (1, {P})"),
        (torch.zeros(P, dtype=torch.int64), "its update must be floating point, got torch.int64"),
        (torch.zeros(P).to_sparse(), "its update must be a plain dense tensor, got a torch.sparse_coo tensor"),
        (torch.zeros(P, device="meta"), "its update must be a plain dense tensor, got a meta tensor"),
        (np.zeros(P - 1), rf"its update must have shape ({P},), got ({P - 1},)"),
        (np.zeros(P, np.int64), "its update must be floating point, got torch.int64"),
        (np.zeros(P, np.complex64), "its update must be floating point, got torch.complex64"),
        (np.array([None] * P), "its update must be floating point, got object"),
        (np.array(["1"] * P), "its update must be floating point, got <U1"),
        (np.zeros(P, np.longdouble), f"its update must be floating point, got {np.dtype(np.longdouble)}"),
        (FORGED, f"its update must have shape ({P},), got (1000000000000,)"),
        (dict.fromkeys(NAMES, FORGED), "0.weight must have shape (6, 8), got (1000000000000,)"),
        ({**dict.fromkeys(NAMES, np.zeros(3)), "3.bias": object}, "0.weight must have shape (6, 8), got (3,)"),
        (dict(zip(NAMES[1:], arrays(UPDATES[0])[1:], strict=True)), "its state dict lacks 0.weight"),
        ({**dict(zip(NAMES, arrays(UPDATES[0]), strict=True)), "x": np.zeros(3)}, "its state dict has unknown x"),
        (arrays(UPDATES[0])[1:], "sent a list of 5 arrays instead of 6, one for each trainable parameter in order, or 9"),
        (arrays(UPDATES[0])[::-1], "0.weight must have shape (6, 8), got (3,)"),
        ([0.0] * P, f"sent a list of {P} arrays instead of 6"),
        ([*arrays(UPDATES[0])[:5], "bias"], "3.bias is a str instead of a tensor"),
        (0.5, "sent a float instead of a state dict"),
        ("weights", "sent a str instead of a state dict"),
    ],
    ids=repr,
)
def test_a_hostile_entry_is_rejected_by_name(entry: Any, reason: str) -> None:
    # no masks: the reason is found before
    from skymask_gpu.defence.parse import parse

    clients = parse([*UPDATES[:3], entry, *arrays_of_the_rest()], FLAT, MODULE, None)
    assert list(clients.rejected) == [3]
    assert clients.rejected[3].startswith(reason)
    assert len(clients.rows) == NUM_CLIENTS - 1


def arrays_of_the_rest() -> list[list[np.ndarray]]:
    return [arrays(row) for row in UPDATES[4:]]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (np.zeros((4, 9)), rf"updates must have shape \(N, {P}\) .* got \(4, 9\)"),
        (np.zeros((4, P), np.int64), "updates must be an array of floating-point numbers, got dtype int64"),
        (np.zeros((4, P), object), "updates must be an array of floating-point numbers, got dtype object"),
        (np.zeros((0, P)), "with N >= 1 clients"),
        (arrays(UPDATES[0]), r"none of 6 clients sent a usable update; the first one: its update must have shape"),
        ((row for row in UPDATES), "updates must be an .* got generator"),
    ],
    ids=["wrong-P", "integers", "objects", "empty", "one-client", "generator"],
)
def test_updates_that_do_not_fit_as_a_whole_are_an_error(updates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(updates)


def test_peft_saves_names_without_the_adapters_and_they_are_known() -> None:
    """Stand-ins with the names of PEFT's layers; ``tests/engine/test_frozen_bases.py`` has the real package."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 3).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

        def forward(self, inputs: Tensor) -> Tensor:
            return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))

    module = nn.ModuleDict({"layer": Adapted()})
    module.forward = module["layer"].forward  # type: ignore[method-assign]
    defence = SkyMask(module, INPUTS, LABELS, solver="collapsed")
    rows_NP = 0.1 * torch.randn(5, 22, generator=torch.Generator().manual_seed(2))
    flat = defence.settings.flat
    saved = [{name.replace(".default", ""): value for name, value in flat.unflatten(row).items()} for row in rows_NP]
    assert "layer.lora_A.weight" in saved[0]
    assert_same(defence.aggregate(saved), defence.aggregate(rows_NP))
    saved[3]["layer.lora_C.weight"] = torch.zeros(3)
    assert defence.aggregate(saved).rejected[3] == "its state dict has unknown layer.lora_C.weight"


class Counting(nn.Sequential):
    """It puts a dict into its state dict, as modules with a state beside their tensors do."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 3}


@pytest.mark.parametrize("extra", [{"calls": 3}, torch.zeros(3), np.zeros(2), None], ids=repr)
def test_what_a_module_has_beside_its_tensors_is_ignored(extra: object) -> None:
    module = Counting(*net())
    assert module.state_dict().keys() - MODULE.state_dict().keys() == {"_extra_state"}
    defence = SkyMask(module, INPUTS, LABELS, solver="collapsed")
    states: list[Any] = [{**FLAT.unflatten(row), **BUFFERS, "_extra_state": {"calls": 3}} for row in UPDATES]
    states[3]["_extra_state"] = extra
    want = judged([{**FLAT.unflatten(row), **BUFFERS} for row in UPDATES])
    assert_same(defence.aggregate(states, module.state_dict()), want)
    assert_same(defence.aggregate([whole_state(row) for row in UPDATES]), want)


VECTORS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda row_P: row_P.numpy().astype(np.float64),
    "arrays": arrays,
    "state dict": FLAT.unflatten,
    "state dict of arrays": lambda row_P: dict(zip(NAMES, arrays(row_P), strict=True)),
}


@pytest.mark.parametrize("form", VECTORS)
def test_global_parameters_and_the_root_update_come_in_the_same_forms(form: str) -> None:
    params_P, root_P = 1.1 * FLAT.initial_params, UPDATES[4]
    want = judged(UPDATES, global_params=params_P, root_update=root_P)
    assert_same(judged(UPDATES, global_params=VECTORS[form](params_P), root_update=VECTORS[form](root_P)), want)


def test_vectors_that_do_not_fit_are_named() -> None:
    for name in ("global_params", "root_update"):
        for wrong, message in (
            (np.zeros(3), rf"{name} must have shape \({P},\), .* got \(3,\)"),
            (np.zeros(P, np.int64), f"{name} must be an array of floating-point numbers"),
            (arrays(UPDATES[0])[1:], f"{name}: sent a list of 5 arrays instead of 6"),
            (3, rf"{name} must have shape \({P},\), .* got int"),
        ):
            with pytest.raises(ValueError, match=message):
                judged(UPDATES, **{name: wrong})


def test_the_global_parameters_can_be_set_once_for_all_later_rounds() -> None:
    params_P = 1.1 * FLAT.initial_params
    want = judged(UPDATES, global_params=params_P)
    module = net()
    nn.utils.vector_to_parameters(params_P, module.parameters())
    for form in (module, module.state_dict(), params_P, arrays(params_P)):
        defence = SkyMask(MODULE, INPUTS, LABELS, solver="collapsed")
        assert defence.update_global(form) is None
        assert_same(defence.aggregate(UPDATES), want)
    kept = SkyMask(MODULE, INPUTS, LABELS, solver="collapsed")
    kept.update_global(params_P)
    params_P.zero_()
    assert_same(kept.aggregate(UPDATES), want)
    with pytest.raises(ValueError, match=r"global_params must have shape"):
        kept.update_global(torch.zeros(3))
    assert torch.equal(FlatModel(MODULE, INPUTS, LABELS).initial_params, FLAT.initial_params)


def test_suspicion_orders_clients_and_is_the_mean_distance_below_the_kept_ones() -> None:
    spoilt = UPDATES.clone()
    spoilt[5, 7] = torch.nan
    result = judged(spoilt)
    scores = result.suspicion
    assert scores.dtype == torch.float64
    assert scores.isinf().nonzero().flatten().tolist() == [5]
    assert set(scores.argsort(descending=True)[:3].tolist()) == {0, 1, 5}
    clients, kept = result.clients.tolist(), result.clusters.benign.tolist()
    for row, client in enumerate(clients):
        below = []
        for values in (result.keep_share.tolist(), result.agreement.tolist()):
            of_kept = [value for value, is_kept in zip(values, kept, strict=True) if is_kept]
            mean = sum(of_kept) / len(of_kept)
            spread = (sum((value - mean) ** 2 for value in of_kept) / len(of_kept)) ** 0.5
            below.append((mean - values[row]) / max(spread, 1e-3))
        assert scores[client].item() == pytest.approx(sum(below) / 2, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(result.norms, UPDATES[clients].norm(dim=1))


def test_suspicion_is_finite_where_the_kept_clients_are_all_alike() -> None:
    alike = torch.tensor([0.5, 0.5, 0.4], dtype=torch.float64)
    scores = suspicion(alike, alike, torch.tensor([True, True, False]))
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.0, 100.0], dtype=torch.float64))


def test_a_round_is_one_line_in_the_log_and_its_phases_are_debug_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="skymask_gpu"):
        result = judged(UPDATES)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1
    assert lines[0].startswith(f"{result.headline()}, in ")
    assert lines[0].endswith(result.clusters.reason)
    debug = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    for name in ("collect", "root", "clustering", "average"):
        assert any(line.startswith(f"{name}: ") for line in debug)
    assert any(line.startswith("TrainedMasks(") for line in debug)


@pytest.mark.parametrize("small_batches", [False, True])
def test_the_root_can_be_trained_by_the_clients_own_optimizer(small_batches: bool) -> None:
    module = net()
    config = RootTraining(steps=6, lr=3e-3, grad_clip=float("inf"), optimizer=torch.optim.Adam)
    got_P = root_direction(FLAT, FLAT.initial_params, config, small_batches=small_batches)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    # 60 samples are one batch of at least 50, so that small batches are all samples
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(INPUTS), LABELS).backward()
        optimizer.step()
    want_P = nn.utils.parameters_to_vector(module.parameters()).detach() - FLAT.initial_params
    torch.testing.assert_close(got_P, want_P, rtol=1e-3, atol=1e-5)
    # plain SGD by torch's own optimizer is the default
    default_P = root_direction(FLAT, FLAT.initial_params, RootTraining())
    by_sgd_P = root_direction(FLAT, FLAT.initial_params, RootTraining(optimizer=torch.optim.SGD))
    torch.testing.assert_close(by_sgd_P, default_P)


def test_what_makes_no_optimizer_is_refused() -> None:
    for wrong in ("adam", lambda params: torch.optim.Adam(params), lambda params, lr: None):
        with pytest.raises(ValueError, match=r"RootTraining\.optimizer must make an optimizer"):
            RootTraining(optimizer=wrong)  # type: ignore[arg-type]
