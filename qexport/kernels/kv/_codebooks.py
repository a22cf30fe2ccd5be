"""Codes that become numbers of a codebook, 16 at a time, where the processor picks 16 numbers out of 16 at once.

A codebook is given as 16 numbers, repeated where there are fewer: the instruction reads the lowest four bits of a lane.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qexport.kernels.kv._vector import WORD, address, codes_of, has, numbers, splat


def can_look_up() -> bool:
    """Whether numba compiles for a processor that picks 16 numbers out of 16 by one instruction, AVX-512's."""
    return has("avx512f")


def _apart(builder: Any, word: Any, bits: int, lanes: int) -> Any:
    """Lane j of a word's copies moved down by j codes."""
    kind = ir.VectorType(WORD, lanes)
    return builder.lshr(splat(builder, word, lanes), ir.Constant(kind, [bits * j for j in range(lanes)]))


def _sixteen(builder: Any, start: Any, bits: int) -> Any:
    """16 codes from a pointer to their bytes on, in the lowest bits of <16 x i32>, others above."""

    def word(offset: int) -> Any:
        place = builder.gep(start, [ir.Constant(ir.IntType(64), offset)])
        return builder.load(builder.bitcast(place, ir.PointerType(WORD)), align=1)

    if bits == 2:
        return _apart(builder, word(0), bits, 16)
    high = word(4) if bits == 4 else builder.lshr(word(2), ir.Constant(WORD, 8))  # 3 bits: 8 codes have 3 bytes
    halves = [_apart(builder, w, bits, 8) for w in (word(0), high)]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(WORD, 16), list(range(16))))


def _book(context: Any, builder: Any, kind: Any, table: Any) -> Any:
    """The 16 numbers of a table."""
    return builder.load(address(context, builder, kind, table, ir.Constant(ir.IntType(64), 0), 16), align=4)


def _pick(builder: Any, book: Any, index: Any) -> Any:
    """Numbers of 16 by the lowest four bits of 16 lanes."""
    wanted = ir.FunctionType(book.type, [book.type, index.type])
    pick = cgutils.get_or_insert_function(builder.module, wanted, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(pick, [book, index])


def _look_up(bits: int) -> Any:
    """Makes `look_up_<bits>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, table, out, to = args
        codes = context.make_array(signature.args[0])(context, builder, source)
        index = _sixteen(builder, builder.gep(codes.data, [at]), bits)
        place = address(context, builder, signature.args[3], out, to, 16)
        book = _book(context, builder, signature.args[2], table)
        builder.store(_pick(builder, book, index), place, align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    def look_up(typing: Any, source: Any, at: Any, table: Any, out: Any, to: Any) -> Any:
        return types.none(source, types.intp, table, out, types.intp), generate

    look_up.__name__ = f"look_up_{bits}"
    look_up.__doc__ = f"""out[to + j] = table[code j of those from byte `at` on], j < 16, {bits} bits each."""
    return intrinsic(look_up)


@intrinsic
def look_up_pairs(typing: Any, source: Any, at: Any, table: Any, out: Any, to: Any) -> Any:
    """out[to + j] = table[code j of those from byte `at` on], j < 32, 4 bits each: both codes of 16 bytes at once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, table, out, to = args
        kind = ir.VectorType(WORD, 16)
        wide = codes_of(context, builder, signature.args[0], source, at, 16)  # the instruction reads four bits at most
        book = _book(context, builder, signature.args[2], table)
        low, high = (_pick(builder, book, index) for index in (wide, builder.lshr(wide, ir.Constant(kind, [4] * 16))))
        for half in range(2):
            order = [8 * half + j // 2 + 16 * (j % 2) for j in range(16)]
            values = builder.shuffle_vector(low, high, ir.Constant(kind, order))
            where = builder.add(to, ir.Constant(to.type, 16 * half))
            builder.store(values, address(context, builder, signature.args[3], out, where, 16), align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return types.none(source, types.intp, table, out, types.intp), generate


def _turned(bits: int) -> Any:
    """Makes `turned_<bits>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (source, at, row, table), first, (angle, half, out, to, dim, count) = args[:4], args[6], args[9:]
        kinds, fast = signature.args, ("contract",)
        codes = context.make_array(kinds[0])(context, builder, source)
        book = _book(context, builder, kinds[3], table)
        bytes_of_half = builder.sdiv(builder.mul(half, ir.Constant(half.type, bits)), ir.Constant(half.type, 8))
        lines = [
            [numbers(context, builder, kinds[i], args[i], builder.add(first, more), 16) for i in (4, 5)]
            for more in (ir.Constant(half.type, 0), half)
        ]
        with cgutils.for_range(builder, count) as loop:
            start, pair = builder.add(at, builder.mul(loop.index, row)), []
            for own, (scale, offset) in zip((start, builder.add(start, bytes_of_half)), lines, strict=True):
                index = _sixteen(builder, builder.gep(codes.data, [own]), bits)
                scaled = builder.fmul(_pick(builder, book, index), scale, flags=fast)
                pair.append(builder.fadd(scaled, offset, flags=fast))
            turn = builder.add(angle, builder.mul(loop.index, half))
            c, s = (builder.load(address(context, builder, kinds[i], args[i], turn, 16), align=4) for i in (7, 8))
            a, b = pair
            one = builder.fsub(builder.fmul(a, c, flags=fast), builder.fmul(b, s, flags=fast), flags=fast)
            two = builder.fadd(builder.fmul(b, c, flags=fast), builder.fmul(a, s, flags=fast), flags=fast)
            place = builder.add(to, builder.mul(loop.index, dim))
            builder.store(one, address(context, builder, kinds[11], out, place, 16), align=4)
            builder.store(two, address(context, builder, kinds[11], out, builder.add(place, half), 16), align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    def turned(
        typing: Any, source: Any, at: Any, row: Any, table: Any, scales: Any, offsets: Any, first: Any,
        cos: Any, sin: Any, angle: Any, half: Any, out: Any, to: Any, dim: Any, count: Any,
    ) -> Any:  # fmt: skip
        n = types.intp
        return types.none(source, n, n, table, scales, offsets, n, cos, sin, n, n, out, n, n, n), generate

    turned.__name__ = f"turned_{bits}"
    turned.__doc__ = f"""16 channels of `count` rows, and those `half` further on, of {bits} bits, scaled and rotated.

    Bytes of row i begin at `at + i * row`, its angles at `angle + i * half`, and it goes to `out[to + i * dim]` and on.
    """
    return intrinsic(turned)


look_up_2, look_up_3, look_up_4 = (_look_up(bits) for bits in (2, 3, 4))
turned_2, turned_3, turned_4 = (_turned(bits) for bits in (2, 3, 4))
