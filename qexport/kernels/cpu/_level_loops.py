"""Loops of `fp_asym`: products of levels with x by tables, sixteen rows of the weight at a time.

All levels times a number of x, as integers of 24 bits, are a table of sixteen entries; those of four neighbouring
numbers are 64, and one instruction of AVX-512 (VBMI) picks a byte for each of four codes of each of sixteen rows.
Another (VNNI) adds the four to an int32, and again those only whose level lies above 0, which have a bit of their own.
Three times that, for the three bytes of an entry, is all that 64 weights cost. Sums are exact until a piece ends.

numba's own loops don't become that, so the innermost loop is written in LLVM's language. Counts are known when it is
compiled: they come as lengths of tuples, which are types to numba. All is in one file because numba looks only at that
when it asks whether what it has compiled before is still good.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
BLOCKS = 2  # of 16 rows that are worked off at once
ROWS = LANES * BLOCKS
SIDE = 8  # the bit of a code that says that its level lies above 0
LONGEST = 512  # columns of a piece of a group
_FEW = 32  # pieces that are added before they meet others
_DIGITS = 3  # bytes of an entry
_TABLE = 64 * _DIGITS  # bytes of the tables of four columns
_AHEAD = 16384  # bytes of codes that the second cache is asked for before they are read
_LEAST = np.float32(1e-31)  # a piece of x whose largest number is less counts as 0

_WIDE, _INT = ir.IntType(64), ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), 64)


def fast() -> bool:
    """Whether numba compiles for a processor that has the instructions."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return {"+avx512vbmi", "+avx512vnni"} <= set(features.split(","))


@intrinsic
def _column(_context: Any, levels: Any, factor: Any, table: Any) -> Any:
    """Write the table of a column: sixteen bytes of each digit, 64 bytes apart, the highest digits first.

    Args:
        levels: address of sixteen floats.
        factor: what they are multiplied by, which gives at most 127 * 2^16.
        table: address.
    """

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        levels, factor, table = arguments
        nearest = builder.module.declare_intrinsic("llvm.rint.v16f32", fnty=ir.FunctionType(_FLOATS, [_FLOATS]))
        factors = builder.bitcast(_spread(builder, builder.bitcast(factor, _INT)), _FLOATS)
        values = builder.call(nearest, [builder.fmul(_load(builder, _FLOATS, levels, 0), factors)])
        raised = builder.add(builder.fptosi(values, _INTS), _ints(0x808080))
        digits = builder.xor(raised, _ints(0x808080))  # bytes with a sign
        for d in range(_DIGITS):
            own = builder.trunc(builder.lshr(digits, _ints(16 - 8 * d)), ir.VectorType(ir.IntType(8), LANES))
            target = builder.inttoptr(builder.add(table, _WIDE(64 * d)), own.type.as_pointer())
            builder.store(own, target, align=1)
        return _INT(0)

    return types.int32(levels, factor, table), generate


