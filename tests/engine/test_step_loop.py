"""Passes that are captured once and replayed: on a GPU, or played on a CPU by a graph that records and replays operations."""

import contextlib
import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from skymask_gpu import SkyMask
from skymask_gpu.defence import screen
from skymask_gpu.engine import ClientBlocks, FlatModel, MaskTraining, TrainedMasks, replayed_loss, step_loop, train_masks
from skymask_gpu.engine.replayed_loss import ReplayedLoss
from skymask_gpu.engine.step_loop import StepLoop

SOLVERS = ["fused", "collapsed"]
ALWAYS = MaskTraining(min_improvement=-1e9)
WAITS = "called a synchronizing CUDA operation"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: a real capture")


def small_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def small_problem(device: str = "cpu") -> tuple[Tensor, FlatModel]:
    generator = torch.Generator().manual_seed(0)
    loss = FlatModel(small_module(), torch.randn(12, 5, generator=generator), torch.arange(12) % 3)
    updates_RP = torch.randn(9, loss.num_params, generator=generator) * 0.05
    return updates_RP.to(device), loss.to(device)


def train(
    solver: str, config: MaskTraining = ALWAYS, loss: Any = None, device: str = "cpu", progress: Any = None
) -> TrainedMasks:
    updates_RP, own_loss = small_problem(device)
    arguments: dict[str, Any] = {"config": config, "solver": solver, "keep_logits": True, "progress": progress}
    return train_masks(updates_RP, own_loss.initial_params, loss or own_loss, **arguments)


def assert_equal(got: TrainedMasks, want: TrainedMasks) -> None:
    assert got.losses == want.losses
    assert torch.equal(got.bits, want.bits)
    assert got.logits is not None
    assert want.logits is not None
    assert torch.equal(got.logits, want.logits)


# --- a GPU played on a CPU ----------------------------------------------------------------------------------------------


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph does, with tensors of the CPU: a capture changes nothing and may not wait for a result; a replay
    repeats the same operations on the same tensors, whatever Python would do by now."""

    made: ClassVar[list["RecordedGraph"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        RecordedGraph.made.append(self)

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        Allocator.begin(pool, self)
        self._pool, self._invalid = pool, False
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        for tensor, value in reversed(self._before):
            tensor.detach().copy_(value)
        if self._invalid and Allocator.leaves_failures_begun:
            raise RuntimeError("operation failed due to a previous error during capture")
        Allocator.end(0, self._pool)
        if self._invalid:
            Allocator.release(0, self._pool)
            raise RuntimeError("operation failed due to a previous error during capture")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.is_write and isinstance(named.get(argument.name), Tensor):
                self._before.append((named[argument.name], named[argument.name].detach().clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self._calls:
                again = func(*args, **kwargs)
                if any(r.alias_info is not None for r in func._schema.returns):
                    continue  # a view, or written in place
                outs, news = (x if isinstance(x, tuple | list) else (x,) for x in (result, again))
                for out, new in zip(outs, news, strict=True):
                    if isinstance(out, Tensor):
                        out.detach().copy_(new)


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, other: object) -> None: ...


class Allocator:
    """Who may allocate from which pool, and how many hold one: as in torch 2.11, where the end of a capture that failed leaves
    both as they are, or as in a newer torch."""

    leaves_failures_begun = True
    underway: ClassVar[list[tuple[tuple[int, int], RecordedGraph]]] = []
    holders: ClassVar[Counter[tuple[int, int]]] = Counter()

    class MemPool:
        def __init__(self) -> None:
            self.id = (len(Allocator.holders), 0)
            Allocator.holders[self.id] = 1

    @classmethod
    def begin(cls, pool: tuple[int, int], graph: RecordedGraph) -> None:
        assert cls.holders[pool] > 0
        cls.underway.append((pool, graph))
        cls.holders[pool] += 1

    @classmethod
    def end(cls, device: int, pool: tuple[int, int]) -> None:
        assert device == 0
        if pool not in [id for id, _ in cls.underway]:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        cls.underway = [of for of in cls.underway if of[0] != pool]

    @classmethod
    def release(cls, device: int, pool: tuple[int, int]) -> None:
        assert device == 0
        cls.holders[pool] -= 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Passes run as on a GPU; the graphs that they made."""
    RecordedGraph.made, Allocator.underway, Allocator.holders = [], [], Counter()
    mode = ["default"]

    def set_mode(value: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        mode.append(value)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "MemPool", Allocator.MemPool)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", Allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", Allocator.release, raising=False)
    for cached in (step_loop._pool, step_loop._side_stream):
        cached.cache_clear()
    monkeypatch.setattr(replayed_loss, "_is_on_a_gpu", lambda _: True)
    monkeypatch.setattr(replayed_loss, "StepLoop", lambda step, _: StepLoop(step, torch.device("cuda")))
    yield RecordedGraph.made
    assert mode[-1] == "default"
    # one pool, of which the process, and each graph that was captured, has a hold; none is being recorded to
    captured = sum(graph.replays > 0 for graph in RecordedGraph.made)
    assert list(Allocator.holders.values()) == [1 + captured] * (len(RecordedGraph.made) > 0)
    assert not Allocator.underway
    for cached in (step_loop._pool, step_loop._side_stream):
        cached.cache_clear()


