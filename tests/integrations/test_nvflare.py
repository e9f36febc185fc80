"""SkyMask as NVIDIA FLARE's aggregator, called as FLARE's FedAvg calls it."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nvflare", reason="pip install 'skymask-gpu[nvflare]'")

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from skymask_gpu import RootTraining, SkyMask
from skymask_gpu.defence import root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.integrations.nvflare import SkyMaskAggregator

LABELS = torch.arange(60) % 3
INPUTS = 3 * torch.eye(8)[LABELS] + torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


MODULE = net()
FLAT = FlatModel(MODULE, INPUTS, LABELS)
STATE = {name: value.clone() for name, value in MODULE.state_dict().items()}


def updates(params_P: Tensor) -> Tensor:
    learnt_P = root_direction(FLAT, params_P, RootTraining())
    rows = learnt_P + 0.5 * learnt_P.std() * torch.randn(8, FLAT.num_params, generator=torch.Generator().manual_seed(1))
    rows[:2] *= -2
    return rows


def sent(row: Tensor, state: dict[str, Tensor], kind: str, client: int, *, arrays: bool) -> FLModel:
    """What FLARE hands on from one client; buffers have moved by the client's number."""
    diff = {name: row_part.clone() for name, row_part in FLAT.unflatten(row).items()}
    diff |= {name: torch.full_like(state[name], client) for name in state if name not in diff}
    params = diff if kind == "DIFF" else {name: state[name] + change for name, change in diff.items()}
    made: dict[str, Any] = {name: value.numpy() for name, value in params.items()} if arrays else params
    return FLModel(params_type=ParamsType(kind), params=made, meta={"client_name": f"site-{client}"})


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_two_rounds_give_the_models_of_the_defence(kind: str, arrays: bool) -> None:
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    start = {name: value.numpy() if arrays else value for name, value in STATE.items()}
    model = FLModel(params_type=ParamsType.FULL, params=start)
    state = dict(STATE)
    for _ in range(2):
        params_P = FLAT.flatten(state)
        rows = updates(params_P)
        aggregator.reset_stats()
        for client, row in enumerate(rows):
            aggregator.accept_model(sent(row, state, kind, client, arrays=arrays))
        model = FLModelUtils.update_model(model, aggregator.aggregate_model())
        want = SkyMask(MODULE, INPUTS, LABELS).aggregate(rows, params_P)
        assert list(want.rejected) == [0, 1]
        assert list(aggregator.verdicts[-1]) == ["site-0", "site-1"]
        changed = FLAT.unflatten(want.update)
        for name, value in model.params.items():
            # NumPy's sum of 0-d arrays is a scalar
            assert isinstance(value, np.ndarray | np.generic if arrays else Tensor)
            got = torch.as_tensor(np.array(value) if arrays else value)
            moved = changed[name] if name in changed else 7 if name.endswith("tracked") else 4.5
            torch.testing.assert_close(got, state[name] + moved, rtol=1e-5, atol=1e-6)
        state = {name: torch.as_tensor(np.array(value) if arrays else value) for name, value in model.params.items()}


def test_a_hostile_client_is_rejected_by_its_name() -> None:
    rows = updates(FLAT.initial_params)
    models = [sent(row, STATE, "FULL", client, arrays=True) for client, row in enumerate(rows)]
    models[4].params["0.weight"] = np.broadcast_to(np.float32(0), (10**12,))
    models[5].params["0.weight"] = np.array(["x"] * 48).reshape(6, 8)
    models[6].params = "weights"
    models[7].params["0.bias"] = models[7].params["0.bias"] * np.nan
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    for model in models:
        aggregator.accept_model(model)
    aggregator.aggregate_model()
    (verdict,) = aggregator.verdicts
    assert verdict["site-4"].startswith("0.weight must have shape (6, 8), got (1000000000000,)")
    assert verdict["site-5"].startswith("0.weight must be floating point")
    assert verdict["site-6"] == "sent a str instead of a state dict"
    assert verdict["site-7"].startswith("its update contains NaN or Inf")


LIKE: dict[str, Callable[[Tensor], Any]] = {
    "long doubles": lambda value: value.numpy().astype(np.longdouble),
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([value]),
    "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    "complex": lambda value: value.to(torch.complex64),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "float4": lambda value: torch.empty(value.shape, dtype=torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore:.*(quantize|prototype)")
@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
@pytest.mark.parametrize("like", LIKE)
def test_tensors_of_any_kind_reject_only_their_client(like: str, kind: str) -> None:
    models = [sent(row, STATE, kind, client, arrays=True) for client, row in enumerate(updates(FLAT.initial_params))]
    models[4].params = {name: LIKE[like](torch.tensor(value)) for name, value in models[4].params.items()}
    models[5].params = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in models[5].params.items()}
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    for model in models:
        aggregator.accept_model(model)
    made = aggregator.aggregate_model()
    assert list(aggregator.verdicts[0]) == ["site-0", "site-1", "site-4"]
    assert aggregator.verdicts[0]["site-4"].startswith("0.weight must be ")
    assert all(isinstance(value, np.ndarray | np.generic) for value in made.params.values())


