"""Rows of x and y at their addresses, in the dtypes of models, and what is known of x before it becomes integers.

Loops get addresses: for numba to take a dozen arrays apart costs more than some small products do. Loops elsewhere are
compiled with what is here, and numba doesn't look at this file when it asks whether they are still good: after a change
delete what it keeps, `__pycache__/*.nb?`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic
def _pointer(context: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to numbers of a dtype, or to whole ones of as many bytes as a tuple is long."""
    own = types.CPointer(dtype.dtype if isinstance(dtype, types.NumberClass) else _WHOLE[dtype.count])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return own(types.int64, dtype), generate


_WHOLE = {2: types.uint16, 4: types.int32}


@intrinsic
def _from_half(_context: Any, bits: Any) -> Any:
    """The float32 that bits of a float16 are."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_half(_context: Any, number: Any) -> Any:
    """Bits of the float16 nearest to a float32."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def array(address: Any, shape: Any, dtype: Any) -> Any:
    """What lies at an address as an array; see `_pointer`."""
    return carray(_pointer(address, dtype), shape)


@njit(cache=True, nogil=True, error_model="numpy")
def read(address: Any, kind: Any, shape: Any) -> Any:
    """Rows of x, [m, k] in the dtype whose place in `base.DTYPES` is given, as float32; those are not copied."""
    if kind == 0:
        return carray(_pointer(address, np.float32), shape)
    out, own = np.empty(shape, np.float32), carray(_pointer(address, np.uint16), shape)
    numbers, bits, words = out.reshape(-1), own.reshape(-1), out.reshape(-1).view(np.uint32)
    if kind == 1:
        for i in range(bits.size):
            numbers[i] = _from_half(bits[i])
    else:
        for i in range(bits.size):
            words[i] = np.uint32(bits[i]) << np.uint32(16)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
def room(address: Any, kind: Any, shape: Any) -> Any:
    """Where float32 [m, n] are put that `write` writes: at once where they go, if that is their dtype."""
    return carray(_pointer(address, np.float32), shape) if kind == 0 else np.empty(shape, np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def write(y: Any, address: Any, kind: Any) -> None:
    """Write float32 in the dtype whose place is given, each rounded to the nearest, of two such the even one."""
    numbers, words, out = y.reshape(-1), y.reshape(-1).view(np.uint32), carray(_pointer(address, np.uint16), y.size)
    if kind == 1:
        for i in range(out.size):
            out[i] = _to_half(numbers[i])
    elif kind == 2:
        for i in range(out.size):
            word = words[i]
            upper = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            odd = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # a NaN must not become something else
            out[i] = np.uint16(0x7FC0) if odd else np.uint16(upper)


@njit(cache=True, nogil=True, error_model="numpy")
def largest(x: Any) -> Any:
    """The largest magnitude in x, float32 and contiguous; NaN counts as more than infinity."""
    bits, out = x.view(np.int32), np.empty(1, np.int32)
    found = np.int32(0)
    for i in range(bits.size):
        found = max(found, bits[i] & np.int32(0x7FFFFFFF))  # whole numbers have an order that vectors keep
    out[0] = found
    return out.view(np.float32)[0]


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def total(x: Any) -> Any:
    """Sum of x, in any order."""
    out = np.float32(0)
    for i in range(x.size):
        out += x[i]
    return out