@pytest.mark.parametrize("solver", [*SOLVERS, "vmap"])
@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (ALWAYS, 20),
        (MaskTraining(steps=40, check_every=7, min_improvement=-1e9), 40),
        (MaskTraining(check_every=7, min_improvement=1e9), 8),
        (MaskTraining(steps=1, min_improvement=-1e9), 1),
    ],
    ids=["20-steps", "40-steps", "plateau", "1-step"],
)
def test_one_graph_serves_every_step(solver: str, config: MaskTraining, passes: int, request: pytest.FixtureRequest) -> None:
    """Captured once, after one pass of warming up."""
    want = train(solver, config)
    graphs = request.getfixturevalue("recorded")
    got = train(solver, config)
    assert [graph.replays for graph in graphs] == [passes - 1] * (passes > 1)
    assert_equal(got, want)
    assert got.solver_reason == "asked for"


def test_one_graph_serves_all_solvers_and_whatever_else_evaluates_the_loss(recorded: list[RecordedGraph]) -> None:
    updates_RP, own_loss = small_problem()
    kept = ReplayedLoss(own_loss)
    for solver in [*SOLVERS, "vmap"]:
        assert_equal(train(solver, loss=kept), train(solver))
    assert screen.drive_loss_out_of_range(ClientBlocks([updates_RP]), [0, 1, 2], own_loss.initial_params, kept) == {}
    # One pass was the warm-up.
    assert recorded[0].replays == 3 * 20 + 3 - 1
    params_P = own_loss.initial_params + 1
    value, grad_P = kept.value_and_gradient(params_P)
    want, want_P = ReplayedLoss(own_loss).value_and_gradient(params_P)
    assert value == want
    assert torch.equal(grad_P, want_P)
    # Parameters of another form have a graph of their own.
    before = len(recorded)
    double = ReplayedLoss(lambda params_P: params_P.square().sum())
    for dtype in (torch.float32, torch.float64):
        for number in (1, 2, 3):
            value, grad_P = double.value_and_gradient(torch.full((2,), number, dtype=dtype))
            assert value.dtype == grad_P.dtype == dtype
            assert (value.item(), grad_P.tolist()) == (2 * number**2, [2 * number] * 2)
    assert [graph.replays for graph in recorded[before:]] == [2, 2]


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_defence_captures_once_for_all_its_rounds(rounds: int, request: pytest.FixtureRequest) -> None:
    """The root direction's two batches, and the passes over all root data; another root direction's steps are replays, too."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(100, 5, generator=generator), torch.arange(100) % 3
    updates_NP = 0.05 * torch.randn(9, 66, generator=generator)
    starts = [torch.randn(66, generator=generator) for _ in range(rounds)]
    want = [SkyMask(small_module(), *data, training=ALWAYS).aggregate(updates_NP, start_P) for start_P in starts]
    graphs = request.getfixturevalue("recorded")
    defence = SkyMask(small_module(), *data, training=ALWAYS)
    for start_P, result in zip(starts, want, strict=True):
        got = defence.aggregate(updates_NP, start_P)
        assert torch.equal(got.update, result.update)
        assert torch.equal(got.cosines, result.cosines)
        assert torch.equal(got.masks.bits, result.masks.bits)
    assert [graph.replays for graph in graphs] == [10 * rounds - 1, 10 * rounds - 1, 20 * rounds - 1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_is_told_around_the_replays_and_none_is_captured(solver: str, recorded: list[RecordedGraph]) -> None:
    """The callback works with tensors, which a capture would repeat with every replay."""
    told, total_1 = [], torch.zeros(1)

    def progress(done: int, steps: int) -> None:
        told.append((done, steps))
        total_1.add_(1)
        assert total_1.item() == done, "it may wait: no capture is under way"

    want = train(solver)
    got = train(solver, progress=progress)
    assert got.solver_reason == "asked for"
    assert told == [(done, 20) for done in range(1, 21)]
    assert len({graph.replays for graph in recorded}) == 1
    assert_equal(got, want)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_error_of_the_callback_leaves_no_capture_begun(solver: str, recorded: list[RecordedGraph]) -> None:
    def stop_after(last: int, done: int, steps: int) -> None:
        if done == last:
            raise KeyError("enough")

    want = train(solver)
    # After the step that warms up, after the one that is captured, and after a replay.
    for last in (1, 2, 3, 4, 15):
        with pytest.raises(KeyError, match="enough"):
            train(solver, progress=functools.partial(stop_after, last))
    assert_equal(train(solver), want)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loss_that_waits_is_not_captured_and_the_result_says_so(solver: str, recorded: list[RecordedGraph]) -> None:
    own_loss = small_problem()[1]

    def waiting(params_P: Tensor) -> Tensor:
        warnings.warn("something else", stacklevel=1)
        warnings.warn(WAITS, stacklevel=1)
        return own_loss(params_P)

    want = train(solver)
    with pytest.warns(UserWarning, match="something else"):
        got = train(solver, loss=waiting)
    assert len(recorded) == 1
    assert recorded[0].replays > 0
    reason = r"asked for; not captured: the loss makes the host wait for the GPU, at .*test_step_loop\.py, line \d+"
    assert re.fullmatch(reason, got.solver_reason)
    assert_equal(got, want)


@pytest.mark.parametrize("leaves_failures_begun", [True, False], ids=["torch-2.11", "newer"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_capture_that_fails_leaves_no_trace_but_the_reason(
    solver: str, leaves_failures_begun: bool, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allocator, "leaves_failures_begun", leaves_failures_begun)
    own_loss = small_problem()[1]

    def reading(params_P: Tensor) -> Tensor:
        assert params_P.sum().item() < 1e9
        return own_loss(params_P)

    want = train(solver)
    got = train(solver, loss=reading)
    assert got.solver_reason == "asked for; not captured: operation not permitted when stream is capturing"
    assert [graph.replays > 0 for graph in recorded] == [True, False]
    assert_equal(got, want)


def test_rounds_share_one_pool_and_no_warning_is_of_ours(recorded: list[RecordedGraph]) -> None:
    """Whatever is captured, round after round; where a warning is an error, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in SOLVERS * 2:
            assert train(solver).solver_reason == "asked for"
    assert len(recorded) == 4
    assert len(Allocator.holders) == 1


