"""Sixteen columns at a time, or 64: the few loops that LLVM does not vectorise well by itself, as vector instructions.

The mask step itself stands in ``wide_step.py``.

Written in LLVM's own vectors, which every CPU has some form of; masks live in registers where there are mask registers.
Arrays are flat and contiguous, positions are in elements, and nothing is checked: callers stay inside.
"""

from typing import Any

import llvmlite.ir as llvm
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

LANES = 16
# Columns at once where each operation waits for the one before, so that four vectors go side by side.
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
_INDEX = llvm.IntType(64)
_BYTES_OF = {llvm.IntType(16): 2, llvm.FloatType(): 4, llvm.DoubleType(): 8}


def data_of(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _at(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(data, [position]), vector.as_pointer())


def load(builder: Any, data: Any, position: Any, vector: Any) -> Any:
    # of one element, which is all that callers promise
    return builder.load(_at(builder, data, position, vector), align=_BYTES_OF[vector.element])


def store(builder: Any, value: Any, data: Any, position: Any) -> None:
    builder.store(value, _at(builder, data, position, value.type), align=_BYTES_OF[value.type.element])


def spread(builder: Any, value: Any, vector: Any) -> Any:
    """The value in every lane."""
    everywhere = llvm.Constant(vector, llvm.Undefined)
    for lane in range(vector.count):
        everywhere = builder.insert_element(everywhere, value, llvm.IntType(32)(lane))
    return everywhere


def load_updates(builder: Any, array_type: Any, data: Any, position: Any, floats: Any) -> Any:
    """Stored updates as ``floats``: bfloat16 arrives as uint16 and is the upper half of a float32."""
    if array_type.dtype != types.uint16:
        return load(builder, data, position, floats)
    halves, words = (llvm.VectorType(llvm.IntType(bits), floats.count) for bits in (16, 32))
    upper = builder.zext(load(builder, data, position, halves), words)
    return builder.bitcast(builder.shl(upper, llvm.Constant(words, [16] * floats.count)), floats)


@intrinsic
def fetch(typingctx: Any, rows: Any, at: Any) -> Any:
    """Tell the CPU that ``rows[at]`` and what shares its cache line will be read soon; nothing waits for it."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, flag = llvm.IntType(8).as_pointer(), llvm.IntType(32)
        kind = llvm.FunctionType(llvm.VoidType(), [pointer, flag, flag, flag])
        address = builder.bitcast(builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]]), pointer)
        # for reading, to stay in L2, data
        builder.call(get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [address, flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(rows, at), code


@intrinsic
def take_updates(typingctx: Any, rows: Any, at: Any, values: Any, to: Any, lowest: Any, highest: Any, column: Any) -> Any:
    """``values[to:] = rows[at:]`` as float32, and ``lowest``, ``highest`` (from ``column`` on) extended by them."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, values, lowest, highest = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 5))
        updates = load_updates(builder, sig.args[0], rows, args[1], _FLOATS)
        store(builder, updates, values, args[3])
        for extreme, better in ((lowest, "<"), (highest, ">")):
            so_far = load(builder, extreme, args[6], _FLOATS)
            store(builder, builder.select(builder.fcmp_ordered(better, updates, so_far), updates, so_far), extreme, args[6])
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
        values, edges, counts, sums = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 3, 4, 5))
        first, num_rows, to, stride = args[1], args[2], args[6], args[7]
        places = [to]
        for _ in range(GROUP):
            places.append(builder.add(places[-1], stride))
        edge = [load(builder, edges, place, _FLOATS) for place in places]
        start = [load(builder, sums, place, _FLOATS) for place in places[:-1]]
        none = llvm.Constant(_BYTES, [0] * LANES)

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        row = builder.phi(_INDEX)
        row.add_incoming(_INDEX(0), before)
        sum_ = [builder.phi(_FLOATS) for _ in range(GROUP)]
        count = [builder.phi(_BYTES) for _ in range(GROUP)]
        value = load(builder, values, builder.add(first, builder.mul(row, _INDEX(LANES))), _FLOATS)
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
            store(builder, sums_now[b], sums, place)
            total = builder.add(load(builder, counts, place, _HALVES), builder.zext(counts_now[b], _HALVES))
            store(builder, total, counts, place)
        return context.get_dummy_value()

    return types.void(values, at, num_rows, edges, counts, sums, to, stride), code


@intrinsic
def order(typingctx: Any, values: Any, low: Any, high: Any) -> Any:
    """Swap ``values[low:]`` and ``values[high:]``, of 64 columns, where the second is smaller."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = data_of(context, builder, sig.args[0], args[0])
        low, high = (load(builder, values, place, _WIDE_FLOATS) for place in args[1:])
        swap = builder.fcmp_ordered(">", low, high)
        store(builder, builder.select(swap, high, low), values, args[1])
        store(builder, builder.select(swap, low, high), values, args[2])
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
        ordered, reached, edges = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 1, 7))
        stride, num_rows, column, to = args[2], args[3], args[4], args[8]
        last = builder.add(column, builder.mul(stride, builder.sub(num_rows, _INDEX(1))))
        target = builder.fmul(load(builder, reached, last, _FLOATS), spread(builder, args[5], _FLOATS))

        # the number of rows before the last that lie below the target; row 0 does, or all are equal
        counts = spread(builder, builder.trunc(args[6], llvm.IntType(32)), _WORDS)
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        start = builder.add(column, builder.mul(stride, args[6]))
        builder.cbranch(builder.icmp_signed("<", start, last), loop, after)
        builder.position_at_end(loop)
        place, count = builder.phi(_INDEX), builder.phi(_WORDS)
        below = builder.fcmp_ordered("<", load(builder, reached, place, _FLOATS), target)
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
        so_far = load(builder, edges, to, _FLOATS)
        store(builder, builder.select(builder.fcmp_ordered(">", edge, so_far), edge, so_far), edges, to)
        return builder.zext(least, _INDEX)

    return types.int64(ordered, reached, stride, num_rows, column, share, first, edges, to), code


@intrinsic
def pack_below(typingctx: Any, rows: Any, at: Any, cuts: Any, column: Any, flips: Any, byte: Any, bits: Any, to: Any) -> Any:
    """``bits[to:]``, eight bytes: ``rows[at:] < cuts[column:]`` of 64 columns, flipped where ``flips[byte:]`` is set."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, cuts, flips, bits = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 6))
        updates = load_updates(builder, sig.args[0], rows, args[1], _WIDE_FLOATS)
        below = builder.fcmp_ordered("<", updates, load(builder, cuts, args[3], _WIDE_FLOATS))
        flags = builder.bitcast(below, llvm.IntType(WIDE))
        place = builder.bitcast(builder.gep(bits, [args[7]]), flags.type.as_pointer())
        flip = builder.load(builder.bitcast(builder.gep(flips, [args[5]]), flags.type.as_pointer()), align=1)
        builder.store(builder.xor(flags, flip), place, align=1)
        return context.get_dummy_value()

    return types.void(rows, at, cuts, column, flips, byte, bits, to), code
