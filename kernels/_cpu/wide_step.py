"""The mask step, 64 columns at a time, in vectors: what the fused and the collapsed kernels share on a CPU.

A step is one chain of operations, each waiting for the one before: four vectors side by side keep a CPU busy, one does not.
In float32 the exponential is a polynomial, in float64 the C library's. The conventions are those of ``lanes.py``.
"""

from typing import Any

import llvmlite.ir as llvm
import numpy as np
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from skymask_gpu.kernels._cpu.lanes import WIDE, data_of, load, load_updates, spread, store

_WORDS = llvm.VectorType(llvm.IntType(32), WIDE)
_HALVES = llvm.VectorType(llvm.IntType(16), WIDE)
_FLOATS = llvm.VectorType(llvm.FloatType(), WIDE)
_DOUBLES = llvm.VectorType(llvm.DoubleType(), WIDE)

_MINUS_LOG2_E = -1.4426950408889634
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer and leaves that in the low bits
_LARGEST = 87.0  # exp(87) is still a normal float32
# 2**f on |f| <= 1/2, highest power first: the polynomial through the Chebyshev nodes, error below 1e-8 relative
_POWER_OF_2 = (1.545316295e-04, 1.339086336e-03, 9.618082557e-03, 5.550357114e-02, 2.402265076e-01, 6.931471880e-01, 1.0)


def _vector_of(array_type: Any) -> Any:
    return _DOUBLES if array_type.dtype == types.float64 else _FLOATS


def _all(value: float, vector: Any) -> Any:
    return llvm.Constant(vector, [float(np.float32(value))] * WIDE)


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    vector = arguments[0].type
    kind = llvm.FunctionType(vector, [vector] * len(arguments))
    bits = 64 if vector == _DOUBLES else 32
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDE}f{bits}"), arguments)


def _times_plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, as one instruction where there is one."""
    return _call(builder, "fmuladd", [a, b, c])


def _clamp(builder: Any, value: Any, limit: float) -> Any:
    low, high = _all(-limit, value.type), _all(limit, value.type)
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    return builder.select(builder.fcmp_ordered("<", value, high), value, high)


def _sigmoid(builder: Any, x: Any) -> Any:
    one = _all(1.0, x.type)
    e = _call(builder, "exp", [builder.fneg(x)]) if x.type == _DOUBLES else _exp_of_minus(builder, x)
    return builder.fdiv(one, builder.fadd(one, e))


def _exp_of_minus(builder: Any, x: Any) -> Any:
    """exp(-x), float32."""
    exponent = builder.fmul(_clamp(builder, x, _LARGEST), _all(_MINUS_LOG2_E, _FLOATS))
    rounded = builder.fadd(exponent, _all(_ROUND, _FLOATS))
    f = builder.fsub(exponent, builder.fsub(rounded, _all(_ROUND, _FLOATS)))
    p = _all(_POWER_OF_2[0], _FLOATS)
    for c in _POWER_OF_2[1:]:
        p = _times_plus(builder, p, f, _all(c, _FLOATS))
    # times the power of 2: added to the exponent field
    power = builder.shl(builder.bitcast(rounded, _WORDS), llvm.Constant(_WORDS, [23] * WIDE))
    return builder.bitcast(builder.add(builder.bitcast(p, _WORDS), power), _FLOATS)


def _moved(builder: Any, logit: Any, update: Any, slope: Any, mean: Any, full_step: Any) -> Any:
    """The logit after one step; one full step from 1 is 0 exactly."""
    gate = _sigmoid(builder, logit)
    slope_of_gate = _times_plus(builder, builder.fneg(gate), gate, gate)
    gradient = builder.fmul(builder.fmul(slope, slope_of_gate), builder.fsub(update, mean))
    step = builder.fneg(spread(builder, full_step, logit.type))
    return _times_plus(builder, _clamp(builder, gradient, 1.0), step, logit)


@intrinsic
def move(
    typingctx: Any,
    updates: Any,
    at: Any,
    logits: Any,
    start: Any,
    slopes: Any,
    means: Any,
    column: Any,
    full_step: Any,
    moved: Any,
    to: Any,
) -> Any:
    """``moved[to:]``: 64 of ``logits[start:]``, one step on; updates ``updates[at:]``, slopes and means from ``column`` on."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        updates, logits, slopes, means, moved = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 2, 4, 5, 8))
        vector = _vector_of(sig.args[2])
        update = load_updates(builder, sig.args[0], updates, args[1], vector)
        slope, mean = (load(builder, x, args[6], vector) for x in (slopes, means))
        logit = _moved(builder, load(builder, logits, args[3], vector), update, slope, mean, args[7])
        store(builder, logit, moved, args[9])
        return context.get_dummy_value()

    return types.void(updates, at, logits, start, slopes, means, column, full_step, moved, to), code


@intrinsic
def move_and_add(
    typingctx: Any,
    updates: Any,
    at: Any,
    counts: Any,
    logits: Any,
    to: Any,
    slopes: Any,
    means: Any,
    gate_sums: Any,
    weighted_sums: Any,
    column: Any,
    full_step: Any,
) -> Any:
    """As ``move``, in place, and the part in both sums of each column, which are added to.

    ``counts``: None for a row; uint16 for a bin that stands for ``counts[to:]`` rows.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        arrays = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 3, 5, 6, 7, 8))
        updates, logits, slopes, means, gate_sums, weighted_sums = arrays
        to, column, vector = args[4], args[9], _vector_of(sig.args[3])
        update = load_updates(builder, sig.args[0], updates, args[1], vector)
        slope, mean = (load(builder, x, column, vector) for x in (slopes, means))
        logit = _moved(builder, load(builder, logits, to, vector), update, slope, mean, args[10])
        store(builder, logit, logits, to)
        weight = _sigmoid(builder, logit)
        if sig.args[2] != types.none:
            count = load(builder, data_of(context, builder, sig.args[2], args[2]), to, _HALVES)
            weight = builder.fmul(weight, builder.uitofp(count, vector))
        store(builder, builder.fadd(load(builder, gate_sums, column, vector), weight), gate_sums, column)
        total = _times_plus(builder, weight, update, load(builder, weighted_sums, column, vector))
        store(builder, total, weighted_sums, column)
        return context.get_dummy_value()

    return types.void(updates, at, counts, logits, to, slopes, means, gate_sums, weighted_sums, column, full_step), code


@intrinsic
def pack_above(typingctx: Any, logits: Any, at: Any, threshold: Any, bits: Any, to: Any) -> Any:
    """``bits[to:]``, eight bytes: whether ``logits[at:]``, of 64 columns, lie above the threshold."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        logits, bits = (data_of(context, builder, sig.args[n], args[n]) for n in (0, 3))
        vector = _vector_of(sig.args[0])
        above = builder.fcmp_ordered(">", load(builder, logits, args[1], vector), spread(builder, args[2], vector))
        flags = builder.bitcast(above, llvm.IntType(WIDE))
        builder.store(flags, builder.bitcast(builder.gep(bits, [args[4]]), flags.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(logits, at, threshold, bits, to), code
