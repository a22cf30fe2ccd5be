"""A few numbers at once on a CPU, as LLVM vector operations of whatever machine it compiles for.

LLVM vectorises long loops of numba well and short ones hardly at all: it can't know that arrays don't overlap, or that
an index is not negative. A head's channels are short loops. Nothing here checks bounds.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, lanes: int) -> Any:
    """Where numbers from `index` of a contiguous float32 array lie, as a pointer to a vector."""
    made = context.make_array(kind)(context, builder, array)
    vector = ir.VectorType(ir.FloatType(), lanes)
    return builder.bitcast(builder.gep(made.data, [index]), ir.PointerType(vector))


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    """A value in all lanes."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _copy(lanes: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, out, to = args
        loaded = builder.load(_address(context, builder, signature.args[0], source, at, lanes), align=4)
        builder.store(loaded, _address(context, builder, signature.args[2], out, to, lanes), align=4)
        return cgutils.get_null_value(context.get_value_type(types.none))

    return generate


def _affine(lanes: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, scale, offset = args
        place = _address(context, builder, signature.args[0], array, at, lanes)
        values = builder.fmul(builder.load(place, align=4), _splat(builder, scale, lanes), flags=("contract",))
        builder.store(builder.fadd(values, _splat(builder, offset, lanes), flags=("contract",)), place, align=4)
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


def _planes(bits: int, lanes: int) -> Any:
    """Makes `planes_<bits>_<lanes>`; see there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, flip, scale, offset, out, to, step = args
        made = context.make_array(signature.args[0])(context, builder, source)
        codes = ir.PointerType(ir.VectorType(ir.IntType(8), lanes))
        given = builder.load(builder.bitcast(builder.gep(made.data, [at]), codes), align=1)
        wide = builder.zext(given, ir.VectorType(ir.IntType(32), lanes))
        scales, offsets = _splat(builder, scale, lanes), _splat(builder, offset, lanes)
        for place in range(0, 8, bits):
            own = builder.lshr(wide, ir.Constant(wide.type, [place] * lanes))
            own = builder.and_(own, ir.Constant(wide.type, [2**bits - 1] * lanes))
            own = builder.xor(own, _splat(builder, flip, lanes))
            values = builder.uitofp(own, ir.VectorType(ir.FloatType(), lanes))
            values = builder.fmul(values, scales, flags=("contract",))
            values = builder.fadd(values, offsets, flags=("contract",))
            builder.store(values, _address(context, builder, signature.args[5], out, to, lanes), align=4)
            to = builder.add(to, step)
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


def _channels(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """See `channels_8`."""
    array, to, scales, offsets, at = args
    kinds = signature.args
    place = _address(context, builder, kinds[0], array, to, 8)
    scale, offset = (
        builder.load(_address(context, builder, kind, given, at, 8), align=4)
        for kind, given in ((kinds[2], scales), (kinds[3], offsets))
    )
    values = builder.fmul(builder.load(place, align=4), scale, flags=("contract",))
    builder.store(builder.fadd(values, offset, flags=("contract",)), place, align=4)
    return cgutils.get_null_value(context.get_value_type(types.none))


def _rotated(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """See `rotate_8`."""
    array, to, half, cosines, sines, at = args
    kinds, fast = signature.args, ("contract",)
    places = [_address(context, builder, kinds[0], array, at, 8) for at in (to, builder.add(to, half))]
    a, b = (builder.load(place, align=4) for place in places)
    cos, sin = (
        builder.load(_address(context, builder, kind, given, at, 8), align=4)
        for kind, given in ((kinds[3], cosines), (kinds[4], sines))
    )
    one = builder.fsub(builder.fmul(a, cos, flags=fast), builder.fmul(b, sin, flags=fast), flags=fast)
    two = builder.fadd(builder.fmul(b, cos, flags=fast), builder.fmul(a, sin, flags=fast), flags=fast)
    builder.store(one, places[0], align=4)
    builder.store(two, places[1], align=4)
    return cgutils.get_null_value(context.get_value_type(types.none))


@intrinsic
def channels_8(typing: Any, array: Any, to: Any, scales: Any, offsets: Any, at: Any) -> Any:
    """array[to + j] = itself * scales[at + j] + offsets[at + j] for j < 8."""
    return types.none(array, types.intp, scales, offsets, types.intp), _channels


@intrinsic
def rotate_8(typing: Any, array: Any, to: Any, half: Any, cos: Any, sin: Any, at: Any) -> Any:
    """Turn (array[to + j], array[to + half + j]) by the angle of cos[at + j], sin[at + j], for j < 8."""
    return types.none(array, types.intp, types.intp, cos, sin, types.intp), _rotated
