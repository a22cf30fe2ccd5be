"""What `_tiles` has compiled: loops of numba around one instruction of x86 processors (VNNI).

The instruction multiplies four bytes by four bytes and adds the products to an int32, sixteen times. numba's own loops
don't become it, so the innermost loop is written in LLVM's language, and so is what is done with its sums, which then
never leave the registers. All is in one file because numba looks only at that when it asks whether what it has compiled
before is still good.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 64  # rows of the weight in four tiles

_WORD, _WIDE = ir.IntType(32), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_WORD, 16), ir.VectorType(ir.FloatType(), 16)
_SHAPES = [
    (lines, planes, shifted)
    for planes in (1, 2) for lines in (1, 2, 4, 8) for shifted in (0, 1) if lines >= planes
]  # fmt: skip
_ANY = ir.Constant(_INTS, ir.Undefined)


def available() -> bool:
    """Whether numba compiles for a processor that has the instruction."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512vnni" in features.split(",")


@intrinsic
def _dots(_context: Any, shape: Any, x: Any, w: Any, apart: Any, steps: Any, after: Any, y: Any, pitch: Any) -> Any:
    """Add the products of some rows with four tiles, times their scales, to y.

    Args:
        shape: fours of bytes in a line of x, planes that these are of (the lower one comes first), and whether codes
            have zeros; one of `_SHAPES`.
        x: address of the first line, of as many fours as there are rows, their bytes without a sign.
        w: address of the first tile; `apart` bytes further is the next.
        apart: see w.
        steps: lines of x, and pieces of 64 bytes of a tile.
        after: addresses of sums of the weight's codes, scales of its rows, and factors of the rows of y; then of what
            only codes with zeros need: zeros of lines of x, their sums, and zeros of the weight.
        y: address of float32; whether it has no sums yet.
        pitch: bytes from one row of y to the next.
    """

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        shape, x, w, apart, steps, after, y, pitch = arguments
        own, place, empty = _members(builder, after, 6), *_members(builder, y, 2)
        lines, planes, shifted = _members(builder, shape, 3)
        end = builder.append_basic_block("end")
        code = builder.add(builder.mul(lines, _WIDE(4)), builder.add(builder.mul(planes, _WIDE(2)), shifted))
        switch = builder.switch(code, end)
        for case in _SHAPES:
            block = builder.append_basic_block("case")
            switch.add_case(_WIDE(case[0] * 4 + case[1] * 2 + case[2]), block)
            builder.position_at_end(block)
            tiles = 2 if case[0] == 8 else 4  # 16 sums at most, of 32 registers
            for first in range(0, 4, tiles):
                some = range(first, first + tiles)
                found = _loop(builder, case[0], some, x, w, apart, steps, own[0])
                _finish(builder, case, some, found, own, (place, empty, pitch))
            builder.branch(end)
        builder.position_at_end(end)
        return _WORD(0)

    return types.int32(shape, x, w, apart, steps, after, y, pitch), generate


def _members(builder: Any, group: Any, count: int) -> list[Any]:
    return [builder.extract_value(group, i) for i in range(count)]


