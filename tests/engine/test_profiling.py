"""Recording phases: times that add up, bytes, peaks of memory, and nothing at all while nobody records."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skymask_gpu.engine import ClientBlocks, FlatModel, MaskTraining, cluster_masks, profiling, train_masks
from skymask_gpu.engine.profiling import OTHER, PhaseCost, Profile, Recording, copy_bandwidth, phase, recording

CPU = torch.device("cpu")
MIB = 2**20
STEPS = 4


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is looked at."""
    clock = itertools.count()
    monkeypatch.setattr(Recording, "_now", lambda self: float(next(clock)))


@pytest.fixture
def digits() -> tuple[Tensor, FlatModel]:
    """Updates of 12 rows of a small network for scikit-learn's digits, each a step on samples of its own."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    inputs = images.float() / 16
    rows = []
    for row in range(12):
        loss = FlatModel(module, inputs[50 * row : 50 * row + 50], labels[50 * row : 50 * row + 50])
        params = loss.initial_params.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(params), params)
        rows.append(-0.1 * grad)
    return torch.stack(rows), FlatModel(module, inputs[-100:], labels[-100:])


def test_times_of_nested_phases_add_up_to_the_whole(ticks: None) -> None:
    with recording(CPU) as record:  # 0
        with phase("a"):  # 1
            with phase("b"):  # 2 to 3
                pass
            with phase("b"):  # 4 to 5
                pass
        # a ends at 6
        with phase("b"), phase("a"):  # 7, 8 to 9, 10
            pass
    profile = record.profile(1.0)  # 11
    assert list(profile.phases) == ["a", "b", OTHER]
    assert {name: (cost.seconds, cost.calls) for name, cost in profile.phases.items()} == {
        "a": (5 - 2 + 1, 2),
        "b": (1 + 1 + 3 - 1, 3),
        OTHER: (11 - 5 - 3, 1),
    }
    assert profile.seconds == 11
    assert profile.accounted == 8 / 11


def test_bytes_are_summed_and_compared_with_a_copy(ticks: None) -> None:
    with recording(CPU) as record:
        with phase("a", torch.zeros(10, 3), torch.zeros(4, dtype=torch.uint8), None, 6):
            pass
        with phase("a", ClientBlocks([torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(1, 5, dtype=torch.bfloat16)])):
            pass
        with phase("b"):
            pass
    profile = record.profile(100.0)
    assert profile.phases["a"].num_bytes == 120 + 4 + 6 + 30
    assert profile.phases["a"].copy_share == 160 / 2 / 100
    assert profile.phases["b"].copy_share is None


def test_a_phase_that_fails_is_recorded_and_closed(ticks: None) -> None:
    with recording(CPU) as record:
        with pytest.raises(ValueError, match="inside"), phase("a"), phase("b"):
            raise ValueError("inside")
        with phase("c"):
            pass
    assert {name: cost.seconds for name, cost in record.profile(1.0).phases.items()} == {"a": 2, "b": 1, "c": 1, OTHER: 3}
    assert phase("d") is profiling._OFF


def test_the_peak_of_memory_is_that_of_the_phase_that_held_it(touch_memory: Callable[[int], object]) -> None:
    with recording(CPU) as record:
        with phase("before"):
            touch_memory(4 * MIB)
        with phase("outer"):
            with phase("inner"):
                touch_memory(64 * MIB)
            touch_memory(4 * MIB)
        with phase("after"):
            touch_memory(4 * MIB)
    peaks = {name: cost.peak_bytes for name, cost in record.profile(1.0).phases.items()}
    if peaks[OTHER] is None:
        pytest.skip("this system does not tell the peak of resident memory")
    for name in ("inner", "outer", OTHER):
        assert 60 * MIB < peaks[name] < 80 * MIB, name
    for name in ("before", "after"):
        assert peaks[name] < 30 * MIB, name


def test_the_copy_bandwidth_is_bytes_read_and_written_a_second(ticks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_COPY_BYTES", 1000)
    assert copy_bandwidth(CPU) == 2000


def test_without_a_recording_nothing_is_recorded(digits: tuple[Tensor, FlatModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("this is for recordings only")

    monkeypatch.setattr(Recording, "phase", forbidden)
    monkeypatch.setattr(torch.cuda, "synchronize", forbidden)
    monkeypatch.setattr(torch.cuda, "Event", forbidden)
    monkeypatch.setattr(torch.profiler, "record_function", forbidden)
    updates_RP, loss = digits
    for solver in ("vmap", "fused", "collapsed"):
        masks = train_masks(updates_RP, loss.initial_params, loss, config=MaskTraining(steps=STEPS), solver=solver)
        cluster_masks(masks.bits, masks.num_params)


class Event:
    """A CUDA event whose time is the number of events before it, in milliseconds."""

    clock = itertools.count()

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.time = next(self.clock)

    def elapsed_time(self, other: "Event") -> float:
        return float(other.time - self.time)


def test_on_a_gpu_there_are_events_and_one_wait_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, capturing = [], [False]
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(profiling, "start_peak", lambda device: None)
    with recording(torch.device("cuda")) as record:
        for _ in range(3):
            with phase("a"), phase("b"):
                pass
        capturing[0] = True
        with phase("captured"):
            pass
        capturing[0] = False
    assert waits == []
    profile = record.profile(1.0)
    assert waits == [torch.device("cuda")]
    assert {name: cost.seconds for name, cost in profile.phases.items()} == pytest.approx({"a": 6e-3, "b": 3e-3, OTHER: 4e-3})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_phases_on_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    with recording(device) as record:
        with phase("large", 3 * x.nbytes):
            for _ in range(20):
                x @ x
        with phase("small"):
            x[:64, :64] @ x[:64, :64]
    profile = record.profile(copy_bandwidth(device))
    assert profile.phases["large"].seconds > 5 * profile.phases["small"].seconds
    assert x.nbytes <= profile.phases["large"].peak_bytes < 4 * x.nbytes
    assert sum(cost.seconds for cost in profile.phases.values()) == pytest.approx(profile.seconds)


def recorded(digits: tuple[Tensor, FlatModel], solver: str) -> Profile:
    updates_RP, loss = digits
    # no plateau: all steps are taken
    config = MaskTraining(steps=STEPS, check_every=1000)
    with recording(CPU) as record:
        masks = train_masks(updates_RP, loss.initial_params, loss, config=config, solver=solver)
        cluster_masks(masks.bits, masks.num_params)
    assert masks.steps == STEPS
    return record.profile(1e10)


def bytes_and_calls(profile: Profile) -> dict[str, tuple[int, int]]:
    return {name: (cost.num_bytes, cost.calls) for name, cost in profile.phases.items()}


# float32 elements are 4 bytes; 12 rows of 64 * 16 + 16 + 16 * 10 + 10 parameters, and their distances
ROWS, PARAMS = 12, 1210
ELEMENTS, BITS = ROWS * PARAMS, ROWS * 152
PASSES = (STEPS * 2 * 4 * PARAMS, STEPS)
DISTANCES = (BITS + 4 * ROWS**2, 1)


def test_the_phases_of_the_fused_solver(digits: tuple[Tensor, FlatModel]) -> None:
    # the mean reads the updates; the first step writes logits too, the others also read them
    steps = 4 * ELEMENTS * (1 + 2 + 3 * (STEPS - 2))
    assert bytes_and_calls(recorded(digits, "fused")) == {
        "mask steps": (steps, 1 + 1 + (STEPS - 1)),
        "model passes": PASSES,
        "bits": (2 * 4 * ELEMENTS + ELEMENTS // 8, 1),
        "distances": DISTANCES,
        OTHER: (0, 1),
    }


def test_the_phases_of_the_collapsed_solver(digits: tuple[Tensor, FlatModel]) -> None:
    bins = MaskTraining().bins * PARAMS
    # logits, read and written, centres and weights of the bins, float32; their counts, uint16
    assert bytes_and_calls(recorded(digits, "collapsed")) == {
        "mask steps": (STEPS * (4 + 4 + 4 + 4) * bins, 1 + STEPS),
        "binning": (4 * ELEMENTS, 1),
        "model passes": PASSES,
        "cuts": ((4 + 4 + 2) * bins + 2 * 4 * STEPS * PARAMS, 1),
        "bits": (4 * ELEMENTS + BITS, 1),
        "distances": DISTANCES,
        OTHER: (0, 1),
    }


def test_the_phases_of_the_vmap_solver(digits: tuple[Tensor, FlatModel]) -> None:
    assert bytes_and_calls(recorded(digits, "vmap")) == {
        "mask steps": (STEPS * (2 + 3) * 4 * ELEMENTS, 1 + 2 * STEPS),
        "model passes": PASSES,
        "bits": (4 * ELEMENTS + ELEMENTS // 8, 1),
        "distances": DISTANCES,
        OTHER: (0, 1),
    }


def test_a_stack_of_blocks_is_read_and_written() -> None:
    blocks = ClientBlocks([torch.ones(2, 5), torch.ones(3, 5)])
    with recording(CPU) as record:
        blocks.stack()
        ClientBlocks([torch.ones(2, 5)]).stack()  # moves nothing
    cost: PhaseCost = record.profile(1.0).phases["collect"]
    assert (cost.num_bytes, cost.calls) == (2 * 5 * 5 * 4, 1)
