"""The functions written in LLVM's vectors, each against the NumPy twin beside it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from skymask_gpu.kernels.bins import vectors as bins
from skymask_gpu.kernels.hamming import cpu as hamming
from skymask_gpu.kernels.shared import cpu_step, vectors
from skymask_gpu.kernels.shared.vectors import LANES, WIDE, floats_of

EPS = np.finfo(np.float32).eps
reals = pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.float64], ids=["fp32", "bf16", "fp64"])
stored = pytest.mark.parametrize("dtype", [np.float32, np.uint16], ids=["fp32", "bf16"])


def both(function: Any, twin: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Any]]:
    """Result and arguments after a call of either; unequal memory before and behind would show too."""
    called = njit(lambda *args: function(*args))
    got, want = ([x.copy() if isinstance(x, np.ndarray) else x for x in arguments] for _ in range(2))
    return [called(*got), *got], [twin(*want), *want]


def updates_of(rng: np.random.Generator, size: int, dtype: type) -> np.ndarray:
    """Updates as they are stored; bfloat16 as uint16."""
    updates = rng.normal(0, 1e-2, size).astype(np.float32)
    return (updates.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else updates.astype(dtype)


def assert_equal(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_above_a_threshold(rng: np.random.Generator, dtype: type) -> None:
    logits, bits = rng.integers(-2, 3, 80).astype(dtype), np.full(20, 7, np.uint8)
    assert_equal(*both(vectors.pack_above, vectors.pack_above_reference, logits, 5, dtype(1), bits, 3))


@stored
def test_bits_below_a_cut(rng: np.random.Generator, dtype: type) -> None:
    rows, flips, bits = updates_of(rng, 90, dtype), rng.integers(0, 256, 12, np.uint8), np.full(20, 7, np.uint8)
    cuts = np.roll(floats_of(rows), 3)
    cuts[10:20] = floats_of(rows)[11:21]  # a value that equals the cut is not below it
    assert_equal(*both(vectors.pack_below, vectors.pack_below_reference, rows, 8, cuts, 7, flips, 2, bits, 3))


def test_order(rng: np.random.Generator) -> None:
    values = rng.integers(0, 5, 200).astype(np.float32)
    assert_equal(*both(bins.order, bins.order_reference, values, 3, 120))


@stored
def test_updates_are_taken_and_widen_the_ends(rng: np.random.Generator, dtype: type) -> None:
    rows, values = updates_of(rng, 40, dtype), np.zeros(60, np.float32)
    lowest, highest = (rng.normal(0, 1e-2, 30).astype(np.float32) for _ in range(2))
    assert_equal(*both(bins.take_updates, bins.take_updates_reference, rows, 5, values, 20, lowest, highest, 3))


@pytest.mark.parametrize("num_rows", [1, 2, 300])
@pytest.mark.parametrize(("counted", "most"), [(np.uint16, 1000), (np.int32, 2**24)], ids=["u16", "i32"])
def test_rows_are_added_to_bins(rng: np.random.Generator, num_rows: int, counted: type, most: int) -> None:
    stride, place = LANES + 5, 3
    values = rng.integers(-6, 7, 10 + num_rows * LANES).astype(np.float32) / 4
    edges = np.sort(rng.integers(-5, 6, (bins.GROUP + 1, stride)), axis=0).astype(np.float32).ravel() / 4
    edges = np.concatenate([np.zeros(place, np.float32), edges])
    counts, origins = rng.integers(0, most, edges.size).astype(counted), rng.integers(-9, 9, LANES + 2).astype(np.float32)
    # Whole multiples of 1 / 16, so that no square is rounded, whether or not its sum is fused with it.
    sums, squares = rng.normal(size=edges.size).astype(np.float32), rng.integers(0, 99, edges.size).astype(np.float32)
    arguments = (values, 10, num_rows, edges, counts, sums, squares, place, stride, origins, 2)
    assert_equal(*both(bins.add_to_bins, bins.add_to_bins_reference, *arguments))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_inner_edges(rng: np.random.Generator, num_rows: int, share: float) -> None:
    stride, column = LANES + 3, 2
    ordered = np.sort(rng.normal(size=(num_rows, stride)), axis=0).astype(np.float32)
    ordered[:, 5] = 0.5  # all are equal: nothing is reached
    reached = np.zeros_like(ordered)
    reached[1:] = np.sqrt(np.diff(ordered, axis=0)).cumsum(0)
    edges = np.full(LANES + 4, -1, np.float32)
    edges[:10] = ordered.max()  # so high that they stay
    flat = (ordered.ravel(), reached.ravel(), stride, num_rows, column, np.float32(share))
    _, *want = both(bins.inner_edges, bins.inner_edges_reference, *flat, 0, edges, 2)
    least = want[0][0]
    for first in {0, least}:
        got, want = both(bins.inner_edges, bins.inner_edges_reference, *flat, first, edges, 2)
        assert got[0] == want[0] == least, "a later start must find the same rows"
        # a difference, a quotient, a product and a difference, each rounded, or two of them fused
        assert (np.abs(got[-2] - want[-2]) <= 4 * EPS * (np.abs(want[-2]) + np.ptp(ordered))).all()


@pytest.mark.parametrize("vectors_of_64", [1, 3])
def test_differing_bits_are_added(rng: np.random.Generator, vectors_of_64: int) -> None:
    bits, sums = rng.integers(0, 256, 1500, np.uint8), np.arange(20, dtype=np.int32)
    # of the four rows the last two lie beyond the last one
    arguments = (bits, 7, 300, 250, 600, vectors_of_64, sums, 5)
    assert_equal(*both(hamming.add_differing, hamming.add_differing_reference, *arguments))


@reals
@pytest.mark.parametrize("of_bins", [False, True], ids=["rows", "bins"])
def test_the_step(rng: np.random.Generator, dtype: type, of_bins: bool) -> None:
    real = np.float64 if dtype == np.float64 else np.float32
    updates, size = updates_of(rng, 100, dtype), 3 + WIDE
    logits, slopes, means = (rng.normal(0, s, 90).astype(real) for s in (3, 500, 1e-3))
    weights = rng.uniform(0, 400, 90).astype(real) if of_bins else None
    sums = [rng.normal(size=90).astype(real) for _ in range(2)]
    exact = [np.asarray(floats_of(updates), np.float64), *(x.astype(np.float64) for x in (logits, slopes, means, *sums))]

    # A gate is off by up to 4 roundings (the exponential 2, a sum and a quotient), its derivative by
    # one more, and a product, a clamp and a difference follow: 8 of the largest term.
    columns, eps = slice(3, size), np.finfo(real).eps
    off = np.abs(exact[0][5:][:WIDE] - exact[3][columns])
    tolerance = 8 * eps * (1 + np.abs(logits[7:][:WIDE]) + np.abs(slopes[columns]) * off)

    step, moved = real(0.5), np.zeros(80, real)
    got, _ = both(cpu_step.move, cpu_step.move_reference, updates, 5, logits, 7, slopes, means, 3, step, moved, 9)
    want = np.zeros(80)
    cpu_step.move_reference(exact[0], 5, exact[1], 7, exact[2], exact[3], 3, 0.5, want, 9)
    assert (np.abs(got[-2] - want)[9:][:WIDE] <= tolerance).all()
    assert not got[-2][:9].any(), "nothing is written before"

    arguments = (updates, 5, weights, logits, 7, slopes, means, *sums, 3, step)
    got, _ = both(cpu_step.move_and_add, cpu_step.move_and_add_reference, *arguments)
    cpu_step.move_and_add_reference(exact[0], 5, weights, exact[1], 7, exact[2], exact[3], exact[4], exact[5], 3, 0.5)
    assert (np.abs(got[4] - exact[1])[7:][:WIDE] <= tolerance).all()
    # a gate moves by at most a quarter of its logit; then one product and one sum per total
    weight = np.ones(WIDE) if weights is None else weights[7:][:WIDE].astype(np.float64)
    for a, b, factor in ((got[8], exact[4], 1), (got[9], exact[5], np.abs(exact[0][5:][:WIDE]))):
        bound = weight * factor * (tolerance / 4 + 6 * eps) + 2 * eps * np.abs(b[columns])
        assert (np.abs(a - b)[columns] <= bound).all()
