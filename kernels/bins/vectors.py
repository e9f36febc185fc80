"""The inner loops of the bins on a CPU, in vectors, as ``shared/vectors.py`` describes them.

Numba's cache does not notice changes of this file: delete ``__pycache__`` of this folder after one.
"""

import llvmlite.ir as llvm
import numpy as np
from numba import types

from skymask_gpu.kernels.shared.vectors import (
    FLOATS,
    INDEX,
    LANES,
    WIDE,
    WIDE_FLOATS,
    Elements,
    call,
    floats_of,
    load,
    load_updates,
    repeat,
    spread,
    store,
    times_plus,
    vector_code,
)

# The number of bins that add_to_bins fills at once. Their edges, counts, sums and squares stay in
# registers where there are 32 of them.
GROUP = 4

_WORDS = llvm.VectorType(llvm.IntType(32), LANES)
_HALVES = llvm.VectorType(llvm.IntType(16), LANES)


@vector_code(types.void)
def order(builder, values, low, high):
    """Swap ``values[low:]`` and ``values[high:]``, of 64 columns, where the second is smaller."""
    at_low, at_high = (load(builder, values, place, WIDE_FLOATS) for place in (low, high))
    swap = builder.fcmp_ordered(">", at_low, at_high)
    store(builder, builder.select(swap, at_high, at_low), values, low)
    store(builder, builder.select(swap, at_low, at_high), values, high)


def order_reference(values, low, high):
    at_low, at_high = values[low : low + WIDE].copy(), values[high : high + WIDE].copy()
    values[low : low + WIDE], values[high : high + WIDE] = np.minimum(at_low, at_high), np.maximum(at_low, at_high)


@vector_code(types.int64)
def inner_edges(builder, ordered, reached, stride, num_rows, column, share, first, edges, to):
    """Find one edge in each of 16 columns: where ``reached`` passes ``share`` of its last row.

    Row i of ``ordered`` (the sorted values) and ``reached`` (which ascends from 0) begins at
    ``i * stride``. An edge is interpolated between the two values around it, and is written to
    ``edges[to:]``. It is never below the edge before it, which ``edges`` already holds.

    Args:
        share: below 1.
        first: a row before which no column passes; at most the last row.

    Returns:
        A row that can be passed as ``first`` with every larger share.
    """
    last = builder.add(column, builder.mul(stride, builder.sub(num_rows, INDEX(1))))
    target = builder.fmul(load(builder, reached, last, FLOATS), spread(builder, share, FLOATS))
    rows = _rows_below(builder, reached, target, column, stride, first, last)
    lower, upper, start, end = _around(builder, ordered, reached, column, stride, rows)
    gap = builder.fsub(end, start)
    zero = llvm.Constant(FLOATS, [0.0] * LANES)
    back = builder.select(builder.fcmp_ordered(">", gap, zero), builder.fdiv(builder.fsub(end, target), gap), zero)
    edge = builder.fsub(upper, builder.fmul(builder.fsub(upper, lower), back))
    so_far = load(builder, edges, to, FLOATS)
    store(builder, builder.select(builder.fcmp_ordered(">", edge, so_far), edge, so_far), edges, to)
    least = call(builder, f"llvm.vector.reduce.umin.v{LANES}i32", llvm.IntType(32), rows)
    return builder.zext(least, INDEX)


def _rows_below(builder, reached, target, column, stride, first, last):
    """Per column, the number of rows before the last whose ``reached`` lies below the target."""

    def next_row(place, count):
        below = builder.fcmp_ordered("<", load(builder, reached, place, FLOATS), target)
        any_below = builder.icmp_unsigned("!=", builder.bitcast(below, llvm.IntType(LANES)), llvm.IntType(LANES)(0))
        # A lane that is true becomes -1 when it is extended to an integer.
        place, count = builder.add(place, stride), builder.sub(count, builder.sext(below, _WORDS))
        return (place, count), builder.and_(any_below, builder.icmp_signed("<", place, last))

    counts = spread(builder, builder.trunc(first, llvm.IntType(32)), _WORDS)
    start = builder.add(column, builder.mul(stride, first))
    # If ``first`` is the last row, the loop's only passage counts nothing, because that row is not
    # below the target.
    _, counts = repeat(builder, (start, counts), next_row)
    return counts


def _around(builder, ordered, reached, column, stride, rows):
    """The entries of two matrices in each column's own row and in the row before it."""
    around = [llvm.Constant(FLOATS, llvm.Undefined)] * 4
    for lane in range(LANES):
        number = llvm.IntType(32)(lane)
        row = builder.sext(builder.extract_element(rows, number), INDEX)
        at = builder.add(builder.add(column, INDEX(lane)), builder.mul(row, stride))
        # Row 0 has no row before it. It is asked for only if all values are equal or there is only
        # one.
        before = builder.select(builder.icmp_signed("==", row, INDEX(0)), at, builder.sub(at, stride))
        loads = [_element(builder, data, place) for data in (ordered, reached) for place in (before, at)]
        around = [builder.insert_element(v, x, number) for v, x in zip(around, loads, strict=True)]
    return around


def _element(builder, data: Elements, place):
    return builder.load(builder.gep(data.pointer, [place]))