def _loop(
    builder: Any, lines: int, tiles: range, x: Any, w: Any, apart: Any, steps: Any, sums: Any
) -> list[list[Any]]:  # fmt: skip
    """Sums of lines of x times tiles, less 128 times the sums of the tiles: [tile][line], each 16 int32."""
    add = builder.module.declare_intrinsic(
        "llvm.x86.avx512.vpdpbusd.512", fnty=ir.FunctionType(_INTS, [_INTS] * 3)
    )  # fmt: skip
    first = [builder.mul(_load(builder, _INTS, sums, _WIDE(64 * t)), _ints(-128)) for t in tiles]
    before, body, behind = builder.block, builder.append_basic_block("step"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(_WIDE)
    i.add_incoming(_WIDE(0), before)
    out = [[builder.phi(_INTS) for _ in range(lines)] for _ in tiles]
    piece, line = builder.add(w, builder.mul(i, _WIDE(64))), builder.add(x, builder.mul(i, _WIDE(4 * lines)))
    fours = [_spread(builder, _load(builder, _WORD, line, _WIDE(4 * r))) for r in range(lines)]
    for t, found, start in zip(tiles, out, first, strict=True):
        loaded = _load(builder, _INTS, piece, builder.mul(apart, _WIDE(t)))
        for so_far, four in zip(found, fours, strict=True):
            so_far.add_incoming(start, before)
            so_far.add_incoming(builder.call(add, [so_far, four, loaded]), body)
    following = builder.add(i, _WIDE(1))
    i.add_incoming(following, body)
    builder.cbranch(builder.icmp_signed("<", following, steps), body, behind)
    builder.position_at_end(behind)
    return [[so_far.incomings[1][0] for so_far in found] for found in out]


def _finish(
    builder: Any, shape: tuple[int, int, int], tiles: range, found: list[list[Any]], after: list[Any], y: Any
) -> None:  # fmt: skip
    """Scale sums and add them to y."""
    (lines, planes, shifted), (sums, scales, factors, zeros, own, weight_zeros) = shape, after
    rows, (place, empty, pitch) = lines // planes, y
    nothing = builder.trunc(empty, ir.IntType(1))
    for t, column in zip(tiles, found, strict=True):
        at = _WIDE(64 * t)
        for part, by in ((zeros, sums), (own, weight_zeros)) if shifted else ():
            factor = _load(builder, _INTS, by, at)
            for r in range(lines):
                times = _spread(builder, _load(builder, _WORD, part, _WIDE(4 * r)))
                column[r] = builder.sub(column[r], builder.mul(times, factor))
        scale = _load(builder, _FLOATS, scales, at)
        for r in range(rows):
            value = builder.sitofp(column[r], _FLOATS)
            if planes == 2:
                upper = builder.fmul(builder.sitofp(column[rows + r], _FLOATS), ir.Constant(_FLOATS, [256.0] * 16))
                value = builder.fadd(value, upper)
            row = builder.add(place, builder.mul(pitch, _WIDE(r)))
            # -0 plus a number is that number, be it 0 of either sign.
            old = builder.select(nothing, ir.Constant(_FLOATS, [-0.0] * 16), _load(builder, _FLOATS, row, at))
            value = builder.fadd(old, builder.fmul(value, scale))
            factor = builder.bitcast(_spread(builder, _load(builder, _WORD, factors, _WIDE(4 * r))), _FLOATS)
            target = builder.inttoptr(builder.add(row, at), _FLOATS.as_pointer())
            builder.store(builder.fmul(value, factor), target, align=4)


def _load(builder: Any, what: Any, base: Any, offset: Any) -> Any:
    return builder.load(builder.inttoptr(builder.add(base, offset), what.as_pointer()), align=4)


def _spread(builder: Any, word: Any) -> Any:
    """A word in each of 16 places."""
    return builder.shuffle_vector(builder.insert_element(_ANY, word, _WORD(0)), _ANY, _ints(0))


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * 16)


@njit(cache=True, nogil=True, error_model="numpy")
def _pack(x: Any, rows: Any, block: Any, out: Any) -> None:
    """Lines of a block of rows of x, int32 [planes, m, k / 4], each byte raised by 128; rows beyond m are 0."""
    planes, m, steps = x.shape
    for line in range(planes * rows):
        plane, i = line // rows, block * rows + line % rows
        for q in range(steps):
            out[q, line] = x[plane, i, q] ^ np.int32(-2139062144) if i < m else np.int32(-2139062144)


