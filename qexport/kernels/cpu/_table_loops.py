"""Loops of `_tables`: what columns can give is in tables, codes pick from them, sixteen rows of the weight at a time.

What one column, or a few, can give is a table of sixteen entries, integers of 24 bits; four tables are 64 entries, and
one instruction of AVX-512 (VBMI) picks a byte for each of four codes of each of sixteen rows. Another (VNNI) adds the
four to an int32, and again those only whose level lies above 0, if they have a bit and a scale of their own. Three
times that, for the three bytes of an entry, is all that 64 codes cost. Sums are exact until a piece ends.

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

from qexport.kernels.cpu._rows import array, largest, read, room, total, write

LANES = 16
CODES = 8  # of a row in a word, which is four bytes
SIDE = 8  # the bit of a code that says that its level lies above 0
LONGEST = 512  # columns of a piece of a group
_FEW = 32  # pieces that are added before they meet others
_DIGITS = 3  # bytes of an entry
_TABLES = 64 * _DIGITS  # bytes of four tables
_AHEAD = 16384  # bytes of codes that the second cache is asked for before they are read
_LEAST = np.float32(1e-31)  # a piece of x whose largest number is less counts as 0

_WIDE, _INT = ir.IntType(64), ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), 64)


def fast() -> bool:
    """Whether numba compiles for a processor that has the instructions."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return {"+avx512vbmi", "+avx512vnni"} <= set(features.split(","))


def blocks_of(planes: int) -> int:
    """Blocks of 16 rows that are worked off at once: as many sums as registers hold."""
    return 2 if planes <= 3 else 1


@intrinsic
def _table(_context: Any, columns: Any, patterns: Any, x: Any, table: Any) -> Any:
    """Write a table: sixteen bytes of each digit, 64 bytes apart, the highest digits first.

    Args:
        columns: a tuple of as many as give an entry.
        patterns: address of sixteen floats for each of them, which x is multiplied by and then summed.
        x: address of their floats, multiplied so that no entry is larger than 127 * 2^16.
        table: address.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _columns, patterns, x, table = arguments
        nearest = builder.module.declare_intrinsic("llvm.rint.v16f32", fnty=ir.FunctionType(_FLOATS, [_FLOATS]))
        value = ir.Constant(_FLOATS, [0.0] * LANES)
        for c in range(signature.args[0].count):
            number = builder.bitcast(_spread(builder, _load(builder, _INT, x, 4 * c)), _FLOATS)
            value = _fma(builder, _load(builder, _FLOATS, patterns, 64 * c), number, value)
        raised = builder.add(builder.fptosi(builder.call(nearest, [value]), _INTS), _ints(0x808080))
        digits = builder.xor(raised, _ints(0x808080))  # bytes with a sign
        for d in range(_DIGITS):
            own = builder.trunc(builder.lshr(digits, _ints(16 - 8 * d)), ir.VectorType(ir.IntType(8), LANES))
            target = builder.inttoptr(builder.add(table, _WIDE(64 * d)), own.type.as_pointer())
            builder.store(own, target, align=1)
        return _INT(0)

    return types.int32(columns, patterns, x, table), generate


@intrinsic
def _piece(
    _context: Any, planes: Any, signs: Any, scales: Any, size: Any, words: Any, tables: Any, steps: Any, numbers: Any
) -> Any:
    """Add what a piece of a group of columns gives to totals of `blocks_of(planes)` blocks of 16 rows.

    Args:
        planes: a tuple of as many as pick from the same tables.
        signs: a tuple of as many scales as a plane has: 1, or 2 if levels above 0 have their own.
        scales: a tuple of as many as a group of a row has; of one more than planes need, the last is what every column
            adds.
        size: a tuple of as many as a scale has bytes: 2 or 4.
        words: address of the first codes: 64 bytes for each step, plane and block.
        tables: address of the first tables: two times 3 x 64 bytes for each step.
        steps: how many.
        numbers: two float32, what sums are multiplied by and the sum of x; addresses of the scales, plane by plane,
            those of levels above 0 first, and of the totals.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, tables, steps, numbers = arguments[4:]
        planes, signs, scales, size = (signature.args[i].count for i in range(4))
        sums = _loop(builder, (planes, signs), words, tables, steps)
        _finish(builder, (planes, scales, size), sums, [builder.extract_value(numbers, i) for i in range(4)])
        return _INT(0)

    return types.int32(planes, signs, scales, size, words, tables, steps, numbers), generate