def inner_edges_reference(ordered, reached, stride, num_rows, column, share, first, edges, to):
    rows = column + stride * np.arange(num_rows)[:, None] + np.arange(LANES)
    ordered, reached, lanes = ordered[rows], reached[rows], np.arange(LANES)
    target = reached[-1] * share
    upper = (reached[:-1] < target).sum(0)
    lower = np.maximum(upper - 1, 0)
    gap = reached[upper, lanes] - reached[lower, lanes]
    back = np.divide(reached[upper, lanes] - target, gap, out=np.zeros_like(gap), where=gap > 0)
    edge = ordered[upper, lanes] - (ordered[upper, lanes] - ordered[lower, lanes]) * back
    edges[to : to + LANES] = np.maximum(edges[to : to + LANES], edge)
    return upper.min()


@vector_code(types.void)
def take_updates(builder, rows, at, values, to, lowest, highest, column):
    """Copy 16 of ``rows[at:]`` to ``values[to:]`` as float32, and widen the columns' ends by them.

    The ends are ``lowest`` and ``highest``, from ``column`` on.
    """
    updates = load_updates(builder, rows, at, FLOATS)
    store(builder, updates, values, to)
    for extreme, better in ((lowest, "<"), (highest, ">")):
        so_far = load(builder, extreme, column, FLOATS)
        store(builder, builder.select(builder.fcmp_ordered(better, updates, so_far), updates, so_far), extreme, column)


def take_updates_reference(rows, at, values, to, lowest, highest, column):
    updates, columns = floats_of(rows[at : at + LANES]), slice(column, column + LANES)
    values[to : to + LANES] = updates
    lowest[columns] = np.minimum(lowest[columns], updates)
    highest[columns] = np.maximum(highest[columns], updates)


@vector_code(types.void)
def add_to_bins(builder, values, at, num_rows, edges, counts, sums, squares, to, stride, origins, column):
    """Add rows of 16 values to ``GROUP`` neighbouring bins, whose lower edges are ``edges[to:]``.

    Row i is ``values[at + i * LANES:]``. Bin b's edges begin at ``to + b * stride``; ``counts``
    (uint16 or int32), ``sums`` and ``squares`` have the same layout, and ``edges`` has one row
    more. The squares are those of the distances to ``origins[column:]``. Rows are added one after
    the other.

    Args:
        num_rows: 1 to 2**24.
    """
    whole_numbers = _HALVES if counts.dtype == types.uint16 else _WORDS
    places = [to]
    for _ in range(GROUP):
        places.append(builder.add(places[-1], stride))
    edge = [load(builder, edges, place, FLOATS) for place in places]
    start = [load(builder, totals, place, FLOATS) for totals in (sums, squares) for place in places[:-1]]
    none, one = (llvm.Constant(FLOATS, [number] * LANES) for number in (0.0, 1.0))
    origin = load(builder, origins, column, FLOATS)

    def next_row(row, *totals):
        sums_so_far, squares_so_far, counts_so_far = totals[:GROUP], totals[GROUP : 2 * GROUP], totals[2 * GROUP :]
        value = load(builder, values, builder.add(at, builder.mul(row, INDEX(LANES))), FLOATS)
        off = builder.fsub(value, origin)
        reached = [builder.fcmp_ordered(">=", value, e) for e in edge]
        # Edges ascend, so a value that has reached exactly one of a bin's two edges lies inside the
        # bin.
        inside = [builder.xor(reached[b], reached[b + 1]) for b in range(GROUP)]
        # Where there are mask registers, each of these becomes a single instruction, which it does
        # not with whole numbers. Hence the counts are floats, which is exact up to 2**24.
        added = [builder.select(i, builder.fadd(x, value), x) for i, x in zip(inside, sums_so_far, strict=True)]
        squared = [builder.select(i, times_plus(builder, off, off, x), x) for i, x in zip(inside, squares_so_far, strict=True)]
        counted = [builder.select(i, builder.fadd(count, one), count) for i, count in zip(inside, counts_so_far, strict=True)]
        row = builder.add(row, INDEX(1))
        return (row, *added, *squared, *counted), builder.icmp_signed("<", row, num_rows)

    _, *totals = repeat(builder, (INDEX(0), *start, *[none] * GROUP), next_row)
    for b, place in enumerate(places[:-1]):
        store(builder, totals[b], sums, place)
        store(builder, totals[GROUP + b], squares, place)
        so_far = load(builder, counts, place, whole_numbers)
        store(builder, builder.add(so_far, builder.fptoui(totals[2 * GROUP + b], whole_numbers)), counts, place)


def add_to_bins_reference(values, at, num_rows, edges, counts, sums, squares, to, stride, origins, column):
    for i in range(num_rows):
        value = values[at + i * LANES :][:LANES]
        off = value - origins[column:][:LANES]
        for place in range(to, to + GROUP * stride, stride):
            inside = (value >= edges[place:][:LANES]) & (value < edges[place + stride :][:LANES])
            counts[place:][:LANES] += inside
            sums[place:][:LANES][inside] += value[inside]
            squares[place:][:LANES][inside] += off[inside] ** 2