@intrinsic
def _piece(_context: Any, scales: Any, words: Any, tables: Any, steps: Any, numbers: Any) -> Any:
    """Add what a piece of a group of columns gives to totals of `ROWS` rows.

    Args:
        scales: a tuple of as many as a group has, 1 or 2.
        words: address of the first codes: `BLOCKS` x 64 bytes for each step of eight columns.
        tables: address of the first tables: two times 3 x 64 bytes for each step.
        steps: how many.
        numbers: a float32, what sums are multiplied by; addresses of the scales, those of levels above 0 for each row
            and then of the others, and of the totals.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _scales, words, tables, steps, numbers = arguments
        sums = _loop(builder, signature.args[0].count, words, tables, steps)
        _finish(builder, sums, [builder.extract_value(numbers, i) for i in range(3)])
        return _INT(0)

    return types.int32(scales, words, tables, steps, numbers), generate


def _loop(builder: Any, scales: int, words: Any, tables: Any, steps: Any) -> list[list[Any]]:
    """Sums of each block: of each digit over all, and then over what lies above 0 if that has its own scale."""
    before, body, behind = builder.block, builder.append_basic_block("step"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(_WIDE)
    i.add_incoming(_WIDE(0), before)
    sums = [[builder.phi(_INTS) for _ in range(_DIGITS * scales)] for _ in range(BLOCKS)]
    place = builder.add(words, builder.mul(i, _WIDE(64 * BLOCKS)))
    table = builder.add(tables, builder.mul(i, _WIDE(2 * _TABLE)))
    now = [list(own) for own in sums]
    for b in range(BLOCKS):
        _fetch(builder, builder.add(place, _WIDE(_AHEAD + 64 * b)))
    found = [_load(builder, _INTS, place, 64 * b) for b in range(BLOCKS)]
    for half in range(2):
        if half:
            found = [builder.lshr(codes, _ints(4)) for codes in found]
        digits = [_load(builder, _BYTES, table, _TABLE * half + 64 * d) for d in range(_DIGITS)]
        now = [_four(builder, scales, codes, digits, own) for codes, own in zip(found, now, strict=True)]
    following = builder.add(i, _WIDE(1))
    i.add_incoming(following, body)
    for phis, values in zip(sums, now, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(_ints(0), before)
            phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, steps), body, behind)
    builder.position_at_end(behind)
    return now


def _four(builder: Any, scales: int, codes: Any, tables: list[Any], sums: list[Any]) -> list[Any]:
    """Sums of a block with `SIDE` times what four columns give, whose codes are the lower halves of bytes."""
    pick = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.qi.512", fnty=ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    )
    add = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", fnty=ir.FunctionType(_INTS, [_INTS] * 3))
    places = builder.or_(builder.and_(codes, _ints(0x0F0F0F0F)), _ints(0x30201000))
    taken = [_ints(SIDE * 0x01010101)]
    if scales == 2:
        taken.append(builder.and_(codes, taken[0]))
    out = list(sums)
    for d, table in enumerate(tables):
        own = builder.bitcast(builder.call(pick, [table, builder.bitcast(places, _BYTES)]), _INTS)
        for s, which in enumerate(taken):
            out[_DIGITS * s + d] = builder.call(add, [out[_DIGITS * s + d], which, own])
    return out


def _finish(builder: Any, sums: list[list[Any]], numbers: list[Any]) -> None:
    """Multiply sums and add them to the totals."""
    factor, scales, total = numbers
    factor = builder.bitcast(_spread(builder, builder.bitcast(factor, _INT)), _FLOATS)
    for b, own in enumerate(sums):
        parts, value = [own], _load(builder, _FLOATS, total, 64 * b)
        if len(own) > _DIGITS:
            high = own[_DIGITS:]
            parts = [high, [builder.sub(*pair) for pair in zip(own, high, strict=False)]]
        for i, digits in enumerate(parts):
            found = builder.fmul(_joined(builder, digits), factor)
            value = _fma(builder, found, _load(builder, _FLOATS, scales, 64 * (BLOCKS * i + b)), value)
        target = builder.inttoptr(builder.add(total, _WIDE(64 * b)), _FLOATS.as_pointer())
        builder.store(value, target, align=4)


def _joined(builder: Any, digits: list[Any]) -> Any:
    """The number that digits are of, as floats."""
    value = builder.sitofp(digits[0], _FLOATS)
    for digit in digits[1:]:
        value = _fma(builder, value, ir.Constant(_FLOATS, [256.0] * LANES), builder.sitofp(digit, _FLOATS))
    return value


def _fetch(builder: Any, place: Any) -> None:
    """Ask the second cache for 64 bytes that are read soon; there may be none."""
    pointer, number = ir.IntType(8).as_pointer(), _INT
    fetch = builder.module.declare_intrinsic(
        "llvm.prefetch.p0i8", fnty=ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    )
    builder.call(fetch, [builder.inttoptr(place, pointer), number(0), number(2), number(1)])


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _load(builder: Any, what: Any, base: Any, offset: int) -> Any:
    return builder.load(builder.inttoptr(builder.add(base, _WIDE(offset)), what.as_pointer()), align=1)


def _spread(builder: Any, word: Any) -> Any:
    """A word in each of 16 places."""
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), word, _INT(0))
    return builder.shuffle_vector(one, ir.Constant(_INTS, ir.Undefined), _ints(0))


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


@njit(cache=True, nogil=True, error_model="numpy")
def _tables(x: Any, levels: Any, pieces: Any, tables: Any, numbers: Any) -> None:
    """The tables of a row of x, and for each piece what its sums are multiplied by, NaN if x is not finite."""
    top = np.float32(0)
    for level in levels:
        top = max(top, abs(level))
    for p in range(pieces.shape[0]):
        first, count, word = pieces[p, 0], pieces[p, 1], pieces[p, 2]
        largest, odd = np.float32(0), np.float32(0)
        for j in range(first, first + count):
            largest = max(largest, abs(x[j]))
            odd += x[j] * np.float32(0)
        up = np.float32(0)
        if largest > _LEAST and odd == 0:
            up = np.float32(8323072.0) / top / largest  # 127 * 2^16
        numbers[p] = np.float32(1 / SIDE) / up if up > 0 else odd
        for i in range((count + 7) // 8 * 8):
            factor = x[first + i] * up if i < count and up > 0 else np.float32(0)
            place = tables.ctypes.data + (2 * word + i // 4) * _TABLE + i % 4 * 16
            _column(levels.ctypes.data, factor, place)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _block(each: Any, words: Any, scales: Any, pieces: Any, block: Any, tables: Any, numbers: Any, y: Any) -> None:
    """`ROWS` columns of y, all rows."""
    part, total, first = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), block * ROWS
    start, factors = words.ctypes.data + words.strides[0] * block, scales.ctypes.data + scales.strides[0] * block
    for m in range(y.shape[0]):
        total[:] = 0
        table = tables.ctypes.data + tables.strides[0] * m
        for few in range(0, pieces.shape[0], _FEW):
            part[:] = 0
            for p in range(few, min(few + _FEW, pieces.shape[0])):
                word = pieces[p, 2]
                own = (numbers[m, p], factors + scales.strides[1] * pieces[p, 3], part.ctypes.data)
                steps = (pieces[p, 1] + 7) // 8
                _piece(each, start + words.strides[1] * word, table + 2 * _TABLE * word, steps, own)
            total += part
        for r in range(min(ROWS, y.shape[1] - first)):
            y[m, first + r] = total[r]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(each: Any, x: Any, words: Any, scales: Any, levels: Any, pieces: Any, y: Any) -> None:
    tables = np.empty((x.shape[0], words.shape[1] * 2 * _TABLE), np.uint8)
    numbers = np.empty((x.shape[0], pieces.shape[0]), np.float32)
    for m in range(x.shape[0]):
        _tables(x[m], levels, pieces, tables[m], numbers[m])
    for block in prange(words.shape[0]):
        _block(each, words, scales, pieces, block, tables, numbers, y)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(each: Any, x: Any, words: Any, scales: Any, levels: Any, pieces: Any, y: Any) -> None:
    """Product of x [m, k] with a weight, written to y [m, n], by one thread; see `Levels`."""
    _product(each, x, words, scales, levels, pieces, y)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(each: Any, x: Any, words: Any, scales: Any, levels: Any, pieces: Any, y: Any) -> None:
    """The same by all."""
    _product(each, x, words, scales, levels, pieces, y)
