"""Sixteen columns at a time, or 64: the few loops that LLVM does not vectorise well by itself, as vector instructions.

Written in LLVM's own vectors, which every CPU has some form of; masks live in registers where there are mask registers.
Arrays are flat and contiguous, positions are in elements, and nothing is checked: callers stay inside.
"""

from typing import Any

import llvmlite.ir as llvm
import numpy as np
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from skymask_gpu.kernels._cpu.common import LARGEST, MINUS_LOG2_E, POWER_OF_2, ROUND

LANES = 16
# Columns that a mask step takes at once: each operation waits for the one before, so four vectors go side by side.
WIDE = 4 * LANES
# Bytes of a cache line.
LINE = 64
# Bins that add_to_bins works on at once: their sums, counts and edges stay in registers.
GROUP = 4
# Rows whose count a byte holds.
MOST_ROWS_AT_ONCE = 255

_FLOATS = llvm.VectorType(llvm.FloatType(), LANES)
_WORDS = llvm.VectorType(llvm.IntType(32), LANES)
_HALVES = llvm.VectorType(llvm.IntType(16), LANES)
_BYTES = llvm.VectorType(llvm.IntType(8), LANES)
_WIDE_FLOATS = llvm.VectorType(llvm.FloatType(), WIDE)
_WIDE_WORDS = llvm.VectorType(llvm.IntType(32), WIDE)
_WIDE_HALVES = llvm.VectorType(llvm.IntType(16), WIDE)
_INDEX = llvm.IntType(64)
# Of one element, which is all that callers promise.
_ALIGNMENT = {_FLOATS: 4, _HALVES: 2, _WIDE_FLOATS: 4, _WIDE_HALVES: 2}


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _at(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(data, [position]), vector.as_pointer())


