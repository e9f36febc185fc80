"""What users get wrong with SkyMask: each mistake is refused by name, or does no harm."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import Clustering, MaskTraining, SkyMask
from skymask_gpu.defence import clock, judge, mean_buffer, means
from skymask_gpu.engine import SOLVERS, ClientBlocks, FlatModel, train_masks

NUM_CLIENTS = 20
ATTACKED = [False] * 5 + [True] * 15


def data(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three well-separated heaps."""
    labels = torch.arange(num_samples) % 3
    return 3 * torch.eye(8)[labels] + torch.randn(num_samples, 8, generator=torch.Generator().manual_seed(seed)), labels


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def trained(module: nn.Module, seed: int) -> Tensor:
    """A client's model after local training, ``(P,)``."""
    module = copy.deepcopy(module)
    inputs, labels = data(30, seed)
    for _ in range(10):
        grads = torch.autograd.grad(F.cross_entropy(module(inputs), labels), list(module.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter -= 0.1 * grad.clamp(-1e-2, 1e-2)
    return nn.utils.parameters_to_vector(module.parameters()).detach()


MODULE = net()
GLOBAL = nn.utils.parameters_to_vector(MODULE.parameters()).detach()
LOCAL = torch.stack([trained(MODULE, 100 + client) for client in range(NUM_CLIENTS)])
UPDATES = LOCAL - GLOBAL
UPDATES[:5] *= -1
LOCAL[:5] = GLOBAL + UPDATES[:5]


def defence(**settings: Any) -> SkyMask:
    return SkyMask(MODULE, *data(60, 1), **settings)


def state_dict(vector_P: Tensor) -> dict[str, Tensor]:
    named = dict(MODULE.named_parameters())
    parts = vector_P.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


class WhenNeeded(Sequence):
    """State dicts that are made anew each time."""

    def __init__(self, rows_NP: Tensor) -> None:
        self._rows_NP = rows_NP

    def __len__(self) -> int:
        return len(self._rows_NP)

    def __getitem__(self, client: Any) -> Any:
        return state_dict(self._rows_NP[client])


def on_disk(rows_NP: Tensor, folder: Path) -> ClientBlocks:
    for number, part in enumerate(rows_NP.split(8)):
        save_file({"rows": part.contiguous()}, folder / f"{number}.safetensors")
    return ClientBlocks.from_folder(folder)


FORMS: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda rows_NP, folder: rows_NP,
    "transposed": lambda rows_NP, folder: rows_NP.t().contiguous().t(),
    "bfloat16": lambda rows_NP, folder: rows_NP.bfloat16(),
    "blocks": lambda rows_NP, folder: ClientBlocks(rows_NP.split(8)),
    "on disk": on_disk,
    "state dicts": lambda rows_NP, folder: [state_dict(row) for row in rows_NP],
    "read when needed": lambda rows_NP, folder: WhenNeeded(rows_NP),
}


# --- local models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_local_models_are_refused_as_updates_and_subtracted_if_announced(form: str, tmp_path: Path) -> None:
    sent = FORMS[form](LOCAL, tmp_path)
    before = LOCAL.clone()
    with pytest.raises(ValueError, match=r"updates: 20 of 20 .* they look like local models: pass local_models=True"):
        defence().aggregate(sent)
    result = defence(solver="collapsed").aggregate(sent, local_models=True)
    assert result.benign.tolist() == ATTACKED
    if form != "bfloat16":  # which rounds models far more than updates
        # The models minus the global model are UPDATES to the bit. Their mean, in float64, is rounded to
        # float32: half a unit in the last place. The tenth of a per cent is for the float64 sums.
        half_unit = torch.finfo(torch.float32).eps / 2
        want_P = UPDATES[5:].double().mean(0)
        torch.testing.assert_close(result.update.double(), want_P, rtol=1.001 * half_unit, atol=1e-16)
    assert torch.equal(LOCAL, before), "the caller's models must stay as they are"


def test_updates_announced_as_local_models_and_those_subtracted_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="they look like updates already: leave local_models=True out"):
        defence().aggregate(UPDATES, local_models=True)
    with pytest.raises(ValueError, match="with the opposite sign"):
        defence().aggregate(UPDATES - GLOBAL)
    with pytest.raises(ValueError, match="with the opposite sign"):
        defence().aggregate(-LOCAL)


