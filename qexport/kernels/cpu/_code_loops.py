"""Loops of `_codes`: products of packed codes with x as integers of 24 bits, sixteen rows of the weight at a time.

An instruction of x86 processors (VNNI) multiplies four codes of each of sixteen rows by four digits of x and adds the
products to sixteen int32. x has three digits, bytes with a sign, so that a code costs three such products for four of
its neighbours, and the bits that it is cut from. Sums are exact until a group ends.

numba's own loops don't become that, so the innermost loop is written in LLVM's language. Widths are known when it is
compiled: they come as lengths of tuples, which are types to numba. All is in one file because numba looks only at that
when it asks whether what it has compiled before is still good.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qexport.kernels.cpu._rows import array, largest, read, room, total, write

ROWS = 64  # of the weight that are worked off at once, four blocks of 16
STEPS = 8  # of four columns in a unit
DIGITS = 3  # of x
_AHEAD = 16384  # bytes of codes that the second cache is asked for before they are read
_LEAST = np.float32(1e-31)  # a group whose largest number is less counts as 0

_WIDE, _INT = ir.IntType(64), ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, 16), ir.VectorType(ir.FloatType(), 16)
_SMALL = ir.VectorType(ir.IntType(8), 16)


def fast() -> bool:
    """Whether numba compiles for a processor that has the instruction."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512vnni" in features.split(",")


