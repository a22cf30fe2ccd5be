"""A few numbers at once on a CPU, as LLVM vector operations of whatever machine it compiles for.

LLVM vectorises long loops of numba well and short ones hardly at all: it can't know that arrays don't overlap, or that
an index is not negative. A head's channels are short loops. Nothing here checks bounds.
"""

from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

WORD = ir.IntType(32)


def has(feature: str) -> bool:
    """Whether numba compiles for a processor with a feature, by LLVM's name of it."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return f"+{feature}" in features.split(",")


def _number(builder: Any, bits: Any) -> Any:
    """float32 of the bits of a float16, of as many lanes as given."""
    lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    kind = lambda t: ir.VectorType(t, lanes) if lanes else t  # noqa: E731
    if has("f16c"):
        return builder.fpext(builder.bitcast(bits, kind(ir.HalfType())), kind(ir.FloatType()))
    same = lambda value: ir.Constant(kind(WORD), [value] * lanes if lanes else value)  # noqa: E731
    wide = builder.zext(bits, kind(WORD))
    rest = builder.shl(builder.and_(wide, same(0x7FFF)), same(13))
    scaled = builder.fmul(
        builder.bitcast(rest, kind(ir.FloatType())), builder.bitcast(same(0x77800000), kind(ir.FloatType()))
    )
    # 2^112 moves the exponent to where float32 has it; infinities and NaN have the largest in both.
    no_number = builder.icmp_unsigned(">=", rest, same(0x0F800000))
    value = builder.select(no_number, builder.or_(rest, same(0x7F800000)), builder.bitcast(scaled, kind(WORD)))
    sign = builder.shl(builder.and_(wide, same(0x8000)), same(16))
    return builder.bitcast(builder.or_(value, sign), kind(ir.FloatType()))


def address(context: Any, builder: Any, kind: Any, array: Any, index: Any, lanes: int) -> Any:
    """Where numbers from `index` of a contiguous array lie, as a pointer to a vector."""
    made = context.make_array(kind)(context, builder, array)
    vector = ir.VectorType(made.data.type.pointee, lanes)
    return builder.bitcast(builder.gep(made.data, [index]), ir.PointerType(vector))


def numbers(context: Any, builder: Any, kind: Any, array: Any, index: Any, lanes: int) -> Any:
    """Numbers from `index` of a contiguous array, float32 or float16 as uint16."""
    place = address(context, builder, kind, array, index, lanes)
    if kind.dtype == types.uint16:
        return _number(builder, builder.load(place, align=2))
    return builder.load(place, align=4)


@intrinsic
def number(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as float32, of a contiguous array of float32, or of float16 as uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, args[0])
        loaded = builder.load(builder.gep(made.data, [args[1]]))
        return _number(builder, loaded) if array.dtype == types.uint16 else loaded

    return types.float32(array, types.intp), generate


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A value in all lanes."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _copy(lanes: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, out, to = args
        loaded = builder.load(address(context, builder, signature.args[0], source, at, lanes), align=4)
        builder.store(loaded, address(context, builder, signature.args[2], out, to, lanes), align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return generate


def _affine(lanes: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, scale, offset = args
        place = address(context, builder, signature.args[0], array, at, lanes)
        values = builder.fmul(builder.load(place, align=4), splat(builder, scale, lanes), flags=("contract",))
        builder.store(builder.fadd(values, splat(builder, offset, lanes), flags=("contract",)), place, align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return generate


@intrinsic
def copy_2(typing: Any, source: Any, at: Any, out: Any, to: Any) -> Any:
    """out[to : to + 2] = source[at : at + 2], float32."""
    return types.none(source, types.intp, out, types.intp), _copy(2)


@intrinsic
def copy_4(typing: Any, source: Any, at: Any, out: Any, to: Any) -> Any:
    """out[to : to + 4] = source[at : at + 4], float32."""
    return types.none(source, types.intp, out, types.intp), _copy(4)


@intrinsic
def affine_16(typing: Any, array: Any, at: Any, scale: Any, offset: Any) -> Any:
    """array[at : at + 16] = itself * scale + offset, float32."""
    return types.none(array, types.intp, types.float32, types.float32), _affine(16)


@intrinsic
def affine_4(typing: Any, array: Any, at: Any, scale: Any, offset: Any) -> Any:
    """array[at : at + 4] = itself * scale + offset, float32."""
    return types.none(array, types.intp, types.float32, types.float32), _affine(4)


def codes_of(context: Any, builder: Any, kind: Any, source: Any, at: Any, lanes: int) -> Any:
    """Bytes from `at` of a uint8 array on, as <lanes x i32>."""
    made = context.make_array(kind)(context, builder, source)
    place = builder.bitcast(builder.gep(made.data, [at]), ir.PointerType(ir.VectorType(ir.IntType(8), lanes)))
    return builder.zext(builder.load(place, align=1), ir.VectorType(WORD, lanes))


def _to_planes(context: Any, builder: Any, wide: Any, bits: int, flip: Any, line: Any, out: Any) -> None:
    """Store scale * (code ^ flip) + offset of each code of bytes, a plane after the other.

    Args:
        context: numba's.
        builder: LLVM's.
        wide: bytes, <lanes x i32>.
        bits: of a code.
        flip: i32.
        line: scale and offset, <lanes x float>.
        out: type and value of an array, where the first plane goes to, and how far the next is from there.
    """
    lanes, (kind, array, to, step) = wide.type.count, out
    for place in range(0, 8, bits):
        own = builder.lshr(wide, ir.Constant(wide.type, [place] * lanes))
        own = builder.and_(own, ir.Constant(wide.type, [2**bits - 1] * lanes))
        own = builder.xor(own, splat(builder, flip, lanes))
        values = builder.uitofp(own, ir.VectorType(ir.FloatType(), lanes))
        values = builder.fmul(values, line[0], flags=("contract",))
        values = builder.fadd(values, line[1], flags=("contract",))
        builder.store(values, address(context, builder, kind, array, to, lanes), align=4)
        to = builder.add(to, step)


def _planes(bits: int, lanes: int) -> Any:
    """Makes `planes_<bits>_<lanes>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, flip, scale, offset, *out = args
        wide = codes_of(context, builder, signature.args[0], source, at, lanes)
        line = splat(builder, scale, lanes), splat(builder, offset, lanes)
        _to_planes(context, builder, wide, bits, flip, line, (signature.args[5], *out))
        return cgutils.get_null_value(context.get_value_type(types.none))

    def planes(
        typing: Any, source: Any, at: Any, flip: Any, scale: Any, offset: Any, out: Any, to: Any, step: Any
    ) -> Any:  # fmt: skip
        numbers = (types.int32, types.float32, types.float32)
        return types.none(source, types.intp, *numbers, out, types.intp, types.intp), generate

    planes.__name__ = f"planes_{bits}_{lanes}"
    planes.__doc__ = (
        f"""out[to + p * step + j] = scale * (code ^ flip) + offset of code p of byte at + j, j < {lanes}."""
    )
    return intrinsic(planes)


planes_2_16, planes_2_8, planes_2_4 = (_planes(2, lanes) for lanes in (16, 8, 4))
planes_4_16, planes_4_8, planes_4_4 = (_planes(4, lanes) for lanes in (16, 8, 4))


@intrinsic
def two_groups(
    typing: Any, source: Any, at: Any, flip: Any, scales: Any, offsets: Any, out: Any, to: Any, step: Any
) -> Any:  # fmt: skip
    """As `planes_4_16`, but scale and offset are pairs: of the first 8 bytes, and of the others."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, flip, scales, offsets, *out = args
        wide = codes_of(context, builder, signature.args[0], source, at, 16)
        halves = ir.Constant(ir.VectorType(WORD, 16), [*range(8), *range(24, 32)])
        line = [
            builder.shuffle_vector(*(splat(builder, builder.extract_value(pair, i), 16) for i in range(2)), halves)
            for pair in (scales, offsets)
        ]
        _to_planes(context, builder, wide, 4, flip, line, (signature.args[5], *out))
        return cgutils.get_null_value(context.get_value_type(types.none))

    pair = types.UniTuple(types.float32, 2)
    return types.none(source, types.intp, types.int32, pair, pair, out, types.intp, types.intp), generate


def _channels(lanes: int) -> Any:
    """Makes `channels_<lanes>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, to, scales, offsets, at = args
        kinds = signature.args
        place = address(context, builder, kinds[0], array, to, lanes)
        scale, offset = (
            numbers(context, builder, kind, given, at, lanes)
            for kind, given in ((kinds[2], scales), (kinds[3], offsets))
        )
        values = builder.fmul(builder.load(place, align=4), scale, flags=("contract",))
        builder.store(builder.fadd(values, offset, flags=("contract",)), place, align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    def channels(typing: Any, array: Any, to: Any, scales: Any, offsets: Any, at: Any) -> Any:
        return types.none(array, types.intp, scales, offsets, types.intp), generate

    channels.__name__ = f"channels_{lanes}"
    channels.__doc__ = f"""array[to + j] = itself * scales[at + j] + offsets[at + j] for j < {lanes}."""
    return intrinsic(channels)


def _rotated(lanes: int) -> Any:
    """Makes `rotate_<lanes>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, to, half, cosines, sines, at = args
        kinds, fast = signature.args, ("contract",)
        places = [address(context, builder, kinds[0], array, at, lanes) for at in (to, builder.add(to, half))]
        a, b = (builder.load(place, align=4) for place in places)
        cos, sin = (
            builder.load(address(context, builder, kind, given, at, lanes), align=4)
            for kind, given in ((kinds[3], cosines), (kinds[4], sines))
        )
        one = builder.fsub(builder.fmul(a, cos, flags=fast), builder.fmul(b, sin, flags=fast), flags=fast)
        two = builder.fadd(builder.fmul(b, cos, flags=fast), builder.fmul(a, sin, flags=fast), flags=fast)
        builder.store(one, places[0], align=4)
        builder.store(two, places[1], align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    def rotate(typing: Any, array: Any, to: Any, half: Any, cos: Any, sin: Any, at: Any) -> Any:
        return types.none(array, types.intp, types.intp, cos, sin, types.intp), generate

    rotate.__name__ = f"rotate_{lanes}"
    rotate.__doc__ = (
        f"""Turn (array[to + j], array[to + half + j]) by the angle of cos[at + j], sin[at + j], for j < {lanes}."""
    )
    return intrinsic(rotate)


@intrinsic
def dots_16(typing: Any, rows: Any, at: Any, dim: Any, other: Any, first: Any, bias: Any, out: Any, to: Any) -> Any:
    """out[to + t] = rows[at + t * dim : + dim] . other[first : first + dim] + bias, t < 16; dim is a multiple of 16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, at, dim, other, first, bias, out, to = args
        kinds = signature.args
        vector = ir.VectorType(ir.FloatType(), 16)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * 16)) for _ in range(16)]
        for total in sums:
            builder.store(ir.Constant(vector, [0.0] * 16), total)
        sixteen = ir.Constant(dim.type, 16)
        with cgutils.for_range(builder, builder.sdiv(dim, sixteen)) as loop:
            done = builder.mul(loop.index, sixteen)
            x = builder.load(address(context, builder, kinds[3], other, builder.add(first, done), 16), align=4)
            place = builder.add(at, done)
            for total in sums:
                row = builder.load(address(context, builder, kinds[0], rows, place, 16), align=4)
                more = builder.fmul(row, x, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
                place = builder.add(place, dim)
        found = builder.fadd(
            _transposed_sum(builder, [builder.load(total) for total in sums]), splat(builder, bias, 16)
        )
        builder.store(found, address(context, builder, kinds[6], out, to, 16), align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return types.none(rows, types.intp, types.intp, other, types.intp, types.float32, out, types.intp), generate


def _transposed_sum(builder: Any, vectors: list[Any]) -> Any:
    """Lane i is the sum of vector i's lanes, of 16 of 16: halves of vectors i and i + 8 are added, then quarters."""
    half = 8
    while len(vectors) > 1:
        low = [lane for lane in range(16) if lane // half % 2 == 0]
        order = [lane + more for s in range(0, 8, half) for more in (0, 16) for lane in low[s : s + half]]
        merged, count = [], len(vectors) // 2
        for a, b in zip(vectors[:count], vectors[count:], strict=True):
            one, two = (
                builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, 16), [lane + more for lane in order]))
                for more in (0, half)
            )
            merged.append(builder.fadd(one, two, flags=("contract",)))
        vectors, half = merged, half // 2
    return vectors[0]