def _loop(builder: Any, counts: tuple[int, int], words: Any, tables: Any, steps: Any) -> list[list[Any]]:
    """Sums of each plane and block: of each digit over all, and then over what lies above 0 if that has its scale."""
    planes, signs = counts
    before, body, behind = builder.block, builder.append_basic_block("step"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(_WIDE)
    i.add_incoming(_WIDE(0), before)
    count = planes * blocks_of(planes)
    sums = [[builder.phi(_INTS) for _ in range(_DIGITS * signs)] for _ in range(count)]
    place = builder.add(words, builder.mul(i, _WIDE(64 * count)))
    table = builder.add(tables, builder.mul(i, _WIDE(2 * _TABLES)))
    now = []
    for b, own in enumerate(sums):
        _fetch(builder, builder.add(place, _WIDE(_AHEAD + 64 * b)))
        codes, found = _load(builder, _INTS, place, 64 * b), list(own)
        for half in range(2):
            digits = [_load(builder, _BYTES, table, _TABLES * half + 64 * d) for d in range(_DIGITS)]
            found = _four(builder, signs, builder.lshr(codes, _ints(4)) if half else codes, digits, found)
        now.append(found)
    following = builder.add(i, _WIDE(1))
    i.add_incoming(following, body)
    for phis, values in zip(sums, now, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(_ints(0), before)
            phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, steps), body, behind)
    builder.position_at_end(behind)
    return now


def _four(builder: Any, signs: int, codes: Any, tables: list[Any], sums: list[Any]) -> list[Any]:
    """Sums of a block with `SIDE` times what four codes pick, which are the lower halves of bytes."""
    pick = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.qi.512", fnty=ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    )
    add = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", fnty=ir.FunctionType(_INTS, [_INTS] * 3))
    places = builder.or_(builder.and_(codes, _ints(0x0F0F0F0F)), _ints(0x30201000))
    taken = [_ints(SIDE * 0x01010101)]
    if signs == 2:
        taken.append(builder.and_(codes, taken[0]))
    out = list(sums)
    for d, table in enumerate(tables):
        own = builder.bitcast(builder.call(pick, [table, builder.bitcast(places, _BYTES)]), _INTS)
        for s, which in enumerate(taken):
            out[_DIGITS * s + d] = builder.call(add, [out[_DIGITS * s + d], which, own])
    return out


def _finish(builder: Any, counts: tuple[int, int, int], sums: list[list[Any]], numbers: list[Any]) -> None:
    """Multiply sums and add them to the totals."""
    planes, scales, size = counts
    factor, whole = (builder.bitcast(_spread(builder, builder.bitcast(n, _INT)), _FLOATS) for n in numbers[:2])
    blocks, (places, total) = blocks_of(planes), numbers[2:]
    for b in range(blocks):
        value, at = _load(builder, _FLOATS, total, 64 * b), 0
        found = [part for p in range(planes) for part in _parts(builder, sums[p * blocks + b])]
        given = [builder.fmul(_joined(builder, part), factor) for part in found]
        for at, part in enumerate(given + [whole] * (scales - len(given))):
            value = _fma(builder, part, _scales(builder, size, places, at * blocks + b), value)
        target = builder.inttoptr(builder.add(total, _WIDE(64 * b)), _FLOATS.as_pointer())
        builder.store(value, target, align=4)


def _parts(builder: Any, own: list[Any]) -> list[list[Any]]:
    """Sums of what lies above 0 and of what does not, or those of all."""
    high = own[_DIGITS:]
    return [high, [builder.sub(*pair) for pair in zip(own, high, strict=False)]] if high else [own]


