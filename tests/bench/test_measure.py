"""Times, ratios to baselines, and peaks of memory."""

import ctypes
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import torch

from skymask_gpu.bench.measure import (
    Floor,
    Measured,
    StoppedError,
    _time,
    free_memory,
    freed_memory_kept,
    limited_memory,
    measure_steadily,
)
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.engine.peak_memory import give_back_freed, peak_bytes, start_peak

CPU = torch.device("cpu")


def measured_alone(call: Callable[[], Any], seconds: float = 0.0, **floors: Callable[[], Any]) -> Measured:
    measured = measure_steadily({"call": call}, CPU, seconds, {name: Floor(floor) for name, floor in floors.items()})["call"]
    return measured


def test_a_ratio_is_to_the_floor_before_and_after_each_repeat(clock: Any) -> None:
    """A machine that gets slower and slower: times differ threefold, ratios do not."""

    def slower(seconds: float) -> None:
        clock.now += seconds * (1 + 0.3 * clock.now)

    measured = measured_alone(lambda: slower(0.6), 8.0, floor=lambda: slower(0.02))
    assert max(measured.seconds) > 2.5 * min(measured.seconds)
    ratios = measured.ratios["floor"]
    assert len(ratios) == len(measured.seconds)
    assert max(ratios) < 1.2 * min(ratios)


def test_the_floor_of_a_ratio_is_the_mean_of_its_times_before_and_after(clock: Any) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        clock.now += 2.0

    ratios = measured_alone(call, floor=lambda: clock.spending(0.05 * (1 + len(calls)))()).ratios["floor"]
    # before any call, after two (one is for the peak of memory), and after each more
    assert ratios[:4] == pytest.approx([2 / 0.1, 2 / 0.175, 2 / 0.225, 2 / 0.275])


def test_a_floor_below_a_millisecond_is_no_yardstick(clock: Any) -> None:
    measured = measured_alone(clock.spending(0.02), short=clock.spending(0.0009), long=clock.spending(0.002))
    assert measured.ratios == {"long": pytest.approx([10.0] * 7)}
    floors = {"short": Floor(clock.spending(0.009), parts=10), "long": Floor(clock.spending(0.01), parts=10)}
    in_parts = measure_steadily({"call": clock.spending(0.02)}, CPU, 0.0, floors)["call"]
    assert in_parts.ratios == {"long": pytest.approx([2.0] * 7)}


def test_calls_are_measured_in_rounds_with_floors_in_between(clock: Any) -> None:
    """All begin before any is repeated; a floor is timed again, for a fifth of what has passed, once that is a sample."""
    events: list[str] = []

    def calling(name: str, seconds: float) -> Callable[[], object]:
        return lambda: (events.append(name), clock.spending(seconds)())

    calls = {"a": calling("a", 0.06), "b": calling("b", 0.06)}
    floors = {"often": Floor(calling("o", 0.01)), "seldom": Floor(calling("s", 0.03))}
    measured = measure_steadily(calls, CPU, 0.0, floors, started=lambda name: events.append(f"({name})"))
    rounds = ["os(a)a(b)b", "(a)aoooooss(b)booo", *["(a)aooss(b)booo"] * 6, "s"]
    assert "".join(events) == "".join(rounds)
    for of_call in measured.values():
        assert of_call.ratios == {"often": pytest.approx([6.0] * 7), "seldom": pytest.approx([2.0] * 7)}


def test_a_call_that_fails_later_leaves_the_others_alone(clock: Any) -> None:
    times = iter(range(3))
    measured = measure_steadily({"fails": lambda: next(times), "works": clock.spending(0.02)}, CPU, 0.0)
    assert isinstance(measured["fails"], StopIteration)
    assert len(measured["works"].seconds) == 7


def test_repeats_follow_the_time_a_call_takes(clock: Any) -> None:
    assert len(measured_alone(clock.spending(0.3), 1.0).seconds) == 7, "at least"
    assert len(measured_alone(clock.spending(0.1), 0.95).seconds) == 10
    assert len(measured_alone(clock.spending(0.011), 3.0).seconds) == 200, "at most"
    assert len(measured_alone(clock.spending(2.9), 1.0).seconds) == 7
    start = clock.now
    assert measured_alone(clock.spending(3.1), 1.0).seconds == pytest.approx([3.1] * 5)
    assert clock.now == pytest.approx(start + 5 * 3.1), "the one for the peak of memory counts"
    start = clock.now
    assert measured_alone(clock.spending(0.003), 0.0).seconds == pytest.approx([0.003] * 7)
    assert clock.now == pytest.approx(start + 0.003 * (1 + 7 * 4)), "several calls a repeat, and one for the peak of memory"


def test_a_short_call_is_repeated_while_a_long_one_takes_anyway(clock: Any) -> None:
    measured = measure_steadily({"short": clock.spending(0.5), "long": clock.spending(12.0)}, CPU, 1.0)
    assert [len(of_call.seconds) for of_call in measured.values()] == [24, 5]


def test_what_is_known_well_is_not_repeated_any_more(clock: Any) -> None:
    """One call is as steady as its floor, the other is not; both may take three seconds."""
    shares = random.Random(0)
    measured = measure_steadily(
        {"steady": clock.spending(0.1), "restless": lambda: clock.spending(0.1 * shares.uniform(0.5, 2.0))()},
        CPU,
        3.0,
        {"floor": Floor(clock.spending(0.01))},
    )
    steady, restless = measured.values()
    assert len(steady.seconds) == 7
    assert 3.0 <= sum(restless.seconds) < 3.2