@intrinsic
def mix_16(typing: Any, rows: Any, at: Any, dim: Any, weights: Any, first: Any, out: Any, to: Any) -> Any:
    """out[to : to + dim] += sum over t < 16 of weights[first + t] * rows[at + t * dim : + dim]; 16 divides dim."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, at, dim, weights, first, out, to = args
        kinds, fast = signature.args, ("contract",)
        given = builder.load(address(context, builder, kinds[3], weights, first, 16), align=4)
        lanes = [builder.extract_element(given, ir.Constant(WORD, t)) for t in range(16)]
        spread = [splat(builder, lane, 16) for lane in lanes]
        sixteen = ir.Constant(dim.type, 16)
        with cgutils.for_range(builder, builder.sdiv(dim, sixteen)) as loop:
            done = builder.mul(loop.index, sixteen)
            place = address(context, builder, kinds[5], out, builder.add(to, done), 16)
            sums, own = [builder.load(place, align=4), None], builder.add(at, done)
            for t, weight in enumerate(spread):  # in two sums, as each addition waits for the one before
                row = builder.load(address(context, builder, kinds[0], rows, own, 16), align=4)
                more, before = builder.fmul(row, weight, flags=fast), sums[t % 2]
                sums[t % 2] = more if before is None else builder.fadd(before, more, flags=fast)
                own = builder.add(own, dim)
            builder.store(builder.fadd(sums[0], sums[1], flags=fast), place, align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return types.none(rows, types.intp, types.intp, weights, types.intp, out, types.intp), generate


@intrinsic
def share_16(typing: Any, scales: Any, offsets: Any, at: Any, p: Any, first: Any, out: Any, to: Any) -> Any:
    """out[to + t] = p[first + t] * scales[at + t], t < 16; the sum of p[first + t] * offsets[at + t]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scales, offsets, at, p, first, out, to = args
        kinds = signature.args
        given = builder.load(address(context, builder, kinds[3], p, first, 16), align=4)
        scale, offset = (
            numbers(context, builder, kind, array, at, 16) for kind, array in ((kinds[0], scales), (kinds[1], offsets))
        )
        place = address(context, builder, kinds[5], out, to, 16)
        builder.store(builder.fmul(given, scale, flags=("contract",)), place, align=4)
        left, half = builder.fmul(given, offset, flags=("contract",)), 8
        while half:
            order = ir.Constant(ir.VectorType(WORD, half), list(range(half, 2 * half)))
            upper = builder.shuffle_vector(left, left, order)
            lower = builder.shuffle_vector(left, left, ir.Constant(order.type, list(range(half))))
            left, half = builder.fadd(lower, upper, flags=("contract",)), half // 2
        return builder.extract_element(left, ir.Constant(WORD, 0))

    return types.float32(scales, offsets, types.intp, p, types.intp, out, types.intp), generate


channels_16, channels_8 = _channels(16), _channels(8)
rotate_16, rotate_8 = _rotated(16), _rotated(8)