def test_one_client_cannot_choose_what_the_server_returns() -> None:
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    for client, row in enumerate(updates(FLAT.initial_params)):
        aggregator.accept_model(sent(row, STATE, "FULL", client, arrays=True))
    aggregator._sent[4].params |= {f"junk{number}": torch.zeros(1) for number in range(100)}
    made = aggregator.aggregate_model()
    assert list(aggregator.verdicts[0]) == ["site-0", "site-1", "site-4"]
    assert all(isinstance(value, np.ndarray | np.generic) for value in made.params.values())


class Tied(nn.Module):
    """Its layers share a weight, and its state dict holds something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.out(self.second(self.first(inputs).relu()).relu())
        return out

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 3}


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_tied_weights_are_updated_under_both_names_and_extra_state_is_left_alone(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tied()
    defence = SkyMask(module, INPUTS, LABELS)
    aggregator, flat = SkyMaskAggregator(defence), defence.settings.flat
    learnt_P = root_direction(flat, flat.initial_params, RootTraining())
    for client in range(6):
        params = flat.unflatten(learnt_P if kind == "DIFF" else flat.initial_params + learnt_P)
        params |= {"second.weight": params["first.weight"].clone(), "_extra_state": {"calls": client}}
        if client == 5:
            params["_extra_state"] = torch.zeros(3)
        aggregator.accept_model(FLModel(params_type=ParamsType(kind), params=params, meta={"client_name": str(client)}))
    made = aggregator.aggregate_model().params
    assert not aggregator.verdicts[0]
    assert torch.equal(made["second.weight"], made["first.weight"])
    after = copy.deepcopy(module)
    if kind == "FULL":
        after.load_state_dict(made)
    else:
        assert "_extra_state" not in made
        after.load_state_dict(
            {name: value + made.get(name, 0) for name, value in module.state_dict().items() if name in made}, strict=False
        )
    moved_P = nn.utils.parameters_to_vector(after.parameters()).detach() - flat.initial_params
    torch.testing.assert_close(moved_P, learnt_P, rtol=1e-3, atol=1e-6)


def test_clients_are_remembered_by_their_names() -> None:
    """Who attacked in the first three rounds and then behaves is not forgotten; who comes under a new name is."""
    aggregator, params_P = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS)), FLAT.initial_params
    for number in range(4):
        rows = updates(params_P)
        if number == 3:
            rows[:2] /= -2
        for client, row in enumerate(rows):
            name = 100 if client == 1 and number == 3 else client
            aggregator.accept_model(sent(row, STATE, "DIFF", name, arrays=False))
        aggregator._global = dict(STATE)
        aggregator.aggregate_model()
    assert [list(verdict) for verdict in aggregator.verdicts] == [["site-0", "site-1"]] * 3 + [["site-0"]]
    assert len(aggregator.history) == 9


def test_two_clients_of_one_name_are_told_apart() -> None:
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    for row in updates(FLAT.initial_params):
        aggregator.accept_model(sent(row, STATE, "DIFF", 3, arrays=False))
    aggregator.aggregate_model()
    assert list(aggregator.verdicts[0]) == ["site-3 (0)", "site-3 (1)"]


def test_without_a_usable_client_the_model_stays() -> None:
    for kind, want in (("FULL", STATE), ("DIFF", {name: torch.zeros(shape) for name, shape in FLAT.shapes.items()})):
        aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
        bad = sent(torch.full((FLAT.num_params,), torch.nan), STATE, kind, 3, arrays=False)
        aggregator.accept_model(bad)
        got = aggregator.aggregate_model()
        assert list(aggregator.verdicts[0]) == ["site-3"]
        assert set(got.params) == set(want)
        for name, value in want.items():
            assert torch.equal(got.params[name], value)
    assert aggregator.aggregate_model().params.keys() == FLAT.shapes.keys(), "nobody has answered"


def test_the_first_global_model_is_flares() -> None:
    other = {name: value + 1 for name, value in STATE.items()}
    context = FLContext()
    learnable = make_model_learnable(weights={name: value.numpy() for name, value in other.items()}, meta_props={})
    context.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=False)
    aggregator = SkyMaskAggregator(SkyMask(MODULE, INPUTS, LABELS))
    aggregator.fl_ctx = context
    first = aggregator._first_global()
    assert all(torch.equal(first[name], other[name]) for name in other)
    with pytest.raises(ValueError, match="defence must be a SkyMask"):
        SkyMaskAggregator(MODULE)  # type: ignore[arg-type]