def test_once_the_time_is_over_no_repeat_begins(clock: Any) -> None:
    def measured_until(end: float) -> dict[str, int]:
        clock.now = 0.0
        measured = measure_steadily({name: clock.spending(0.3) for name in "ab"}, CPU, 9.0, is_over=lambda: clock.now > end)
        return {name: len(of_call.seconds) for name, of_call in measured.items()}

    assert measured_until(1.3) == {"a": 2, "b": 1}
    assert measured_until(0.7) == {"a": 1}
    assert measured_until(0.2) == {}


def test_what_was_measured_before_a_ctrl_c_comes_with_it(clock: Any) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(0)
        clock.now += 0.1
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(StoppedError) as stopped:
        measure_steadily({"before": clock.spending(0.2), "stops": stop}, CPU, 1.0)
    lengths = {name: len(of_call.seconds) for name, of_call in stopped.value.measured.items()}
    assert lengths == {"before": 3, "stops": 2}


def test_a_ratio_is_the_middle_of_its_blocks_and_its_interval_students() -> None:
    """Against scikit-learn's dependency: scipy.stats.ttest_1samp gives the same interval for up to eight repeats."""
    repeats = [2.0, 2.2, 1.9, 2.1, 2.4, 1.8, 2.0, 2.05]
    for count in (3, 5, 8):
        logs = np.log(repeats[:count])
        interval = scipy.stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
        ratio = Ratio.of(repeats[:count])
        assert ratio is not None
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
            tuple(np.exp([logs.mean(), interval.low, interval.high])), rel=1e-3
        )
    assert Ratio.of(repeats[:2]) is None
    # a spike in each block of three does no harm, alike neighbours do not make it surer
    assert Ratio.of([value for value in repeats for _ in range(3)]) == Ratio.of(repeats)
    assert Ratio.of([spiked for value in repeats for spiked in (value, 50.0, value)]) == Ratio.of(repeats)
    known = Ratio(2.0, 1.8, 2.19)
    assert known.is_within(0.1)
    assert not known.is_within(0.09)


def test_a_call_on_a_cpu_begins_with_empty_caches(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr("skymask_gpu.bench.measure._empty_caches", lambda device: events.append("empty"))
    measured = measured_alone(
        lambda: (events.append("call"), clock.spending(0.03)()),
        floor=lambda: (events.append("floor"), clock.spending(0.03)()),
    )
    assert len(measured.seconds) == 7
    assert events[::2] == ["empty"] * (len(events) // 2)
    assert set(events[1::2]) == {"call", "floor"}


def test_a_result_is_gone_before_the_next_call(touch_memory: Callable[[int], object]) -> None:
    """The peak is what a call takes beyond what was held before."""
    before = touch_memory(32 * 2**20)

    def call() -> object:
        return before and touch_memory(64 * 2**20)

    held = start_peak(CPU)
    _time(call, CPU, calls=2)
    if held is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 60 * 2**20 < peak_bytes(CPU) - held < 100 * 2**20
    peak = measured_alone(call).peak_bytes
    assert peak is not None
    assert 60 * 2**20 < peak < 100 * 2**20


def test_memory_is_limited_for_a_while_only() -> None:
    import resource

    before, free = resource.getrlimit(resource.RLIMIT_DATA), free_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not tell how much memory is free")
    with limited_memory(torch.device("cpu")):
        assert torch.empty(free // 10, dtype=torch.uint8).numel() > 0
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            torch.empty(free, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_freed_memory_is_kept_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc's M_MMAP_MAX is -4 and M_TRIM_THRESHOLD -1; the defaults are mallopt(3)'s."""

    class Library:
        options: ClassVar[dict[int, int]] = {}
        trimmed = False

        def mallopt(self, option: int, value: int) -> None:
            self.options[option] = value

        def malloc_trim(self, pad: int) -> None:
            Library.trimmed = True

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    with freed_memory_kept():
        assert Library.options == {-4: 0, -1: 2**31 - 1}
        assert not Library.trimmed
    assert Library.options == {-4: 65536, -1: 128 * 1024, -3: 128 * 1024}
    assert Library.trimmed
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # no glibc
    with freed_memory_kept():
        pass


def test_a_c_library_that_cannot_give_memory_back_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert give_back_freed() == hasattr(ctypes.CDLL(None), "malloc_trim")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not give_back_freed()
    assert start_peak(CPU) is None


def test_the_phases_of_a_call_have_times_and_ratios_of_the_same_repeat(clock: Any) -> None:
    class Round:
        """Each call is slower than the one before, and its first phase takes a quarter of it."""

        def __init__(self) -> None:
            self.calls, self.phases = 0, {}

        def __call__(self) -> None:
            self.calls += 1
            taken = 0.1 * self.calls
            clock.now += taken
            self.phases = {"first": taken / 4, "second": taken * 3 / 4}

    measured = measured_alone(Round(), floor=clock.spending(0.02))
    assert len(measured.seconds) == 7
    for name, share in (("first", 0.25), ("second", 0.75)):
        phase = measured.phases[name]
        assert phase.seconds == pytest.approx([share * seconds for seconds in measured.seconds])
        assert phase.ratios == {"floor": pytest.approx([share * ratio for ratio in measured.ratios["floor"]])}
        assert phase.peak_bytes is None
