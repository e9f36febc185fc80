"""Code in LLVM's own vectors, for the few loops that LLVM does not vectorise well by itself.

Every CPU has some form of these vectors, and masks live in registers where there are mask
registers. ``vector_code`` makes a function of Numba from one that writes LLVM instructions. Beside
each such function stands its NumPy twin, ``*_reference``, which says what it computes; the tests
compare them.

Conventions: arrays are flat and contiguous, positions are counted in elements, and nothing is
checked, so callers must stay inside. Numba's cache does not notice changes of this file: delete
``__pycache__`` of the kernels' folders after one.
"""

import inspect
from dataclasses import dataclass

import llvmlite.ir as llvm
import numpy as np
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

LANES = 16
# The number of columns that are computed at once where each operation waits for the one before.
# Four vectors side by side keep a CPU busy; one does not.
WIDE = 4 * LANES
# The number of bytes of a cache line.
LINE = 64

INDEX = llvm.IntType(64)
FLOATS = llvm.VectorType(llvm.FloatType(), LANES)
WIDE_FLOATS = llvm.VectorType(llvm.FloatType(), WIDE)
_BYTES_OF = {llvm.IntType(16): 2, llvm.IntType(32): 4, llvm.FloatType(): 4, llvm.DoubleType(): 8}


# --- how a function is written ---


@dataclass(frozen=True)
class Elements:
    """An array in LLVM code, given by the address of its first element and Numba's element type."""

    pointer: llvm.Value
    dtype: types.Type


def vector_code(returns):
    """Make a function that Numba kernels can call from ``emit``, which writes its LLVM code.

    ``emit(builder, *arguments)`` gets arrays as :class:`Elements`, numbers as LLVM values, and None
    as None.

    Args:
        returns: Numba's type of the result; ``types.void`` if ``emit`` returns None.
    """

    def make(emit):
        def typing(typingctx, *kinds):
            def code(context, builder, sig, args):
                values = [_within_llvm(context, builder, kind, value) for kind, value in zip(sig.args, args, strict=True)]
                result = emit(builder, *values)
                return context.get_dummy_value() if result is None else result

            return returns(*kinds), code

        # Numba looks at the arguments' names. The first, the builder, stands for its typing
        # context.
        typing.__name__, typing.__doc__, typing.__signature__ = emit.__name__, emit.__doc__, inspect.signature(emit)
        return intrinsic(typing)

    return make


def _within_llvm(context, builder, kind, value):
    if isinstance(kind, types.Array):
        return Elements(context.make_array(kind)(context, builder, value).data, kind.dtype)
    return None if kind == types.none else value


def address(builder, elements, position, kind):
    """Where the element at a position lies, as a pointer to ``kind``."""
    return builder.bitcast(builder.gep(elements.pointer, [position]), kind.as_pointer())


def load(builder, elements, position, vector):
    # Aligned like one element, which is all that callers promise.
    return builder.load(address(builder, elements, position, vector), align=_BYTES_OF[vector.element])


def store(builder, value, elements, position):
    builder.store(value, address(builder, elements, position, value.type), align=_BYTES_OF[value.type.element])


def spread(builder, value, vector):
    """A vector with the value in every lane."""
    everywhere = llvm.Constant(vector, llvm.Undefined)
    for lane in range(vector.count):
        everywhere = builder.insert_element(everywhere, value, llvm.IntType(32)(lane))
    return everywhere


def load_updates(builder, elements, position, floats):
    """Load updates as ``floats``. A bfloat16 arrives as uint16, the upper half of a float32."""
    if elements.dtype != types.uint16:
        return load(builder, elements, position, floats)
    halves, words = (llvm.VectorType(llvm.IntType(bits), floats.count) for bits in (16, 32))
    upper = builder.zext(load(builder, elements, position, halves), words)
    return builder.bitcast(builder.shl(upper, llvm.Constant(words, [16] * floats.count)), floats)


def call(builder, name, result, *arguments):
    """Call one of LLVM's own functions, such as ``llvm.ctpop.v8i64``."""
    kind = llvm.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, name), arguments)


def times_plus(builder, a, b, c):
    """a * b + c, by a fused multiply-add where the processor has one."""
    bits = 64 if a.type.element == llvm.DoubleType() else 32
    return call(builder, f"llvm.fmuladd.v{a.type.count}f{bits}", a.type, a, b, c)


def repeat(builder, start, body):
    """Write a loop: ``values, again = body(*values)``, from ``start``, while ``again`` is true.

    Returns:
        The last values.
    """
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    carried = [builder.phi(value.type) for value in start]
    values, again = body(*carried)
    for phi, first, value in zip(carried, start, values, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(again, inside, after)
    builder.position_at_end(after)
    return values


# --- what several kernels call ---


@vector_code(types.void)
def fetch(builder, rows, at):
    """Tell the CPU that the cache line of ``rows[at]`` will be read soon. Nothing waits.

    A place beyond the array does no harm.
    """
    flag = llvm.IntType(32)
    place = address(builder, rows, at, llvm.IntType(8))
    # The flags say: for reading, to stay in L2, data.
    call(builder, "llvm.prefetch.p0", llvm.VoidType(), place, flag(0), flag(2), flag(1))


@vector_code(types.void)
def pack_above(builder, logits, at, threshold, bits, to):
    """Write 8 bytes to ``bits[to:]``: which of the 64 ``logits[at:]`` lie above the threshold."""
    vector = llvm.VectorType(llvm.DoubleType() if logits.dtype == types.float64 else llvm.FloatType(), WIDE)
    above = builder.fcmp_ordered(">", load(builder, logits, at, vector), spread(builder, threshold, vector))
    flags = builder.bitcast(above, llvm.IntType(WIDE))
    builder.store(flags, address(builder, bits, to, flags.type), align=1)


def pack_above_reference(logits, at, threshold, bits, to):
    bits[to : to + WIDE // 8] = np.packbits(logits[at : at + WIDE] > threshold, bitorder="little")


@vector_code(types.void)
def pack_below(builder, rows, at, cuts, column, flips, byte, bits, to):
    """Write 8 bytes to ``bits[to:]``: which of the 64 ``rows[at:]`` lie below ``cuts[column:]``.

    A bit is flipped where ``flips[byte:]`` is set.
    """
    updates = load_updates(builder, rows, at, WIDE_FLOATS)
    below = builder.fcmp_ordered("<", updates, load(builder, cuts, column, WIDE_FLOATS))
    flags = builder.bitcast(below, llvm.IntType(WIDE))
    place = address(builder, bits, to, flags.type)
    flip = builder.load(address(builder, flips, byte, flags.type), align=1)
    builder.store(builder.xor(flags, flip), place, align=1)


def pack_below_reference(rows, at, cuts, column, flips, byte, bits, to):
    below = floats_of(rows[at : at + WIDE]) < cuts[column : column + WIDE]
    bits[to : to + WIDE // 8] = np.packbits(below, bitorder="little") ^ flips[byte : byte + WIDE // 8]


def floats_of(updates):
    """What ``load_updates`` does, in NumPy."""
    return (updates.astype(np.uint32) << 16).view(np.float32) if updates.dtype == np.uint16 else updates