def test_an_error_of_the_loss_is_the_callers(recorded: list[RecordedGraph]) -> None:
    def broken(params_P: Tensor) -> Tensor:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        train("collapsed", loss=broken)


def test_on_a_cpu_nothing_of_cuda_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "current_stream", "set_sync_debug_mode"):
        monkeypatch.delattr(torch.cuda, name)
    calls: list[int] = []
    loop = StepLoop(lambda: calls.append(1), torch.device("cpu"))
    loop.run(3)
    loop.run(2)
    assert len(calls) == 5
    assert loop.not_captured is None


# --- how often the host waits -------------------------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    NAMES = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.NAMES:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("config", "waits"),
    [(ALWAYS, 2), (MaskTraining(steps=10), 1), (MaskTraining(steps=1), 1), (MaskTraining(steps=31, min_improvement=-1e9), 3)],
    ids=["20-steps", "10-steps", "1-step", "31-steps"],
)
def test_the_host_waits_at_checks_and_at_the_end_only(solver: str, config: MaskTraining, waits: int) -> None:
    """Of 20 steps: once for the check at step 10, and once at the end."""
    own_loss, waiting, calls = small_problem()[1], Waits(), []

    def loss(params_P: Tensor) -> Tensor:
        if not calls:
            waiting.counts.clear()  # before, all is on the CPU: the initial gate
        calls.append(1)
        return own_loss(params_P)

    told: list[int] = []
    with waiting:
        masks = train(solver, config, loss=loss, progress=lambda done, steps: told.append(done))
    assert masks.steps == len(calls) == len(told) == config.steps
    if solver == "collapsed":
        # The CPU's own kernel, which has nothing to wait for, looks for the columns of several cuts.
        del waiting.counts["nonzero"]
    assert waiting.counts == {"tolist": waits}