def parts_of(bits: int) -> tuple[int, ...]:
    """Widths that a code is stored in, the lowest bits first: each divides a byte."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@intrinsic
def _groups(
    _context: Any, bits: Any, fours: Any, words: Any, x: Any, units: Any, kind: Any, numbers: Any, total: Any
) -> Any:
    """Add what a group of columns gives to totals of `ROWS` rows; of small groups all that lie in a unit.

    Args:
        bits: a tuple of so many.
        fours: a tuple of as many as a group has fours of columns in a unit: 8, 4 or 2.
        words: address of the first unit: for each block of 16 rows the parts of its codes, 64 bytes for every bit.
        x: address of its digits: int32 [units, 8, 3], the highest digits first.
        units: how many; more than one only of groups of 8 fours.
        kind: number of one of `KINDS`, which says what a row's factor and zero are.
        numbers: addresses of two floats of the group, what x's integers are multiplied by and the sum of x, and of the
            three arrays that the kind reads, where those of the next group follow.
        total: address.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _bits, _fours, words, x, units, kind, numbers, total = arguments
        width, each = signature.args[0].count, signature.args[1].count
        own = (kind, [builder.extract_value(numbers, i) for i in range(4)])
        if each == STEPS:
            _finish(builder, _loop(builder, width, words, x, units), own, 0, total)
            return _INT(0)
        _fetch(builder, words, ROWS // 16 * width)
        for group in range(STEPS // each):
            sums = [[_ints(0)] * DIGITS for _ in range(ROWS // 16)]
            for b, found in enumerate(sums):
                sums[b] = _unit(builder, width, b, words, x, range(group * each, (group + 1) * each), found)
            _finish(builder, sums, own, group, total)
        return _INT(0)

    return types.int32(bits, fours, words, x, units, kind, numbers, total), generate


def _loop(builder: Any, bits: int, words: Any, x: Any, units: Any) -> list[list[Any]]:
    """Sums of each block and digit over some units."""
    before, body, behind = builder.block, builder.append_basic_block("unit"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(_WIDE)
    i.add_incoming(_WIDE(0), before)
    sums = [[builder.phi(_INTS) for _ in range(DIGITS)] for _ in range(ROWS // 16)]
    place = builder.add(words, builder.mul(i, _WIDE(ROWS * 4 * bits)))
    digits = builder.add(x, builder.mul(i, _WIDE(4 * STEPS * DIGITS)))
    _fetch(builder, place, ROWS // 16 * bits)
    out = []
    for b, own in enumerate(sums):
        out.append(_unit(builder, bits, b, place, digits, range(STEPS), list(own)))
    following = builder.add(i, _WIDE(1))
    i.add_incoming(following, body)
    for own, found in zip(sums, out, strict=True):
        for phi, value in zip(own, found, strict=True):
            phi.add_incoming(ir.Constant(_INTS, [0] * 16), before)
            phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, units), body, behind)
    builder.position_at_end(behind)
    return out


def _unit(builder: Any, bits: int, block: int, words: Any, x: Any, steps: range, sums: list[Any]) -> list[Any]:
    """Sums of a block with the products of some steps of a unit."""
    add = builder.module.declare_intrinsic(
        "llvm.x86.avx512.vpdpbusd.512", fnty=ir.FunctionType(_INTS, [_INTS] * 3)
    )  # fmt: skip
    out = list(sums)
    for step in steps:
        code, low, first = None, 0, block * 64 * bits
        for width in parts_of(bits):
            per = 8 // width
            word = _load(builder, _INTS, words, first + 64 * (step // per))
            moved = step % per * width - low
            if moved > 0:
                word = builder.lshr(word, _ints(moved))
            elif moved < 0:
                word = builder.shl(word, _ints(-moved))
            if width < 8:
                mask = (2**width - 1 << low) * 0x01010101
                word = builder.and_(word, _ints(mask))
            code = word if code is None else builder.or_(code, word)
            low, first = low + width, first + 64 * width
        for digit in range(DIGITS):
            four = _spread(builder, _load(builder, _INT, x, 4 * (step * DIGITS + digit)))
            out[digit] = builder.call(add, [out[digit], code, four])
    return out


def _finish(builder: Any, sums: list[list[Any]], given: tuple[Any, list[Any]], group: int, total: Any) -> None:
    """Add factor * (sum - zero * sum of x) to the totals, for a group's sums."""
    kind, (x, *places) = given
    scale, whole = (_spread(builder, _load(builder, _INT, x, 8 * group + 4 * i)) for i in range(2))
    scale, whole = builder.bitcast(scale, _FLOATS), builder.bitcast(whole, _FLOATS)
    values = []
    for own in sums:
        value = builder.sitofp(own[0], _FLOATS)
        for digit in own[1:]:
            value = _fma(builder, value, _floats(256.0), builder.sitofp(digit, _FLOATS))
        values.append(builder.fmul(value, scale))
    end = builder.append_basic_block("end")
    switch = builder.switch(kind, end)
    for number, parameters in enumerate(KINDS.values()):
        block = builder.append_basic_block("kind")
        switch.add_case(_WIDE(number), block)
        builder.position_at_end(block)
        for b, value in enumerate(values):
            factor, zero = parameters(builder, places, group * ROWS + 16 * b)
            rest = builder.fsub(value, builder.fmul(whole, zero, flags=("contract",)), flags=("contract",))
            added = _fma(builder, rest, factor, _load(builder, _FLOATS, total, 64 * b))
            target = builder.inttoptr(builder.add(total, _WIDE(64 * b)), _FLOATS.as_pointer())
            builder.store(added, target, align=4)
        builder.branch(end)
    builder.position_at_end(end)


def _plain(builder: Any, places: list[Any], row: int) -> tuple[Any, Any]:
    """Factors and zeros, both float32."""
    factor, zero = (_load(builder, _FLOATS, place, 4 * row) for place in places[:2])
    return factor, zero


def _shared(builder: Any, places: list[Any], row: int) -> tuple[Any, Any]:
    """Factors float32; all zeros are the float32 that the second array holds."""
    zero = builder.bitcast(_spread(builder, _load(builder, _INT, places[1], 0)), _FLOATS)
    return _load(builder, _FLOATS, places[0], 4 * row), zero


def _bytes(builder: Any, places: list[Any], row: int) -> tuple[Any, Any]:
    """Factors float32, zeros uint8."""
    return _load(builder, _FLOATS, places[0], 4 * row), _small(builder, places[1], row)


def _levels(builder: Any, places: list[Any], row: int) -> tuple[Any, Any]:
    """Both step * (code - zero): codes uint8, steps and zeros of 16 rows are four float32 of the third array."""
    out = []
    for i in range(2):
        step, zero = (_spread(builder, _load(builder, _INT, places[2], row + 8 * i + 4 * j)) for j in range(2))
        code = builder.fsub(_small(builder, places[i], row), builder.bitcast(zero, _FLOATS))
        out.append(builder.fmul(code, builder.bitcast(step, _FLOATS)))
    return out[0], out[1]


def _powers(builder: Any, places: list[Any], row: int) -> tuple[Any, Any]:
    """Factors 2^flag, flags uint8, times the row's float32 of the third array; all zeros are that of the second."""
    flags = builder.zext(_load(builder, _SMALL, places[0], row, 1), _INTS)
    power = builder.bitcast(builder.shl(builder.add(flags, _ints(127)), _ints(23)), _FLOATS)
    zero = builder.bitcast(_spread(builder, _load(builder, _INT, places[1], 0)), _FLOATS)
    return builder.fmul(power, _load(builder, _FLOATS, places[2], 4 * (row % ROWS))), zero


KINDS = {"plain": _plain, "shared": _shared, "bytes": _bytes, "levels": _levels, "powers": _powers}
SIZES = {  # bytes of a row in a group of each array, and of a row in the third one
    "plain": (4, 4, 0, 0), "shared": (4, 0, 0, 0), "bytes": (4, 1, 0, 0), "levels": (1, 1, 1, 0),
    "powers": (1, 0, 0, 4),
}  # fmt: skip


def _small(builder: Any, place: Any, row: int) -> Any:
    """Sixteen bytes as floats."""
    found = _load(builder, _SMALL, place, row, 1)
    return builder.sitofp(builder.zext(found, _INTS), _FLOATS)


def _fetch(builder: Any, place: Any, lines: int) -> None:
    """Ask the second cache for so many times 64 bytes that are read soon; there may be none."""
    pointer = ir.IntType(8).as_pointer()
    fetch = builder.module.declare_intrinsic(
        "llvm.prefetch.p0i8", fnty=ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
    )
    for line in range(lines):
        ahead = builder.inttoptr(builder.add(place, _WIDE(_AHEAD + 64 * line)), pointer)
        builder.call(fetch, [ahead, _INT(0), _INT(2), _INT(1)])


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _load(builder: Any, what: Any, base: Any, offset: int, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(builder.add(base, _WIDE(offset)), what.as_pointer()), align=align)


def _spread(builder: Any, word: Any) -> Any:
    """A word in each of 16 places."""
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), word, _INT(0))
    return builder.shuffle_vector(one, ir.Constant(_INTS, ir.Undefined), _ints(0))


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * 16)


def _floats(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * 16)


@intrinsic
def _cut(_context: Any, x: Any, digits: Any) -> Any:
    """Sixteen floats, whole ones or not, as integers in bytes with a sign: 4 x 3 fours of them, see `_groups`.

    Args:
        x: address of the floats, of 127 * 2^16 or less.
        digits: address.
    """

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        nearest = builder.module.declare_intrinsic("llvm.rint.v16f32", fnty=ir.FunctionType(_FLOATS, [_FLOATS]))
        whole = builder.fptosi(builder.call(nearest, [_load(builder, _FLOATS, arguments[0], 0)]), _INTS)
        raised = builder.add(whole, _ints(0x808080))
        own = builder.bitcast(builder.xor(raised, _ints(0x808080)), ir.VectorType(ir.IntType(8), 64))
        order = [16 * step + 4 * c + 2 - d for step in range(4) for d in range(DIGITS) for c in range(4)]
        picked = ir.Constant(ir.VectorType(_INT, len(order)), order)
        out = builder.shuffle_vector(own, ir.Constant(own.type, ir.Undefined), picked)
        builder.store(out, builder.inttoptr(arguments[1], out.type.as_pointer()), align=4)
        return _INT(0)

    return types.int32(x, digits), generate


@njit(cache=True, nogil=True, error_model="numpy")
def _digits(x: Any, size: Any, fours: Any, digits: Any, numbers: Any) -> None:
    """A row of x as integers, group by group: bytes of `digits`, and what `_groups` calls numbers of the group."""
    width = (size + 31) // 32 * 32 if fours == STEPS else fours * 4
    scaled = np.zeros(digits.size // DIGITS * 4, np.float32)
    for g in range(numbers.shape[0]):
        own = x[g * size : (g + 1) * size]
        top, whole = largest(own), total(own)
        up = np.float32(0)
        if top > _LEAST:
            up = np.float32(8323072.0) / top  # 127 * 2^16
        elif not np.isnan(whole):
            whole = np.float32(0)
        numbers[g, 0] = np.float32(1) / up if up > 0 else np.float32(0)
        numbers[g, 1] = whole
        if up > 0:
            out = scaled[g * width : g * width + own.size]
            for j in range(own.size):
                out[j] = own[j] * up
    for i in range(0, scaled.size, 16):
        _cut(scaled.ctypes.data + 4 * i, digits.ctypes.data + 3 * i)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _beside(sparse: Any, row: Any, x: Any) -> Any:
    """What outliers give a row: four sums, so that none waits for another."""
    rows, columns, values = sparse
    e, stop = rows[row], rows[row + 1]
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    while e + 4 <= stop:
        a += values[e] * x[columns[e]]
        b += values[e + 1] * x[columns[e + 1]]
        c += values[e + 2] * x[columns[e + 2]]
        d += values[e + 3] * x[columns[e + 3]]
        e += 4
    while e < stop:
        a += values[e] * x[columns[e]]
        e += 1
    return (a + b) + (c + d)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _block(
    bits: Any, fours: Any, weight: Any, places: Any, block: Any, digits: Any, numbers: Any, sparse: Any, x: Any, y: Any
) -> None:
    """`ROWS` columns of y, all rows."""
    (words, units, kind, size), (one, two, three, of_one, of_two, of_three, of_row) = weight, places
    first, groups, bytes_of_unit = block * ROWS, numbers.shape[1], len(bits) * 4 * ROWS
    each = (size + 31) // 32 if len(fours) == STEPS else 1
    step = 1 if len(fours) == STEPS else STEPS // len(fours)
    start = words + bytes_of_unit * units * block
    sums = np.empty(ROWS, np.float32)
    for m in range(y.shape[0]):
        sums[:] = 0
        for g in range(0, groups, step):
            unit, at = g // step * each, (block * groups + g) * ROWS
            own = (
                numbers[m].ctypes.data + 8 * g, one + of_one * at, two + of_two * at,
                three + of_three * at + of_row * first,
            )  # fmt: skip
            _groups(
                bits, fours, start + unit * bytes_of_unit, digits[m].ctypes.data + unit * 4 * STEPS * DIGITS,
                np.int64(min(each, units - unit)), kind, own, sums.ctypes.data,
            )  # fmt: skip
        for r in range(min(ROWS, y.shape[1] - first)):
            y[m, first + r] = sums[r]
            if sparse[0].size > 0:
                y[m, first + r] += _beside(sparse, first + r, x[m])


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(bits: Any, fours: Any, wide: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    (
        n, k, words, blocks, units, kind, groups, size, one, two, three, of_one, of_two, of_three, of_row, rows, starts,
        columns, values, outliers,
    ) = given  # fmt: skip
    own, out = read(x, dtype, (m, k)), room(y, dtype, (m, n))
    digits = np.empty((m, units * STEPS * DIGITS), np.int32)
    numbers = np.empty((m, groups, 2), np.float32)
    for i in range(m):
        _digits(own[i], size, len(fours), digits[i], numbers[i])
    begin, column, value = (
        array(rows, starts, np.int32),
        array(columns, outliers, wide),
        array(values, outliers, np.float32),
    )
    for block in prange(blocks):
        weight, places = (words, units, kind, size), (one, two, three, of_one, of_two, of_three, of_row)
        _block(bits, fours, weight, places, block, digits, numbers, (begin, column, value), own, out)
    write(out, y, dtype)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(bits: Any, fours: Any, wide: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    """Product of x [m, k] with a weight, written to y [m, n], by one thread; see `Codes`."""
    _product(bits, fours, wide, x, y, m, dtype, given)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(bits: Any, fours: Any, wide: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    """The same by all."""
    _product(bits, fours, wide, x, y, m, dtype, given)
