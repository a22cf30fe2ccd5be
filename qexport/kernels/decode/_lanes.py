"""What loops of decoders do eight numbers at a time, as LLVM vector operations of whatever machine it compiles for.

LLVM finds none of these by itself. Nothing here checks bounds. numba doesn't look at this file when it asks whether
loops elsewhere are still good: after a change delete what it keeps, `__pycache__/*.nb?`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
ROWS = 4  # of a weight that meet x at once

_WIDE, _WORD, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_INTS, _FLOATS = ir.VectorType(_WORD, LANES), ir.VectorType(ir.FloatType(), LANES)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: Any) -> Any:
    """Where an element of a contiguous array lies, as a pointer to numbers of a type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(of))


def _all(builder: Any, value: Any) -> Any:
    """A value in all lanes."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _ints(values: Iterable[int]) -> Any:
    return ir.Constant(_INTS, list(values))


def _nothing(context: Any) -> Any:
    return cgutils.get_null_value(context.get_value_type(types.none))


def _unpacked(context: Any, builder: Any, kind: Any, raw: Any, at: Any, bits: Any, words: int) -> Any:
    """Eight codes, the lowest first, that begin at raw[at], <8 x i32>; from one word of four bytes or from two."""
    bits = builder.trunc(bits, _WORD)
    shifts = builder.mul(_all(builder, bits), _ints(range(LANES)))
    place = _place(context, builder, kind, raw, at, _WORD)
    codes = _all(builder, builder.load(place, align=1))
    if words == 2:
        begun, halves = builder.lshr(bits, _WORD(1)), _ints([*range(4), *range(12, 16)])
        place = builder.gep(
            builder.bitcast(place, ir.PointerType(_BYTE)), [begun]
        )  # the byte where the fifth code begins
        more = _all(builder, builder.load(builder.bitcast(place, ir.PointerType(_WORD)), align=1))
        codes = builder.shuffle_vector(codes, more, halves)
        before = _all(builder, builder.shl(begun, _WORD(3)))
        shifts = builder.sub(shifts, builder.shuffle_vector(_ints([0] * LANES), before, halves))
    mask = builder.sub(builder.shl(_WORD(1), bits), _WORD(1))
    return builder.and_(builder.lshr(codes, shifts), _all(builder, mask))


def _unpacking(words: int) -> Callable[..., Any]:
    """Makes `unpack_4` and `unpack_8`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw, at, bits, out, to = args
        codes = _unpacked(context, builder, signature.args[0], raw, at, bits, words)
        builder.store(codes, _place(context, builder, signature.args[3], out, to, _INTS), align=4)
        return _nothing(context)

    return generate


@intrinsic
def unpack_4(_context: Any, raw: Any, at: Any, bits: Any, out: Any, to: Any) -> Any:
    """out[to : to + 8] = the codes of up to 4 bits, the lowest first, that begin at raw[at]; reads four bytes."""
    return types.none(raw, types.intp, types.intp, out, types.intp), _unpacking(1)


@intrinsic
def unpack_8(_context: Any, raw: Any, at: Any, bits: Any, out: Any, to: Any) -> Any:
    """The same of 5 to 8 bits; reads up to eight bytes."""
    return types.none(raw, types.intp, types.intp, out, types.intp), _unpacking(2)


def _scaling(words: int) -> Callable[..., Any]:
    """Makes `scaled_4` and `scaled_8`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw, at, bits, zero, scale, out, to = args
        codes = _unpacked(context, builder, signature.args[0], raw, at, bits, words)
        values = builder.fsub(builder.sitofp(codes, _FLOATS), _all(builder, zero))
        values = builder.fmul(values, _all(builder, scale))
        builder.store(values, _place(context, builder, signature.args[5], out, to, _FLOATS), align=4)
        return _nothing(context)

    return generate


@intrinsic
def scaled_4(_context: Any, raw: Any, at: Any, bits: Any, zero: Any, scale: Any, out: Any, to: Any) -> Any:
    """out[to : to + 8] = (code - zero) * scale of the codes that `unpack_4` reads."""
    kinds = (types.intp, types.intp, types.float32, types.float32)
    return types.none(raw, *kinds, out, types.intp), _scaling(1)


@intrinsic
def scaled_8(_context: Any, raw: Any, at: Any, bits: Any, zero: Any, scale: Any, out: Any, to: Any) -> Any:
    """The same of the codes that `unpack_8` reads."""
    kinds = (types.intp, types.intp, types.float32, types.float32)
    return types.none(raw, *kinds, out, types.intp), _scaling(2)


@intrinsic
def sided(_context: Any, out: Any, to: Any, up: Any, down: Any, scale: Any) -> Any:
    """out[to : to + 8] times up where they are above 0 and down elsewhere, then times scale."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, to, up, down, scale = args
        place = _place(context, builder, signature.args[0], out, to, _FLOATS)
        values = builder.load(place, align=4)
        above = builder.fcmp_ordered(">", values, ir.Constant(_FLOATS, [0.0] * LANES))
        values = builder.fmul(values, builder.select(above, _all(builder, up), _all(builder, down)))
        builder.store(builder.fmul(values, _all(builder, scale)), place, align=4)
        return _nothing(context)

    return types.none(out, types.intp, types.float32, types.float32, types.float32), generate


