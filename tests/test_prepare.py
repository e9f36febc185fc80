"""SkyMask.prepare: a round is the same to the bit with and without it, and trains the root direction only if it has to."""

import copy
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu import Aggregation, ClientHistory, Clustering, RootTraining, SkyMask
from skymask_gpu.defence import ahead, root
from tests.pretended_cuda import pretended_cuda
from tests.test_defence import MODULE, defence, local_update, poisoned, state_dict, toy_data

UPDATES_NP = poisoned()
PARAMS_P = torch.cat([parameter.detach().reshape(-1) for parameter in MODULE.parameters()])
ELSEWHERE_P = PARAMS_P + 0.1


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters from which a root direction was trained."""
    starts: list[Tensor] = []
    descend = root._descend

    def counted(batches: Any, params: Tensor, config: Any) -> Any:
        starts.append(params.clone())
        return descend(batches, params, config)

    monkeypatch.setattr(root, "_descend", counted)
    return starts


def assert_same(got: Aggregation, want: Aggregation) -> None:
    for name in ("update", "benign", "keep_share", "cosines", "agreement", "norms", "factors"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.masks.bits, want.masks.bits)
    assert got.masks.losses == want.masks.losses
    assert got.rejected == want.rejected
    assert got.clusters.reason == want.clusters.reason


FORMS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "tensor": lambda: ELSEWHERE_P,
    "every second": lambda: torch.stack([ELSEWHERE_P, PARAMS_P], 1)[:, 0],
    "state dict": lambda: state_dict(ELSEWHERE_P),
    "arrays": lambda: [value.numpy() for value in state_dict(ELSEWHERE_P).values()],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["signed", "two-stage"])
def test_a_prepared_round_is_the_same_to_the_bit(form: str, rule: Any, trained: list[Tensor]) -> None:
    params = FORMS[form]()
    want = defence(clustering=Clustering(rule=rule)).aggregate(UPDATES_NP, params)
    prepared = defence(clustering=Clustering(rule=rule))
    prepared.prepare(params)
    assert len(trained) == 2
    # The form is of no account, and neither is how often it is used.
    assert_same(prepared.aggregate(UPDATES_NP, params), want)
    assert_same(prepared.aggregate(UPDATES_NP, trained[0]), want)
    assert torch.equal(prepared(UPDATES_NP, params), want.update)
    assert len(trained) == 2


def nudged(params_P: Tensor) -> Tensor:
    changed_P = params_P.clone()
    changed_P[-1] = torch.nextafter(changed_P[-1], torch.tensor(9.0))
    return changed_P


def negative_zero(params_P: Tensor) -> Tensor:
    assert params_P[0] == 0
    return torch.cat([-params_P[:1], params_P[1:]])


@pytest.mark.parametrize("change", [nudged, negative_zero, lambda params_P: params_P + 1])
def test_other_parameters_are_trained_anew(change: Callable[[Tensor], Tensor], trained: list[Tensor]) -> None:
    start_P = torch.cat([torch.zeros(1), PARAMS_P[1:]])
    prepared = defence()
    prepared.prepare(start_P)
    changed_P = change(start_P)
    got = prepared.aggregate(UPDATES_NP, changed_P)
    assert [x.tolist() for x in trained] == [start_P.tolist(), changed_P.tolist()]
    assert_same(got, defence().aggregate(UPDATES_NP, changed_P))
    # What was prepared is still there.
    prepared.aggregate(UPDATES_NP, start_P)
    assert len(trained) == 3


def test_what_the_caller_changes_afterwards_is_noticed(trained: list[Tensor]) -> None:
    params_P = PARAMS_P.clone()
    prepared = defence()
    prepared.prepare(params_P)
    params_P += 0.1
    assert_same(prepared.aggregate(UPDATES_NP, params_P), defence().aggregate(UPDATES_NP, params_P))
    assert len(trained) == 3


def test_parameters_of_update_global_are_those_that_are_prepared(trained: list[Tensor]) -> None:
    prepared = defence()
    prepared.update_global(ELSEWHERE_P)
    prepared.prepare()
    assert_same(prepared.aggregate(UPDATES_NP), defence().aggregate(UPDATES_NP, ELSEWHERE_P))
    prepared.update_global(PARAMS_P)
    assert_same(prepared.aggregate(UPDATES_NP), defence().aggregate(UPDATES_NP))
    assert len(trained) == 4


@pytest.mark.parametrize("rule", ["signed", "two-stage"])
def test_a_root_update_of_the_caller(rule: Any, trained: list[Tensor]) -> None:
    """The signed rule's direction does not depend on it; the other rules train another one then."""
    root_P = local_update(MODULE, 7)
    prepared, plain = (defence(clustering=Clustering(rule=rule)) for _ in range(2))
    prepared.prepare()
    got = prepared.aggregate(UPDATES_NP, root_update=root_P)
    assert len(trained) == (1 if rule == "signed" else 2)
    assert_same(got, plain.aggregate(UPDATES_NP, root_update=root_P))


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it(within: Callable[[], Any], trained: list[Tensor]) -> None:
    prepared = defence()
    with within():
        prepared.prepare(PARAMS_P + 0)
        got = prepared.aggregate(UPDATES_NP, PARAMS_P)
    assert len(trained) == 1
    assert_same(got, defence().aggregate(UPDATES_NP))


