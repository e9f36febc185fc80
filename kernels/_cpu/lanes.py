"""Sixteen columns at a time: the few loops that LLVM does not vectorise by itself, as vector instructions.

Written in LLVM's own vectors, which every CPU has some form of; masks live in registers where there are mask registers.
Arrays are flat and contiguous, positions are in elements, and nothing is checked: callers stay inside.
"""

from typing import Any

import llvmlite.ir as llvm
from numba import types
from numba.extending import intrinsic

LANES = 16
# Bins that add_to_bins works on at once: their sums, counts and edges stay in registers.
GROUP = 4
# Rows whose count a byte holds.
MOST_ROWS_AT_ONCE = 255

_FLOATS = llvm.VectorType(llvm.FloatType(), LANES)
_WORDS = llvm.VectorType(llvm.IntType(32), LANES)
_HALVES = llvm.VectorType(llvm.IntType(16), LANES)
_BYTES = llvm.VectorType(llvm.IntType(8), LANES)
_INDEX = llvm.IntType(64)
# Of one element, which is all that callers promise.
_ALIGNMENT = {_FLOATS: 4, _HALVES: 2}


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _at(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(data, [position]), vector.as_pointer())


def _load(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    return builder.load(_at(builder, data, position, vector), align=_ALIGNMENT[vector])


def _store(builder: Any, value: Any, data: Any, position: Any) -> None:
    builder.store(value, _at(builder, data, position, value.type), align=_ALIGNMENT[value.type])


def _load_updates(builder: Any, array_type: Any, data: Any, position: Any) -> Any:
    """Stored updates as float32: bfloat16 arrives as uint16 and is the upper half of a float32."""
    if array_type.dtype != types.uint16:
        return _load(builder, data, position, _FLOATS)
    upper = builder.zext(_load(builder, data, position, _HALVES), _WORDS)
    return builder.bitcast(builder.shl(upper, llvm.Constant(_WORDS, [16] * LANES)), _FLOATS)


@intrinsic
def take_updates(typingctx: Any, rows: Any, at: Any, values: Any, to: Any, lowest: Any, highest: Any, column: Any) -> Any:
    """``values[to:] = rows[at:]`` as float32, and ``lowest``, ``highest`` (from ``column`` on) extended by them."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, values, lowest, highest = (_data(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 5))
        updates = _load_updates(builder, sig.args[0], rows, args[1])
        _store(builder, updates, values, args[3])
        for extreme, better in ((lowest, "<"), (highest, ">")):
            so_far = _load(builder, extreme, args[6], _FLOATS)
            _store(builder, builder.select(builder.fcmp_ordered(better, updates, so_far), updates, so_far), extreme, args[6])
        return context.get_dummy_value()

    return types.void(rows, at, values, to, lowest, highest, column), code


@intrinsic
def add_to_bins(
    typingctx: Any, values: Any, at: Any, num_rows: Any, edges: Any, counts: Any, sums: Any, to: Any, stride: Any
) -> Any:
    """Add rows of sixteen values to ``GROUP`` neighbouring bins, whose lower edges are ``edges[to + b * stride]``.

    Row i is ``values[at + i * LANES:]``; ``counts`` (uint16) and ``sums`` lie like the edges, which have one bin's more. Rows
    are added in turn; at most ``MOST_ROWS_AT_ONCE`` of them, at least one.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, edges, counts, sums = (_data(context, builder, sig.args[n], args[n]) for n in (0, 3, 4, 5))
        first, num_rows, to, stride = args[1], args[2], args[6], args[7]
        places = [to]
        for _ in range(GROUP):
            places.append(builder.add(places[-1], stride))
        edge = [_load(builder, edges, place, _FLOATS) for place in places]
        start = [_load(builder, sums, place, _FLOATS) for place in places[:-1]]
        none = llvm.Constant(_BYTES, [0] * LANES)

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        row = builder.phi(_INDEX)
        row.add_incoming(_INDEX(0), before)
        sum_ = [builder.phi(_FLOATS) for _ in range(GROUP)]
        count = [builder.phi(_BYTES) for _ in range(GROUP)]
        value = _load(builder, values, builder.add(first, builder.mul(row, _INDEX(LANES))), _FLOATS)
        reached = [builder.fcmp_ordered(">=", value, e) for e in edge]
        sums_now, counts_now = [], []
        for b in range(GROUP):
            inside = builder.xor(reached[b], reached[b + 1])  # edges ascend
            sums_now.append(builder.select(inside, builder.fadd(sum_[b], value), sum_[b]))
            counts_now.append(builder.sub(count[b], builder.sext(inside, _BYTES)))
        for b in range(GROUP):
            sum_[b].add_incoming(start[b], before)
            sum_[b].add_incoming(sums_now[b], loop)
            count[b].add_incoming(none, before)
            count[b].add_incoming(counts_now[b], loop)
        next_row = builder.add(row, _INDEX(1))
        row.add_incoming(next_row, loop)
        builder.cbranch(builder.icmp_signed("<", next_row, num_rows), loop, after)

        builder.position_at_end(after)
        for b, place in enumerate(places[:-1]):
            _store(builder, sums_now[b], sums, place)
            total = builder.add(_load(builder, counts, place, _HALVES), builder.zext(counts_now[b], _HALVES))
            _store(builder, total, counts, place)
        return context.get_dummy_value()

    return types.void(values, at, num_rows, edges, counts, sums, to, stride), code


@intrinsic
def inner_edges(
    typingctx: Any, ordered: Any, reached: Any, stride: Any, num_rows: Any, column: Any, share: Any, edges: Any, to: Any
) -> Any:
    """``edges[to:]``: where, in the ordered values of sixteen columns, ``reached`` passes ``share`` of its last row.

    Row i of ``ordered`` and ``reached`` begins at ``i * stride``. An edge is interpolated between the two values around it,
    and not below ``edges`` as it stands there, the edge before.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ordered, reached, edges = (_data(context, builder, sig.args[n], args[n]) for n in (0, 1, 6))
        stride, num_rows, column, to = args[2], args[3], args[4], args[7]
        last = builder.add(column, builder.mul(stride, builder.sub(num_rows, _INDEX(1))))
        shares = llvm.Constant(_FLOATS, llvm.Undefined)
        for lane in range(LANES):
            shares = builder.insert_element(shares, args[5], llvm.IntType(32)(lane))
        target = builder.fmul(_load(builder, reached, last, _FLOATS), shares)

        # the number of rows before the last that lie below the target; row 0 does, or all are equal
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", column, last), loop, after)
        builder.position_at_end(loop)
        place, count = builder.phi(_INDEX), builder.phi(_WORDS)
        below = builder.fcmp_ordered("<", _load(builder, reached, place, _FLOATS), target)
        next_place, next_count = builder.add(place, stride), builder.sub(count, builder.sext(below, _WORDS))
        none = llvm.Constant(_WORDS, [0] * LANES)
        for phi, start, value in ((place, column, next_place), (count, none, next_count)):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", next_place, last), loop, after)
        builder.position_at_end(after)
        row = builder.phi(_WORDS)
        row.add_incoming(none, before)
        row.add_incoming(next_count, loop)

        around = [llvm.Constant(_FLOATS, llvm.Undefined)] * 4
        for lane in range(LANES):
            number = llvm.IntType(32)(lane)
            upper_row = builder.sext(builder.extract_element(row, number), _INDEX)
            at = builder.add(builder.add(column, _INDEX(lane)), builder.mul(upper_row, stride))
            is_first = builder.icmp_signed("==", upper_row, _INDEX(0))
            places = (builder.select(is_first, at, builder.sub(at, stride)), at)
            loads = [builder.load(builder.gep(data, [place])) for data in (ordered, reached) for place in places]
            around = [builder.insert_element(v, x, number) for v, x in zip(around, loads, strict=True)]
        lower, upper, start, end = around
        gap = builder.fsub(end, start)
        zero = llvm.Constant(_FLOATS, [0.0] * LANES)
        back = builder.fdiv(builder.fsub(end, target), gap)
        back = builder.select(builder.fcmp_ordered(">", gap, zero), back, zero)
        edge = builder.fsub(upper, builder.fmul(builder.fsub(upper, lower), back))
        so_far = _load(builder, edges, to, _FLOATS)
        _store(builder, builder.select(builder.fcmp_ordered(">", edge, so_far), edge, so_far), edges, to)
        return context.get_dummy_value()

    return types.void(ordered, reached, stride, num_rows, column, share, edges, to), code


@intrinsic
def below(typingctx: Any, rows: Any, at: Any, cuts: Any, column: Any) -> Any:
    """Sixteen bits, the first column's lowest: whether ``rows[at:] < cuts[column:]``."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, cuts = (_data(context, builder, sig.args[n], args[n]) for n in (0, 2))
        updates = _load_updates(builder, sig.args[0], rows, args[1])
        flags = builder.fcmp_ordered("<", updates, _load(builder, cuts, args[3], _FLOATS))
        return builder.bitcast(flags, llvm.IntType(LANES))

    return types.uint16(rows, at, cuts, column), code