def _scales(builder: Any, size: int, place: Any, number: int) -> Any:
    """Sixteen of them as float32."""
    if size == 4:
        return _load(builder, _FLOATS, place, 64 * number)
    return builder.fpext(_load(builder, ir.VectorType(ir.HalfType(), LANES), place, 32 * number), _FLOATS)


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
def _tables(columns: Any, x: Any, patterns: Any, pieces: Any, tables: Any, numbers: Any) -> None:
    """The tables of a row of x; for each piece what its sums are multiplied by, NaN if x is not finite, and its sum."""
    each, top = len(columns), largest(patterns.reshape(-1))
    scaled = np.zeros((tables.size // _TABLES * 4, each), np.float32)
    flat, sizes = scaled.reshape(-1), np.empty(scaled.shape[0], np.float32)
    for p in range(pieces.shape[0]):
        first, count, word = pieces[p, 0], pieces[p, 1], pieces[p, 2]
        begin, stop = word * CODES, word * CODES + (count + CODES * each - 1) // (CODES * each) * CODES
        own, out = x[first : first + count], flat[begin * each : begin * each + count]
        for j in range(count):
            out[j] = own[j]
        for i in range(begin, stop):
            size = np.float32(0)
            for c in range(each):
                size += abs(scaled[i, c])
            sizes[i] = size
        most, whole = largest(sizes[begin:stop]), total(own)
        up, odd = np.float32(0), whole * np.float32(0)
        if most > _LEAST and odd == 0:
            up = np.float32(8323072.0) / top / most  # 127 * 2^16
        numbers[p, 0] = np.float32(1 / SIDE) / up if up > 0 else odd
        numbers[p, 1] = whole if up > 0 else odd
        for j in range(count):
            out[j] = own[j] * up if up > 0 else np.float32(0)
        for i in range(begin, stop):
            place = tables.ctypes.data + i // 4 * _TABLES + i % 4 * 16
            _table(columns, patterns.ctypes.data, scaled.ctypes.data + 4 * each * i, place)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _block(
    columns: Any, planes: Any, signs: Any, each: Any, size: Any, weight: Any, pieces: Any, block: Any, tables: Any,
    numbers: Any, y: Any,
) -> None:  # fmt: skip
    """Sixteen or 32 columns of y, all rows."""
    words, count, scales, groups, rows = weight
    bytes_of_word, bytes_of_group = 4 * len(planes) * rows, len(each) * rows * len(size)
    width = CODES * len(columns)
    part, sums, first = np.empty(rows, np.float32), np.empty(rows, np.float32), block * rows
    start, factors = words + bytes_of_word * count * block, scales + bytes_of_group * groups * block
    for m in range(y.shape[0]):
        sums[:] = 0
        table = tables.ctypes.data + tables.strides[0] * m
        for few in range(0, pieces.shape[0], _FEW):
            part[:] = 0
            for p in range(few, min(few + _FEW, pieces.shape[0])):
                word = pieces[p, 2]
                own = (numbers[m, p, 0], numbers[m, p, 1], factors + bytes_of_group * pieces[p, 3], part.ctypes.data)
                at, steps = start + bytes_of_word * word, (pieces[p, 1] + width - 1) // width
                _piece(planes, signs, each, size, at, table + 2 * _TABLES * word, steps, own)
            sums += part
        for r in range(min(rows, y.shape[1] - first)):
            y[m, first + r] = sums[r]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(
    columns: Any, planes: Any, signs: Any, each: Any, size: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any
) -> None:
    n, k, words, blocks, count, scales, groups, rows, pieces, parts, patterns = given
    own, out = read(x, dtype, (m, k)), room(y, dtype, (m, n))
    piece, pattern = array(pieces, (parts, 4), np.int64), array(patterns, (len(columns), LANES), np.float32)
    tables = np.empty((m, count * 2 * _TABLES), np.uint8)
    numbers = np.empty((m, parts, 2), np.float32)
    for i in range(m):
        _tables(columns, own[i], pattern, piece, tables[i], numbers[i])
    for block in prange(blocks):
        weight = words, count, scales, groups, rows
        _block(columns, planes, signs, each, size, weight, piece, block, tables, numbers, out)
    write(out, y, dtype)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(
    columns: Any, planes: Any, signs: Any, each: Any, size: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any
) -> None:
    """Product of x [m, k] with a weight, written to y [m, n], by one thread; see `Tables`."""
    _product(columns, planes, signs, each, size, x, y, m, dtype, given)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(
    columns: Any, planes: Any, signs: Any, each: Any, size: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any
) -> None:
    """The same by all."""
    _product(columns, planes, signs, each, size, x, y, m, dtype, given)