@pytest.mark.parametrize("num_others", [1, 3])
def test_a_few_attackers_cannot_hide_that_local_models_were_sent(num_others: int) -> None:
    sent = LOCAL.clone()
    sent[:num_others] = 0.01 * torch.randn(num_others, len(GLOBAL), generator=torch.Generator().manual_seed(0))
    sent[0] = torch.nan
    with pytest.raises(ValueError, match="look like local models"):
        defence().aggregate(sent)


@pytest.mark.parametrize("factor", [1.0, -1.0, 1.5])
def test_attackers_cannot_stop_a_round_by_sending_the_global_model(factor: float) -> None:
    """Four in five are as many as the attack model allows; the warning says what was seen."""
    sent = UPDATES[5:].repeat(2, 1)[:NUM_CLIENTS]
    sent[: int(0.8 * NUM_CLIENTS)] = factor * GLOBAL
    with pytest.warns(UserWarning, match="16 of 20 are as long as the global model and lie along it"):
        result = defence().aggregate(sent)
    assert torch.isfinite(result.update).all()
    sent[16] = factor * GLOBAL
    with pytest.raises(ValueError, match="updates: 17 of 20 are as long as the global model"):
        defence().aggregate(sent)


def test_honest_updates_raise_no_suspicion_and_those_of_the_wrong_sign_are_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defence().aggregate(UPDATES)
    with pytest.warns(UserWarning, match="20 of 20 updates point away from the root direction"):
        defence().aggregate(-UPDATES.abs() * UPDATES[5:].mean(0).sign())


# --- modules, modes and parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_another_dtype_is_judged_like_its_float32_copy(dtype: torch.dtype) -> None:
    module = copy.deepcopy(MODULE).to(dtype)
    want = SkyMask(copy.deepcopy(module).float(), *data(60, 1)).aggregate(UPDATES)
    result = SkyMask(module, *data(60, 1)).aggregate(UPDATES)
    assert torch.equal(result.masks.bits, want.masks.bits)
    assert result.benign.tolist() == ATTACKED
    listed = [{name: value.to(dtype) for name, value in state_dict(row).items()} for row in UPDATES]
    assert SkyMask(module, *data(60, 1)).aggregate(listed).benign.tolist() == ATTACKED
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off_outside_change_nothing(mode: Any, solver: str) -> None:
    short = MaskTraining(steps=3)
    want = defence(training=short, solver=solver).aggregate(UPDATES, global_params=GLOBAL)
    with mode():
        updates, params = UPDATES.clone(), GLOBAL.clone()
        result = defence(training=short, solver=solver).aggregate(updates, params, root_update=want.update.clone())
        loss = FlatModel(MODULE, *data(60, 1))
        masks = train_masks(updates, params, loss, config=short, solver=solver)
    outside = defence(training=short, solver=solver).aggregate(updates, params)  # made inside, used outside
    assert torch.equal(outside.masks.bits, want.masks.bits)
    assert torch.equal(result.masks.bits[:-1], train_masks_with_root(want.update, short, solver)[:-1])
    assert len(masks.bits) == NUM_CLIENTS


def train_masks_with_root(root_update: Tensor, config: MaskTraining, solver: str) -> Tensor:
    return defence(training=config, solver=solver).aggregate(UPDATES, root_update=root_update).masks.bits