def _summing(lanes: int) -> Callable[..., Any]:
    """Makes `signed_8` and `signed_32`; see there."""
    word = ir.IntType(lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw, at, pitch, alpha, first, planes, offset, out, to = args
        sums = [_all(builder, offset)] * (lanes // LANES)
        with _Loop(builder, planes, sums) as (i, own, found):
            place = builder.add(at, builder.mul(i, pitch))
            bits = builder.not_(builder.load(_place(context, builder, signature.args[0], raw, place, word), align=1))
            wide = _all(builder, builder.zext(bits, _WORD) if lanes < 32 else bits)
            number = _place(context, builder, signature.args[3], alpha, builder.add(first, i), _WORD)
            plus = _all(builder, builder.load(number, align=4))
            for part, total in enumerate(own):
                up = builder.shl(wide, _ints(31 - LANES * part - lane for lane in range(LANES)))
                sign = builder.and_(up, _ints([0x80000000] * LANES))
                found.append(builder.fadd(total, builder.bitcast(builder.xor(sign, plus), _FLOATS)))
        for part, total in enumerate(own):
            where = builder.add(to, _WIDE(LANES * part))
            builder.store(total, _place(context, builder, signature.args[7], out, where, _FLOATS), align=4)
        return _nothing(context)

    return generate


class _Loop:
    """A loop with values that it changes: `with _Loop(builder, count, values) as (i, own, found)`.

    The body, for which count is 1 or more, appends to `found` what follows on `own`; behind it `own` are the results.
    """

    def __init__(self, builder: Any, count: Any, values: list[Any]) -> None:
        self.builder, self.count, self.values = builder, count, values

    def __enter__(self) -> tuple[Any, list[Any], list[Any]]:
        b = self.builder
        before, self.body, self.behind = b.block, b.append_basic_block("body"), b.append_basic_block("behind")
        b.branch(self.body)
        b.position_at_end(self.body)
        self.i = b.phi(_WIDE)
        self.i.add_incoming(_WIDE(0), before)
        self.phis = [b.phi(value.type) for value in self.values]
        for phi, value in zip(self.phis, self.values, strict=True):
            phi.add_incoming(value, before)
        self.own: list[Any] = list(self.phis)
        self.found: list[Any] = []
        return self.i, self.own, self.found

    def __exit__(self, *error: object) -> None:
        b = self.builder
        following = b.add(self.i, _WIDE(1))
        self.i.add_incoming(following, b.block)
        for phi, value in zip(self.phis, self.found, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, self.count), self.body, self.behind)
        b.position_at_end(self.behind)
        self.own[:] = self.found


def _signature(raw: Any, alpha: Any, out: Any) -> Any:
    return types.none(raw, types.intp, types.intp, alpha, types.intp, types.intp, types.float32, out, types.intp)


@intrinsic
def signed_8(
    _context: Any, raw: Any, at: Any, pitch: Any, alpha: Any, first: Any, planes: Any, offset: Any, out: Any, to: Any
) -> Any:  # fmt: skip
    """out[to : to + 8] = offset and alpha[first + i], i < planes, added in their order.

    Its sign is minus where the bit of raw[at + i * pitch] is 0. One plane or more; alpha is read as if of one axis.
    """
    return _signature(raw, alpha, out), _summing(8)


@intrinsic
def signed_32(
    _context: Any, raw: Any, at: Any, pitch: Any, alpha: Any, first: Any, planes: Any, offset: Any, out: Any, to: Any
) -> Any:  # fmt: skip
    """The same of 32 bits, that is four bytes, and numbers."""
    return _signature(raw, alpha, out), _summing(32)


def _multiplying(rows: int) -> Callable[..., Any]:
    """Makes `dots_1` and `dots_2`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, at, pitch, x, begin, apart, units, sums, to, between = args

        def load(kind: Any, array: Any, index: Any) -> Any:
            return builder.load(_place(context, builder, kind, array, index, _FLOATS), align=4)

        def steps(first: Any, step: Any, count: int) -> list[Any]:
            return [builder.add(first, builder.mul(_WIDE(i), step)) for i in range(count)]

        places = [place for row in steps(to, between, rows) for place in steps(row, _WIDE(LANES), ROWS)]
        with _Loop(builder, units, [load(signature.args[7], sums, place) for place in places]) as (i, own, found):
            moved = builder.mul(i, _WIDE(LANES))
            weights = [load(signature.args[0], w, builder.add(p, moved)) for p in steps(at, pitch, ROWS)]
            for r, place in enumerate(steps(begin, apart, rows)):
                one = load(signature.args[3], x, builder.add(place, moved))
                for weight, total in zip(weights, own[r * ROWS : (r + 1) * ROWS], strict=True):
                    product = builder.fmul(weight, one, flags=("contract",))
                    found.append(builder.fadd(total, product, flags=("contract",)))
        for place, total in zip(places, own, strict=True):
            builder.store(total, _place(context, builder, signature.args[7], sums, place, _FLOATS), align=4)
        return _nothing(context)

    return generate


def _product(w: Any, x: Any, sums: Any) -> Any:
    whole = (types.intp, types.intp)
    return types.none(w, *whole, x, *whole, types.intp, sums, *whole)


@intrinsic
def dots_1(
    _context: Any, w: Any, at: Any, pitch: Any, x: Any, begin: Any, apart: Any, units: Any, sums: Any, to: Any,
    between: Any,
) -> Any:  # fmt: skip
    """Add products of a row of x with each of four rows of a weight, lane by lane, eights of columns in their order.

    Args:
        w: float32, its rows from `at` on, `pitch` numbers apart.
        at: see there.
        pitch: see there.
        x: float32, its rows from `begin` on, `apart` numbers apart.
        begin: see there.
        apart: see there.
        units: of eight columns, one or more.
        sums: float32, for each row of x from `to` on, `between` apart, eight of each row of the weight.
        to: see there.
        between: see there.
    """
    return _product(w, x, sums), _multiplying(1)


@intrinsic
def dots_2(
    _context: Any, w: Any, at: Any, pitch: Any, x: Any, begin: Any, apart: Any, units: Any, sums: Any, to: Any,
    between: Any,
) -> Any:  # fmt: skip
    """The same of two rows of x."""
    return _product(w, x, sums), _multiplying(2)


def _turning(add: bool) -> Callable[..., Any]:
    """Makes `entries` and `add_entries`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        book, places, j, first, out, to, pitch, rows = args
        columns = []
        for lane in range(LANES):
            own = _place(context, builder, signature.args[1], places, builder.add(j, _WIDE(lane)), _WORD)
            where = builder.add(builder.sext(builder.load(own), _WIDE), first)
            columns.append(builder.load(_place(context, builder, signature.args[0], book, where, _FLOATS), align=4))
        for near in (4, 2, 1):  # exchanges halves, quarters and eighths: rows take the place of columns
            for lane in (i for i in range(LANES) if not i & near):
                one, two = columns[lane], columns[lane + near]
                low = [i if not i & near else LANES + i - near for i in range(LANES)]
                columns[lane] = builder.shuffle_vector(one, two, _ints(low))
                columns[lane + near] = builder.shuffle_vector(one, two, _ints(i + near for i in low))
        for row, values in enumerate(columns):
            with builder.if_then(builder.icmp_signed("<", _WIDE(row), rows), likely=True):
                where = builder.add(to, builder.mul(pitch, _WIDE(row)))
                place = _place(context, builder, signature.args[4], out, where, _FLOATS)
                total = builder.fadd(builder.load(place, align=4), values) if add else values
                builder.store(total, place, align=4)
        return _nothing(context)

    return generate


def _entries(book: Any, places: Any, out: Any) -> Any:
    return types.none(book, places, types.intp, types.intp, out, *(types.intp,) * 3)


@intrinsic
def entries(
    _context: Any, book: Any, places: Any, j: Any, first: Any, out: Any, to: Any, pitch: Any, rows: Any
) -> Any:  # fmt: skip
    """out[to + r * pitch + c] = book[places[j + c] + first + r], c < 8, r < rows <= 8; reads 8 numbers a place."""
    return _entries(book, places, out), _turning(False)


@intrinsic
def add_entries(
    _context: Any, book: Any, places: Any, j: Any, first: Any, out: Any, to: Any, pitch: Any, rows: Any
) -> Any:  # fmt: skip
    """The same added to what is there."""
    return _entries(book, places, out), _turning(True)