@njit(cache=True, nogil=True, error_model="numpy")
def _offsets(x: Any, zeros: Any, k: Any, weight: Any, rows: Any, block: Any, out: Any) -> None:
    """Zeros of a block's lines; then, for each part, the sums of their codes less their zeros.

    The sums are 0 for a weight that has no zeros to multiply them by.
    """
    codes, bounds = x.view(np.int8), weight[1]
    out[:] = 0
    for line in range(x.shape[0] * rows):
        plane, i = line // rows, block * rows + line % rows
        if i < x.shape[1]:
            if zeros is not None:
                out[0, line] = zeros[i]
            for p in range(bounds.size - 1 if weight[4].size else 0):
                stop, total = min(4 * bounds[p + 1], k), np.int32(0)
                for j in range(4 * bounds[p], stop):
                    total = np.int32(total + codes[plane, i, j])
                out[p + 1, line] = total - out[0, line] * (stop - 4 * bounds[p])


@njit(cache=True, nogil=True, error_model="numpy")
def _block(packed: Any, shifts: Any, factors: Any, weight: Any, y: Any, planes: Any, block: Any, lane: Any) -> None:
    """A block of rows of y times `LANES` columns: all parts, one after the other.

    `weight` is `Tiles.arrays`. `shifts` are of `_offsets`, or empty: no codes have zeros. Sums are multiplied by scales
    of rows after the last part, and by 1 after the others.
    """
    codes, bounds, group, scales, zeros, sums = weight
    lines, apart, pitch = packed.shape[2], codes.shape[1] * 64, 4 * y.shape[1]
    rows, shifted = lines // planes, 1 if shifts.size else 0
    x, w = packed.ctypes.data + 4 * block * packed.shape[1] * lines, codes.ctypes.data + lane // 16 * apart
    place, shift = y.ctypes.data + block * rows * pitch, shifts.ctypes.data + 4 * block * (group.size + 1) * lines
    for p in range(group.size):
        factor = block * rows + (0 if p == group.size - 1 else factors.shape[1])
        total = sums.ctypes.data + 4 * (p * sums.shape[1] + lane)
        after = (
            total,
            scales.ctypes.data + 4 * (group[p] * scales.shape[1] + lane),
            factors.ctypes.data + 4 * factor,
            shift,
            shift + 4 * lines * (p + 1),
            zeros.ctypes.data + 4 * (group[p] * zeros.shape[1] + lane) if zeros.size else total,
        )
        own, piece = x + bounds[p] * 4 * lines, w + bounds[p] * 64
        into = (place + 4 * lane, 1 if p == 0 else 0)
        _dots((lines, planes, shifted), own, piece, apart, bounds[p + 1] - bounds[p], after, into, pitch)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(x: Any, zeros: Any, factors: Any, k: Any, weight: Any, y: Any, rows: Any) -> None:
    """The product of x, int32 [planes, m, k / 4], with `weight`, `Tiles.arrays`, which is written to y.

    A block has `rows` rows of y, and y has whole blocks. `zeros` are int32 [m] or None. `factors` are float32, as many
    as y has rows: scales, and below them ones.
    """
    planes, blocks, lanes, parts = x.shape[0], y.shape[0] // rows, y.shape[1] // LANES, weight[2].size
    shifted = zeros is not None or weight[4].size > 0
    packed = np.empty((blocks, x.shape[2], planes * rows), np.int32)
    shifts = np.empty((blocks if shifted else 0, parts + 1, planes * rows), np.int32)
    for b in prange(blocks):
        _pack(x, rows, b, packed[b])
        if shifted:
            _offsets(x, zeros, k, weight, rows, b, shifts[b])
    for at in prange(blocks * lanes):
        _block(packed, shifts, factors, weight, y, planes, at % blocks, at // blocks * LANES)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(x: Any, zeros: Any, factors: Any, k: Any, weight: Any, y: Any, rows: Any) -> None:
    """`_product` by one thread."""
    _product(x, zeros, factors, k, weight, y, rows)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(x: Any, zeros: Any, factors: Any, k: Any, weight: Any, y: Any, rows: Any) -> None:
    """The same by all."""
    _product(x, zeros, factors, k, weight, y, rows)