def _load(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    return builder.load(_at(builder, data, position, vector), align=_ALIGNMENT[vector])


def _store(builder: Any, value: Any, data: Any, position: Any) -> None:
    builder.store(value, _at(builder, data, position, value.type), align=_ALIGNMENT[value.type])


def _load_updates(builder: Any, array_type: Any, data: Any, position: Any, floats: Any) -> Any:
    """Stored updates as float32: bfloat16 arrives as uint16 and is the upper half of a float32."""
    if array_type.dtype != types.uint16:
        return _load(builder, data, position, floats)
    halves, words = (llvm.VectorType(llvm.IntType(bits), floats.count) for bits in (16, 32))
    upper = builder.zext(_load(builder, data, position, halves), words)
    return builder.bitcast(builder.shl(upper, llvm.Constant(words, [16] * floats.count)), floats)


@intrinsic
def fetch(typingctx: Any, rows: Any, at: Any) -> Any:
    """Tell the CPU that ``rows[at]`` and what shares its cache line will be read soon; nothing waits for it."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, flag = llvm.IntType(8).as_pointer(), llvm.IntType(32)
        kind = llvm.FunctionType(llvm.VoidType(), [pointer, flag, flag, flag])
        address = builder.bitcast(builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]]), pointer)
        # for reading, to stay in L2, data
        builder.call(get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [address, flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(rows, at), code


@intrinsic
def take_updates(typingctx: Any, rows: Any, at: Any, values: Any, to: Any, lowest: Any, highest: Any, column: Any) -> Any:
    """``values[to:] = rows[at:]`` as float32, and ``lowest``, ``highest`` (from ``column`` on) extended by them."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, values, lowest, highest = (_data(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 5))
        updates = _load_updates(builder, sig.args[0], rows, args[1], _FLOATS)
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
def order(typingctx: Any, values: Any, low: Any, high: Any) -> Any:
    """Swap ``values[low:]`` and ``values[high:]``, of 64 columns, where the second is smaller."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = _data(context, builder, sig.args[0], args[0])
        low, high = (_load(builder, values, place, _WIDE_FLOATS) for place in args[1:])
        swap = builder.fcmp_ordered(">", low, high)
        _store(builder, builder.select(swap, high, low), values, args[1])
        _store(builder, builder.select(swap, low, high), values, args[2])
        return context.get_dummy_value()

    return types.void(values, low, high), code


@intrinsic
def inner_edges(
    typingctx: Any,
    ordered: Any,
    reached: Any,
    stride: Any,
    num_rows: Any,
    column: Any,
    share: Any,
    first: Any,
    edges: Any,
    to: Any,
) -> Any:
    """``edges[to:]``: where, in the ordered values of sixteen columns, ``reached`` passes ``share`` of its last row.

    Row i of ``ordered`` and ``reached`` begins at ``i * stride``, and ``reached`` ascends. An edge is interpolated between the
    two values around it, and not below ``edges`` as it stands there, the edge before. ``first``: a row before which no column
    passes; returned is such a row for every larger share.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ordered, reached, edges = (_data(context, builder, sig.args[n], args[n]) for n in (0, 1, 7))
        stride, num_rows, column, to = args[2], args[3], args[4], args[8]
        last = builder.add(column, builder.mul(stride, builder.sub(num_rows, _INDEX(1))))
        shares = llvm.Constant(_FLOATS, llvm.Undefined)
        for lane in range(LANES):
            shares = builder.insert_element(shares, args[5], llvm.IntType(32)(lane))
        target = builder.fmul(_load(builder, reached, last, _FLOATS), shares)

        # the number of rows before the last that lie below the target; row 0 does, or all are equal
        counts = llvm.Constant(_WORDS, llvm.Undefined)
        for lane in range(LANES):
            counts = builder.insert_element(counts, builder.trunc(args[6], llvm.IntType(32)), llvm.IntType(32)(lane))
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        start = builder.add(column, builder.mul(stride, args[6]))
        builder.cbranch(builder.icmp_signed("<", start, last), loop, after)
        builder.position_at_end(loop)
        place, count = builder.phi(_INDEX), builder.phi(_WORDS)
        below = builder.fcmp_ordered("<", _load(builder, reached, place, _FLOATS), target)
        next_place, next_count = builder.add(place, stride), builder.sub(count, builder.sext(below, _WORDS))
        for phi, before_loop, value in ((place, start, next_place), (count, counts, next_count)):
            phi.add_incoming(before_loop, before)
            phi.add_incoming(value, loop)
        any_below = builder.icmp_unsigned("!=", builder.bitcast(below, llvm.IntType(LANES)), llvm.IntType(LANES)(0))
        builder.cbranch(builder.and_(any_below, builder.icmp_signed("<", next_place, last)), loop, after)
        builder.position_at_end(after)
        row = builder.phi(_WORDS)
        row.add_incoming(counts, before)
        row.add_incoming(next_count, loop)
        least_type = llvm.FunctionType(llvm.IntType(32), [_WORDS])
        least = builder.call(get_or_insert_function(builder.module, least_type, f"llvm.vector.reduce.umin.v{LANES}i32"), [row])

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
        return builder.zext(least, _INDEX)

    return types.int64(ordered, reached, stride, num_rows, column, share, first, edges, to), code


@intrinsic
def pack_below(typingctx: Any, rows: Any, at: Any, cuts: Any, column: Any, flips: Any, byte: Any, bits: Any, to: Any) -> Any:
    """``bits[to:]``, eight bytes: ``rows[at:] < cuts[column:]`` of 64 columns, flipped where ``flips[byte:]`` is set."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, cuts, flips, bits = (_data(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 6))
        updates = _load_updates(builder, sig.args[0], rows, args[1], _WIDE_FLOATS)
        below = builder.fcmp_ordered("<", updates, _load(builder, cuts, args[3], _WIDE_FLOATS))
        flags = builder.bitcast(below, llvm.IntType(WIDE))
        place = builder.bitcast(builder.gep(bits, [args[7]]), flags.type.as_pointer())
        flip = builder.load(builder.bitcast(builder.gep(flips, [args[5]]), flags.type.as_pointer()), align=1)
        builder.store(builder.xor(flags, flip), place, align=1)
        return context.get_dummy_value()

    return types.void(rows, at, cuts, column, flips, byte, bits, to), code


# --- the mask step, 64 columns at a time --------------------------------------------------------------------------------


def _wide(value: float) -> Any:
    return llvm.Constant(_WIDE_FLOATS, [float(np.float32(value))] * WIDE)


def _times_plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, as one instruction where there is one."""
    kind = llvm.FunctionType(_WIDE_FLOATS, [_WIDE_FLOATS] * 3)
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDE}f32"), [a, b, c])


