"""What a run measures, in which order, and how long it may take."""

from dataclasses import dataclass

from skymask_gpu.bench.cases import CASES, CLIENTS, DTYPES, Case
from skymask_gpu.bench.providers import COMPILED

__all__ = ["FULL", "QUICK", "Limits", "points"]

# The README's figures come from these points, so they are measured first.
_FIRST = (("cnn", 50, "float32"), ("cnn", 500, "float32"))
# Points with more bytes of updates (in float32) come last: one of them takes as long as many
# others.
_LARGE_UPDATES = 2**30


@dataclass(frozen=True)
class Limits:
    """What a run measures, and how long it may take.

    Attributes:
        clients: the numbers of clients of each case.
        cases: the names of the cases.
        dtypes: types of the updates, where a case has them.
        total_seconds: what is left after this time is skipped.
        call_seconds: a call that takes longer, or is expected to, gets no time; one that takes
            three times as long is stopped.
        repeat_seconds: a measurement is repeated until its ratios are known, or for this long.
        left_out: providers that would take too long.
        side_by_side: whether the providers of a point are measured in rounds, or one after the
            other.
    """

    clients: tuple[int, ...] = CLIENTS
    cases: tuple[str, ...] = tuple(CASES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    total_seconds: float = 530.0
    call_seconds: float = 20.0
    repeat_seconds: float = 3.0
    left_out: tuple[str, ...] = ()
    side_by_side: bool = True


FULL = Limits()
QUICK = Limits((50,), ("cnn",), ("float32",), 45.0, 3.0, 15.0, left_out=(COMPILED, "vmap"))


def points(limits: Limits) -> list[tuple[Case, int, str]]:
    """Cases, clients and dtypes in the order of measuring.

    The README's come first, then few clients before many; large updates come last.
    """
    cases = [CASES[name] for name in limits.cases]
    unsorted = [(case, n, dtype) for n in limits.clients for dtype in limits.dtypes for case in cases if dtype in case.dtypes]

    def place(point: tuple[Case, int, str]) -> tuple[bool, bool]:
        case, num_clients, dtype = point
        return 4 * num_clients * case.num_params > _LARGE_UPDATES, (case.name, num_clients, dtype) not in _FIRST

    return sorted(unsorted, key=place)
