"""A client's array as it came through Flower: bytes in NumPy's ``.npy`` format, and a description.

The client writes both, so neither is believed. An array is used only if its description, the header
within its bytes and the number of bytes are all those of the array that the server sent. Then it is
read in place: no memory is allocated, whatever a forged header says, and nothing is evaluated or
unpickled.
"""

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["UnusableReplyError", "WantedArray", "read_array", "shown"]

# Flower's name for the .npy format.
_STYPE = "numpy.ndarray"
# Version 1.0 of the format. NumPy writes a later one only for headers of 64 KiB and more.
_MAGIC = b"\x93NUMPY\x01\x00"
# What NumPy writes there. A pattern is enough, and unlike numpy.load it evaluates no expression.
_HEADER = re.compile(rb"\{'descr': '([^']{1,8})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n")
# The number of characters that are shown of what a client wrote.
_SHOWN = 80


class UnusableReplyError(ValueError):
    """A reply cannot be used. What a client wrote appears in the message only as :func:`shown`."""


def shown(thing: object) -> str:
    r"""What a client wrote, as it may appear in a log: short, and without control characters.

    Example:
        >>> shown("a\nb")
        "'a\\nb'"
    """
    thing = thing.decode("latin-1") if isinstance(thing, bytes) else thing
    text = ascii(thing[:_SHOWN] if isinstance(thing, str | tuple) else thing)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class WantedArray:
    """What an array must be to be used.

    Attributes:
        dtype: its dtype.
        dtype_name: the name of its dtype, as Flower describes arrays.
        shape: its shape.
        size: how many values it has.
        header: the bytes before the values, as NumPy writes them for an array in C order.
    """

    dtype: np.dtype[Any]
    dtype_name: str
    shape: tuple[int, ...]
    size: int
    header: bytes

    @classmethod
    def like(cls, values: np.ndarray) -> "WantedArray":
        """An array with the shape and dtype of ``values``."""
        header = io.BytesIO()
        description = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
        np.lib.format.write_array_header_1_0(header, description)
        return cls(values.dtype, str(values.dtype), values.shape, values.size, header.getvalue())


def read_array(array: Any, name: str, wanted: WantedArray) -> np.ndarray:
    """The client's array, read in place.

    Args:
        array: a Flower ``Array``.
        name: what errors call it.
        wanted: what it must be.

    Returns:
        A read-only view of the client's bytes, in the shape and dtype that are wanted. The bytes
        need not be aligned.

    Raises:
        UnusableReplyError: it is another kind of array, or its bytes are not those of one.
    """
    if array.stype != _STYPE:
        raise UnusableReplyError(f"{name} must have serialisation {_STYPE}, got {shown(array.stype)}")
    if array.dtype != wanted.dtype_name:
        raise UnusableReplyError(f"{name} must have dtype {wanted.dtype_name}, got {shown(array.dtype)}")
    if tuple(array.shape) != wanted.shape:
        raise UnusableReplyError(f"{name} must have shape {wanted.shape}, got {shown(tuple(array.shape))}")
    data = array.data
    if not isinstance(data, bytes):
        raise UnusableReplyError(f"{name} must be sent as bytes, got {type(data).__name__}")
    # Nearly all headers are exactly this one, so it is compared first. Reading one takes longer
    # than all the other checks.
    usual = data.startswith(wanted.header)
    begin, is_fortran = (len(wanted.header), False) if usual else _header(data, name, wanted)
    num_bytes = wanted.size * wanted.dtype.itemsize
    if len(data) != begin + num_bytes:
        raise UnusableReplyError(f"{name} must have {num_bytes} bytes after its header, got {len(data) - begin}")
    flat = np.frombuffer(data, wanted.dtype, wanted.size, begin)
    return flat.reshape(wanted.shape, order="F" if is_fortran else "C")


def _header(data: bytes, name: str, wanted: WantedArray) -> tuple[int, bool]:
    """Where the values begin, and whether the first axis varies fastest."""
    begin = len(_MAGIC) + 2
    if len(data) < begin or not data.startswith(_MAGIC):
        raise UnusableReplyError(f"{name} does not begin like a .npy file of version 1.0, but with {shown(data[:8])}")
    end = begin + int.from_bytes(data[len(_MAGIC) : begin], "little")
    found = _HEADER.fullmatch(data[begin:end])
    if found is None:
        raise UnusableReplyError(f"{name} has no .npy header with a plain dtype and shape, but {shown(data[begin:end])}")
    descr, fortran_order, sizes = found.groups()
    if descr != wanted.dtype.str.encode():
        raise UnusableReplyError(f"{name} has the dtype {shown(descr)} in its bytes instead of {wanted.dtype.str!r}")
    # Text of digits, because a number of thousands of digits takes long to convert.
    if sizes.replace(b" ", b"").strip(b",").split(b",") != [str(size).encode() for size in wanted.shape or ("",)]:
        raise UnusableReplyError(f"{name} has the shape {shown(sizes)} in its bytes instead of {wanted.shape}")
    return end, fortran_order == b"True"