def _clamp(builder: Any, value: Any, limit: float) -> Any:
    low, high = _wide(-limit), _wide(limit)
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    return builder.select(builder.fcmp_ordered("<", value, high), value, high)


def _sigmoid(builder: Any, x: Any) -> Any:
    """As ``common.sigmoid`` of float32."""
    y = _clamp(builder, x, LARGEST)
    exponent = builder.fmul(y, _wide(MINUS_LOG2_E))
    rounded = builder.fadd(exponent, _wide(ROUND))
    f = builder.fsub(exponent, builder.fsub(rounded, _wide(ROUND)))
    p = _wide(POWER_OF_2[0])
    for c in POWER_OF_2[1:]:
        p = _times_plus(builder, p, f, _wide(c))
    power = builder.shl(builder.bitcast(rounded, _WIDE_WORDS), llvm.Constant(_WIDE_WORDS, [23] * WIDE))
    e = builder.bitcast(builder.add(builder.bitcast(p, _WIDE_WORDS), power), _WIDE_FLOATS)
    return builder.fdiv(_wide(1.0), builder.fadd(_wide(1.0), e))


def _moved(builder: Any, logit: Any, value: Any, slope: Any, mean: Any, full_step: Any) -> Any:
    """The logit after one step."""
    gate = _sigmoid(builder, logit)
    slope_of_gate = _times_plus(builder, builder.fneg(gate), gate, gate)
    gradient = builder.fmul(builder.fmul(slope, slope_of_gate), builder.fsub(value, mean))
    step = llvm.Constant(_WIDE_FLOATS, llvm.Undefined)
    for lane in range(WIDE):
        step = builder.insert_element(step, full_step, llvm.IntType(32)(lane))
    return _times_plus(builder, builder.fneg(_clamp(builder, gradient, 1.0)), step, logit)


@intrinsic
def move(
    typingctx: Any, values: Any, at: Any, logits: Any, to: Any, slopes: Any, means: Any, column: Any, full_step: Any
) -> Any:
    """One step of ``logits[to:]``, of 64 columns: updates ``values[at:]``, ``slopes`` and ``means`` from ``column`` on."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, logits, slopes, means = (_data(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 5))
        value, slope, mean = (
            _load(builder, *x, _WIDE_FLOATS) for x in ((values, args[1]), (slopes, args[6]), (means, args[6]))
        )
        logit = _moved(builder, _load(builder, logits, args[3], _WIDE_FLOATS), value, slope, mean, args[7])
        _store(builder, logit, logits, args[3])
        return context.get_dummy_value()

    return types.void(values, at, logits, to, slopes, means, column, full_step), code


@intrinsic
def move_bin(
    typingctx: Any,
    centres: Any,
    counts: Any,
    logits: Any,
    at: Any,
    slopes: Any,
    means: Any,
    gate_sums: Any,
    weighted_sums: Any,
    column: Any,
    full_step: Any,
) -> Any:
    """One step of one bin of 64 columns, ``logits[at:]``, and its part in both sums of the columns, which are added to."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        arrays = (_data(context, builder, sig.args[n], args[n]) for n in (0, 1, 2, 4, 5, 6, 7))
        centres, counts, logits, slopes, means, gate_sums, weighted_sums = arrays
        at, column = args[3], args[8]
        centre, slope, mean = (_load(builder, *x, _WIDE_FLOATS) for x in ((centres, at), (slopes, column), (means, column)))
        logit = _moved(builder, _load(builder, logits, at, _WIDE_FLOATS), centre, slope, mean, args[9])
        _store(builder, logit, logits, at)
        count = builder.uitofp(_load(builder, counts, at, _WIDE_HALVES), _WIDE_FLOATS)
        weight = builder.fmul(_sigmoid(builder, logit), count)
        total = builder.fadd(_load(builder, gate_sums, column, _WIDE_FLOATS), weight)
        _store(builder, total, gate_sums, column)
        total = _times_plus(builder, weight, centre, _load(builder, weighted_sums, column, _WIDE_FLOATS))
        _store(builder, total, weighted_sums, column)
        return context.get_dummy_value()

    return types.void(centres, counts, logits, at, slopes, means, gate_sums, weighted_sums, column, full_step), code