# --- suspects, one pass each --------------------------------------------------------------------------------------------


def suspects(number: int) -> tuple[ClientBlocks, FlatModel, Callable[[Tensor], Tensor]]:
    """Rows that are harmless, or of one of two harmful kinds, in turn; a loss whose slope is infinite at one place."""
    updates_RP, own_loss = small_problem()
    updates_NP = updates_RP.repeat(number // len(updates_RP) + 1, 1)[:number].clone()
    updates_NP[1::3] = 3e38  # the loss
    updates_NP[2::3, 0] = -own_loss.initial_params[0]  # the gradient

    def loss(params_P: Tensor) -> Tensor:
        return own_loss(params_P) + params_P[0].abs().sqrt()

    return ClientBlocks([updates_NP[:5], updates_NP[5:]]), own_loss, loss


def one_by_one(rows: ClientBlocks, candidates: list[int], params_P: Tensor, loss: Any) -> dict[int, str]:
    """The plain twin: look at each candidate, and wait for the answer."""
    reasons = {}
    for row, update_P in rows.each(candidates):
        leaf_P = (params_P + update_P).requires_grad_()
        value = loss(leaf_P)
        (grad_P,) = torch.autograd.grad(value, leaf_P)
        if not value.isfinite():
            reasons[row] = f"its update drives the root loss to {value.item()}"
        elif not grad_P.isfinite().all():
            reasons[row] = "its update drives the gradient of the root loss to NaN or Inf"
    return reasons


@pytest.mark.parametrize("played", ["on a CPU", "on a GPU"])
def test_suspects_are_judged_with_one_wait_for_all(played: str, request: pytest.FixtureRequest) -> None:
    graphs = request.getfixturevalue("recorded") if played == "on a GPU" else []
    for number in (6, 23):
        rows, own_loss, loss = suspects(number)
        params_P, candidates = own_loss.initial_params, list(range(0, number - 1))
        want = one_by_one(rows, candidates, params_P, loss)
        with Waits() as waiting:
            got = screen.drive_loss_out_of_range(rows, candidates, params_P, loss)
        assert got == want
        assert list(got) == [row for row in candidates if row % 3]
        assert len({reason.rpartition(" to ")[0] or reason for reason in got.values()}) == 2
        assert waiting.counts == {"tolist": 1}
    assert [graph.replays for graph in graphs] == ([4, 21] if graphs else [])
    assert screen.drive_loss_out_of_range(rows, [], params_P, loss) == {}


# --- torch.compile ------------------------------------------------------------------------------------------------------


def test_a_compiled_model_gives_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64, because a compiler may add in another order: its roundings are far below 1e-9 there.
    updates_RP, plain = (what.to(torch.float64) for what in small_problem())
    counter, compile_with = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=counter))
    arguments = (small_module().double(), plain._inputs, plain._labels)
    assert FlatModel(*arguments)(plain.initial_params) == plain(plain.initial_params)
    assert counter.frame_count == 0
    compiled = FlatModel(*arguments, compile=True)
    want = train_masks(updates_RP, plain.initial_params, plain, config=ALWAYS, solver="fused")
    got = train_masks(updates_RP, plain.initial_params, compiled.to("cpu"), config=ALWAYS, solver="fused")
    # without and with a gradient; a copy is not compiled anew
    assert counter.frame_count == 2
    assert torch.equal(got.bits, want.bits)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-9, atol=0)


# --- on a GPU -----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_captured_loop_equals_one_that_is_launched(solver: str) -> None:
    own_loss = small_problem("cuda")[1]

    def waiting(params_P: Tensor) -> Tensor:
        value = own_loss(params_P)
        value.item()
        return value

    launched = train(solver, loss=waiting, device="cuda")
    assert "not captured: the loss makes the host wait for the GPU" in launched.solver_reason
    captured = train(solver, device="cuda")
    assert "not captured" not in captured.solver_reason
    assert_equal(captured, launched)


@needs_gpu
@pytest.mark.gpu
def test_a_failed_capture_leaves_the_gpu_usable() -> None:
    value_1 = torch.zeros(1, device="cuda")
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        value_1.add_(1)
        if len(calls) == 2:  # in the capture alone, which the first call does not show
            value_1.item()

    before = torch.cuda.current_stream()
    loop = StepLoop(step, torch.device("cuda"))
    loop.run(4)
    assert loop.not_captured is not None
    assert value_1.item() == 4
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert "not captured" not in train("collapsed", device="cuda").solver_reason