def test_rounds_that_are_remembered(trained: list[Tensor]) -> None:
    histories = [ClientHistory(), ClientHistory()]
    prepared, plain = defence(), defence()
    for number in range(3):
        params_P = PARAMS_P + 0.01 * number
        prepared.prepare(params_P)
        got, want = (
            one.aggregate(UPDATES_NP, params_P, client_ids=range(20), history=history)
            for one, history in zip((prepared, plain), histories, strict=True)
        )
        assert_same(got, want)
    assert len(trained) == 6
    first, second = (history.state() for history in histories)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_round_waits_for_a_preparation_in_another_thread(trained: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    descend = root._descend

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return descend(*arguments)

    monkeypatch.setattr(root, "_descend", slow)
    prepared, results = defence(), []

    def judge() -> None:
        results.append(prepared.aggregate(UPDATES_NP))
        done.set()

    threads = [threading.Thread(target=prepared.prepare), threading.Thread(target=judge)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert not done.wait(0.2), "it must not go on without what is being prepared"
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert_same(results[0], defence().aggregate(UPDATES_NP))


def test_rounds_at_the_same_time_do_not_meet() -> None:
    one, starts = defence(), [PARAMS_P + 0.01 * number for number in range(4)]
    want = [defence().aggregate(UPDATES_NP, start_P) for start_P in starts]
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            for got, right in zip(pool.map(lambda start_P: one.aggregate(UPDATES_NP, start_P), starts), want, strict=True):
                assert_same(got, right)


def test_errors_and_what_is_left_after_them(trained: list[Tensor]) -> None:
    prepared = defence()
    with pytest.raises(ValueError, match=r"global_params must have shape \(195,\)"):
        prepared.prepare(torch.ones(3))
    with pytest.raises(ValueError, match="the loss of the global model on the root data is nan"):
        prepared.prepare(PARAMS_P * torch.nan)
    with pytest.raises(ValueError, match="diverged"):
        defence(root_training=RootTraining(lr=1e30, grad_clip=float("inf"))).prepare()
    trained.clear()
    # The lock is free again, and the error is not remembered.
    assert_same(prepared.aggregate(UPDATES_NP), defence().aggregate(UPDATES_NP))
    assert len(trained) == 2


def test_the_warning_of_a_loss_without_a_gradient_is_that_of_the_round(trained: list[Tensor], recwarn: Any) -> None:
    def constant(outputs: Tensor, labels: Tensor) -> Tensor:
        return 0 * outputs.sum()

    prepared = defence(loss_fn=constant)
    prepared.prepare()
    assert not recwarn.list
    for _ in range(2):
        with pytest.warns(UserWarning, match="moved no parameter"):
            prepared.aggregate(UPDATES_NP)
    assert len(trained) == 1


def test_a_copy_starts_with_nothing(trained: list[Tensor]) -> None:
    prepared = defence()
    prepared.prepare()
    copy.deepcopy(prepared).aggregate(UPDATES_NP)
    assert len(trained) == 2


COMPILED = """
import gc
import torch
from numba.core.dispatcher import Dispatcher
from skymask_gpu import SkyMask

def compiled():
    kernels = [x for x in gc.get_objects() if isinstance(x, Dispatcher) and x.__module__.startswith("skymask_gpu")]
    return {f"{x.__module__}.{x.__name__}": len(x.signatures) for x in kernels if x.signatures}

torch.manual_seed(0)
defence = SkyMask(torch.nn.Linear(20, 5), torch.randn(100, 20), torch.arange(100) % 5)
defence.prepare()
before = compiled()
solvers = [defence.aggregate(0.01 * torch.randn(number, 105)).masks.solver for number in (20, 200)]
print(*solvers, len(before) > 0, sorted(compiled().items() - before.items()))
"""


def test_the_first_round_finds_everything_compiled() -> None:
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, check=True)
    # Columns of several cuts are replayed, and the made-up clients of the preparation may have none.
    assert re.fullmatch(r"fused collapsed True \[(\('skymask_gpu.kernels.cuts.cpu._replay_pass', 1\))?\]\n", done.stdout)


def test_it_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(ahead, "warm_up", lambda *arguments: calls.append(arguments))
    prepared = defence()
    prepared.prepare()
    prepared.prepare(ELSEWHERE_P)
    assert len(calls) == 1


def test_on_a_gpu_it_serves_updates_that_are_there(trained: list[Tensor]) -> None:
    want = defence().aggregate(UPDATES_NP)
    with pretended_cuda() as gpu:
        prepared = SkyMask(MODULE, *toy_data(60, 1), device="cuda")
        prepared.prepare()
        assert len(trained) == 2
        gpu.waits.clear()
        gpu.launches.clear()
        got = prepared.aggregate(UPDATES_NP)
        assert len(trained) == 2
        # One wait for the answer to whether the parameters are the same.
        assert gpu.table()["root"][1] == 1
        assert gpu.table()["root"][0] < 10
        assert got.rejected.keys() == want.rejected.keys()
        # Without a device of its own, it prepares where the module is.
        elsewhere = defence()
        elsewhere.prepare()
        elsewhere.aggregate(UPDATES_NP.to("cuda"))
        assert len(trained) == 4
        assert not gpu.faults