def test_the_short_form_takes_the_parameters_of_the_round_and_state_dicts_do_too() -> None:
    moved = GLOBAL + 0.05 * torch.sign(GLOBAL)
    skymask = defence(training=MaskTraining(steps=3))
    want = skymask.aggregate(UPDATES, global_params=moved)
    assert torch.equal(skymask(UPDATES, moved), want.update)
    of_state = skymask.aggregate(UPDATES, global_params=state_dict(moved))
    assert torch.equal(of_state.masks.bits, want.masks.bits)
    assert not torch.equal(skymask.aggregate(UPDATES).masks.bits, want.masks.bits)
    with pytest.raises(ValueError, match=r"global_params as a state dict: missing 0\.weight"):
        skymask(UPDATES, {f"module.{name}": value for name, value in state_dict(moved).items()})
    with pytest.raises(ValueError, match=r"global_params: 2\.bias must be a tensor, got a list"):
        skymask(UPDATES, {**state_dict(moved), "2.bias": [0.0] * 3})  # type: ignore[dict-item]


# --- the constructor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "colapsed"}, "solver must be one of .* got 'colapsed'; did you mean 'collapsed'"),
        ({"solver": None}, "solver must be one of"),
        ({"clustering": "published"}, r"clustering must be a Clustering, got 'published'; pass Clustering\("),
        ({"training": {}}, "training must be a MaskTraining, got {}"),
        ({"root_training": {}}, "root_training must be a RootTraining, got {}"),
        ({"training": MaskTraining}, "training must be a MaskTraining, got <class"),
        ({"norm_bound": "mean"}, r"norm_bound must be 'median' or None \(ten times that norm\), got 'mean'"),
        ({"device": "meta"}, "device must be one that holds values, got 'meta'"),
        ({"device": "no-such-device"}, "device must be one that PyTorch can use here, got 'no-such-device'"),
        ({"device": 3.5}, "device must be one that PyTorch can use here, got 3.5"),
        ({"loss_fn": "mse"}, "loss_fn must be a function"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, r"loss_fn must return one number, .* got shape \(60,\)"),
        ({"loss_fn": lambda outputs, labels: 0.5}, "loss_fn must return a tensor .* got a float"),
        ({"loss_fn": lambda outputs, labels: None}, "loss_fn must return a tensor .* got a NoneType"),
        ({"loss_fn": lambda outputs, labels: outputs.detach().sum()}, "loss_fn must be differentiable"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),  # not an address, which xdist's workers differ in
)
def test_a_wrong_argument_is_refused_in_the_constructor(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        defence(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_refused_in_the_constructor() -> None:
    with pytest.raises(ValueError, match="device must be one that PyTorch can use here, got 'cuda'"):
        defence(device="cuda")


def test_a_device_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors on it call it: ``cuda`` is ``cuda:0`` to them, and the two are not equal."""
    asked, empty = [], torch.empty

    def indexed(*sizes: Any, device: Any = None, **kwargs: Any) -> Tensor:
        asked.append(device)
        return empty(*sizes, device="cpu" if device == "cuda" else device, **kwargs)

    monkeypatch.setattr(torch, "empty", indexed)
    skymask = defence(device="cuda")
    blocks = ClientBlocks.from_reader([2], 3, torch.float32, lambda number: torch.ones(2, 3), "cuda")
    assert asked.count("cuda") == 2
    assert skymask._settings.device == blocks.device == empty(0).device
    assert blocks.to("cuda") is blocks


def test_updates_that_are_not_dense_are_refused() -> None:
    for bad, kind in (
        (UPDATES.to_sparse(), "sparse_coo"),
        (UPDATES.to("meta"), "meta"),
        (torch.nested.nested_tensor(list(UPDATES)), "nested"),
    ):
        with pytest.raises(ValueError, match=rf"updates must be a plain dense \(N, P\) tensor, got a .*{kind}"):
            defence().aggregate(bad)


# --- what is said of the result -----------------------------------------------------------------------------------------


def test_a_root_that_teaches_nothing_is_a_warning_and_no_verdict() -> None:
    module = nn.Linear(8, 1)
    skymask = SkyMask(module, data(60, 1)[0], torch.zeros(60, dtype=torch.long))  # cross entropy of one output is 0
    updates = 0.01 * torch.randn(10, 9, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="moved no parameter, the root loss has no gradient"):
        result = skymask.aggregate(updates)
    assert result.verdict == "no verdict"


def test_the_verdict_is_a_word_and_a_warning_where_it_is_doubtful() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert defence().aggregate(UPDATES).verdict == "judged"
    with pytest.warns(UserWarning, match="could not be judged: 2 clients are too few to compare"):
        assert defence().aggregate(UPDATES[:2]).verdict == "no verdict"
    with pytest.warns(UserWarning, match="could not be judged: all masks are equal"):
        assert defence(training=MaskTraining(lr=1e-3)).aggregate(UPDATES).verdict == "no verdict"
    apart = 100 * UPDATES[5:].mean(0).flip(0)
    two_stage = defence(clustering=Clustering(rule="two-stage"))
    with pytest.warns(UserWarning, match="could not be judged: the root's mask lies apart"):
        assert two_stage.aggregate(UPDATES[5:], root_update=apart).verdict == "no verdict"
    most = UPDATES.clone()
    most[5:12] *= -1
    with pytest.warns(UserWarning, match="12 of 20 clients were rejected"):
        assert defence().aggregate(most).verdict == "most rejected"
    assert defence(clustering=Clustering(rule="published")).aggregate(UPDATES).verdict == "judged"


def test_results_print_as_a_few_lines() -> None:
    skymask = defence()
    sent = UPDATES.clone()
    sent[9] = torch.nan
    result = skymask.aggregate(sent)
    text = repr(result)
    assert text == result.summary()
    assert len(text.splitlines()) == 5
    assert "judged: 14 of 20 clients kept, 6 rejected (0, 1, 2, 3, 4, 9)" in text
    assert "1 sent an unusable update" in text
    assert f"root loss {result.masks.losses[0]:.4g} ->" in text
    for thing in (skymask, result.masks, result.clusters, result.evidence()):
        assert "tensor" not in repr(thing)
        assert len(repr(thing)) < 400
    assert "14 of 19 clients benign" in repr(result.clusters)
    assert "195 parameters" in repr(skymask)


def test_the_seconds_end_with_the_hosts_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is read after the host waited for all that was started shows wall time, on a GPU too."""
    events: list[str] = []

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            events.append("tick")
            return 0.0

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            events.append(name)
            return result

        return noted

    monkeypatch.setattr(clock, "time", Clock)
    for name in ("mean_of_rows", "mean_buffers"):
        monkeypatch.setattr(judge, name, noting("launched", getattr(means, name)))
    monkeypatch.setattr(Tensor, "tolist", noting("looked", Tensor.tolist))
    defence().aggregate(UPDATES)
    assert events.count("launched") == 2
    last = max(at for at, event in enumerate(events) if event == "launched")
    after = events[last + 1 :]
    assert after[-2:] == ["tick", "tick"], "average and total end"
    assert "looked" in after, "what was launched last is waited for before"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_counters_take_the_median_and_other_buffers_the_mean(dtype: torch.dtype) -> None:
    counters = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0]]).to(dtype)
    assert mean_buffer(counters).tolist() == [0, 1, 1]
    assert mean_buffer(counters).dtype == dtype
    assert mean_buffer(torch.tensor([[1.0], [2.0], [6.0]])).tolist() == [3.0]
    # The median absolute deviation is 1, so the last value counts as 2 + 10 * 1.4826.
    assert mean_buffer(torch.tensor([[1.0], [2.0], [1e30]])).tolist() == pytest.approx([(5 + 10 * 1.4826) / 3])


def test_values_that_turn_bad_between_two_passes_are_an_error() -> None:
    reads, last = 0, 0

    def read(number: int) -> Tensor:
        nonlocal reads
        reads += 1
        return UPDATES * torch.nan if reads == last else UPDATES

    blocks = ClientBlocks.from_reader([NUM_CLIENTS], UPDATES.shape[1], torch.float32, read)
    skymask = defence(training=MaskTraining(steps=3))
    assert torch.isfinite(skymask(blocks)).all()
    last, reads = reads, 0  # the pass that averages
    with pytest.raises(ValueError, match="updates: some became NaN or Inf after they were first read"):
        skymask(blocks)
