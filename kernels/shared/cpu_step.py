"""The training step on a CPU, 64 columns at a time, in vectors.

The rows of ``mask_step/``, the bins of ``bins/`` and the values of ``cuts/`` all take it, so their
logits are equal to the bit. In float32 the exponential is a polynomial, in float64 the C library's.
The conventions are those of ``vectors.py``.
"""

import llvmlite.ir as llvm
import numpy as np
from numba import types

from skymask_gpu.kernels.shared.vectors import (
    WIDE,
    WIDE_FLOATS,
    call,
    floats_of,
    load,
    load_updates,
    spread,
    store,
    times_plus,
    vector_code,
)

_WORDS = llvm.VectorType(llvm.IntType(32), WIDE)
_WIDE_DOUBLES = llvm.VectorType(llvm.DoubleType(), WIDE)

_MINUS_LOG2_E = -1.4426950408889634
# Adding 1.5 * 2**23 rounds a float32 to an integer, which the low bits then hold.
_ROUND = 12582912.0
# exp(87) is still a normal float32.
_LARGEST = 87.0
# The coefficients, highest power first, of a polynomial that approximates 2**f for |f| <= 1/2. It
# passes through the Chebyshev nodes, and its relative error is below 1e-8.
_POWER_OF_2 = (1.545316295e-04, 1.339086336e-03, 9.618082557e-03, 5.550357114e-02, 2.402265076e-01, 6.931471880e-01, 1.0)


def _vector_of(elements):
    return _WIDE_DOUBLES if elements.dtype == types.float64 else WIDE_FLOATS


def _all(value, vector):
    return llvm.Constant(vector, [float(np.float32(value))] * WIDE)


def _clamp(builder, value, limit):
    low, high = _all(-limit, value.type), _all(limit, value.type)
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    return builder.select(builder.fcmp_ordered("<", value, high), value, high)


def _sigmoid(builder, x):
    one = _all(1.0, x.type)
    if x.type == _WIDE_DOUBLES:
        e = call(builder, f"llvm.exp.v{WIDE}f64", _WIDE_DOUBLES, builder.fneg(x))
    else:
        e = _exp_of_minus(builder, x)
    return builder.fdiv(one, builder.fadd(one, e))


def _exp_of_minus(builder, x):
    """exp(-x) in float32."""
    exponent = builder.fmul(_clamp(builder, x, _LARGEST), _all(_MINUS_LOG2_E, WIDE_FLOATS))
    rounded = builder.fadd(exponent, _all(_ROUND, WIDE_FLOATS))
    f = builder.fsub(exponent, builder.fsub(rounded, _all(_ROUND, WIDE_FLOATS)))
    p = _all(_POWER_OF_2[0], WIDE_FLOATS)
    for c in _POWER_OF_2[1:]:
        p = times_plus(builder, p, f, _all(c, WIDE_FLOATS))
    # Adding to the exponent field multiplies by a power of 2.
    power = builder.shl(builder.bitcast(rounded, _WORDS), llvm.Constant(_WORDS, [23] * WIDE))
    return builder.bitcast(builder.add(builder.bitcast(p, _WORDS), power), WIDE_FLOATS)


def _moved(builder, logit, update, slope, mean, full_step):
    """The logit after one step. One full step from 1 gives exactly 0."""
    gate = _sigmoid(builder, logit)
    slope_of_gate = times_plus(builder, builder.fneg(gate), gate, gate)
    gradient = builder.fmul(builder.fmul(slope, slope_of_gate), builder.fsub(update, mean))
    step = builder.fneg(spread(builder, full_step, logit.type))
    return times_plus(builder, _clamp(builder, gradient, 1.0), step, logit)


@vector_code(types.void)
def move(builder, updates, at, logits, start, slopes, means, column, full_step, moved, to):
    """Take a step with the 64 logits ``logits[start:]``, and write them to ``moved[to:]``.

    The updates are ``updates[at:]``; slopes and means are taken from ``column`` on.
    """
    vector = _vector_of(logits)
    update = load_updates(builder, updates, at, vector)
    slope, mean = (load(builder, x, column, vector) for x in (slopes, means))
    logit = _moved(builder, load(builder, logits, start, vector), update, slope, mean, full_step)
    store(builder, logit, moved, to)


def move_reference(updates, at, logits, start, slopes, means, column, full_step, moved, to):
    columns, logit = slice(column, column + WIDE), logits[start : start + WIDE]
    gate = 1 / (1 + np.exp(-logit))
    gradient = slopes[columns] * gate * (1 - gate) * (floats_of(updates[at : at + WIDE]) - means[columns])
    moved[to : to + WIDE] = logit - np.clip(gradient, -1, 1) * full_step


@vector_code(types.void)
def move_and_add(builder, updates, at, weights, logits, to, slopes, means, gate_sums, weighted_sums, column, full_step):
    """Like ``move``, but in place; what the new logits contribute is added to both sums per column.

    ``weights`` is None if each logit belongs to one row. If it belongs to a bin, ``weights[to:]``
    say for how many rows the bin counts.
    """
    vector = _vector_of(logits)
    update = load_updates(builder, updates, at, vector)
    slope, mean = (load(builder, x, column, vector) for x in (slopes, means))
    logit = _moved(builder, load(builder, logits, to, vector), update, slope, mean, full_step)
    store(builder, logit, logits, to)
    weight = _sigmoid(builder, logit)
    if weights is not None:
        weight = builder.fmul(weight, load(builder, weights, to, vector))
    store(builder, builder.fadd(load(builder, gate_sums, column, vector), weight), gate_sums, column)
    total = times_plus(builder, weight, update, load(builder, weighted_sums, column, vector))
    store(builder, total, weighted_sums, column)


def move_and_add_reference(updates, at, weights, logits, to, slopes, means, gate_sums, weighted_sums, column, full_step):
    move_reference(updates, at, logits, to, slopes, means, column, full_step, logits, to)
    weight = (1 if weights is None else weights[to : to + WIDE]) / (1 + np.exp(-logits[to : to + WIDE]))
    gate_sums[column : column + WIDE] += weight
    weighted_sums[column : column + WIDE] += weight * floats_of(updates[at : at + WIDE])
