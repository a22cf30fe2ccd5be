"""Loops of `vector`: entries of a codebook times x, several vectors of rows at a time.

An index costs a load of itself, one of the entry, which becomes floats, and a multiplication with x that adds to the
sums of the vector's rows. Each of the vectors that are worked off at once has sums of its own, so that none waits for
another; a number of x is read once for all of them.

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

from qexport.kernels.cpu._rows import array, read, room, write

VECTORS = 8  # that are worked off at once
_MANY = (0,) * 3  # as long as so many rows of x are left, an entry meets so many at once
LONGEST = 256  # columns whose products are added before they meet those of others
_FEW = 32  # pieces that are added before they meet others
KINDS = ("float16", "bfloat16")  # of entries

_WIDE, _INT, _SHORT = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_AHEAD = 16384  # bytes of indices that the second cache is asked for before they are read


def fast() -> bool:
    """Whether numba compiles for a processor whose registers hold the sums."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return {"+avx512f", "+avx512vl"} <= set(features.split(","))


@intrinsic
def _piece(
    _context: Any, rows: Any, kind: Any, step: Any, batch: Any, places: Any, x: Any, apart: Any, count: Any,
    entries: Any, total: Any,
) -> Any:  # fmt: skip
    """Add what some columns give to totals of `VECTORS` vectors.

    Args:
        rows: a tuple of as many as are read of an entry: 4, 8 or 16; the last ones may be the next entry's.
        kind: a tuple, which is longer by one than the place of the entries' dtype in `KINDS`.
        step: a tuple of as many numbers of the codebook as places count by.
        batch: a tuple of as many as there are rows of x.
        places: address of the first column's, where entries lie in the codebook: uint16 [count, VECTORS].
        x: address of its number, float32.
        apart: bytes from a row of x to the next one.
        count: of columns, 1 or more.
        entries: address of the codebook.
        total: address, float32 [batch, VECTORS, rows].
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places, x, apart, count, entries, total = arguments[4:]
        rows, kind, step, batch = (signature.args[i].count for i in range(4))
        numbers = [builder.add(x, builder.mul(apart, _WIDE(m))) for m in range(batch)]
        _add(builder, _loop(builder, rows, KINDS[kind - 1], step, (places, numbers, count, entries)), total)
        return _INT(0)

    return types.int32(rows, kind, step, batch, places, x, apart, count, entries, total), generate


def _loop(builder: Any, rows: int, kind: str, step: int, given: tuple[Any, list[Any], Any, Any]) -> list[Any]:
    """Sums over the columns for each row of x and then vector."""
    places, x, count, entries = given
    floats = ir.VectorType(ir.FloatType(), rows)
    before, body, behind = builder.block, builder.append_basic_block("column"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    j = builder.phi(_WIDE)
    j.add_incoming(_WIDE(0), before)
    sums = [builder.phi(floats) for _ in range(len(x) * VECTORS)]
    place, down = builder.add(places, builder.mul(j, _WIDE(2 * VECTORS))), builder.mul(j, _WIDE(4))
    _fetch(builder, builder.add(place, _WIDE(_AHEAD)))
    own = [_spread(builder, _load(builder, ir.FloatType(), builder.add(row, down), 0), rows) for row in x]
    now = list(sums)
    for i in range(VECTORS):
        at = builder.zext(_load(builder, _SHORT, place, 2 * i), _WIDE)
        entry = _entry(builder, rows, kind, builder.add(entries, builder.mul(at, _WIDE(2 * step))))
        for m, number in enumerate(own):
            now[m * VECTORS + i] = _fma(builder, entry, number, now[m * VECTORS + i])
    following = builder.add(j, _WIDE(1))
    j.add_incoming(following, body)
    for phi, value in zip(sums, now, strict=True):
        phi.add_incoming(ir.Constant(floats, [0.0] * rows), before)
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, behind)
    builder.position_at_end(behind)
    return now


def _entry(builder: Any, rows: int, kind: str, place: Any) -> Any:
    """An entry as float32."""
    floats = ir.VectorType(ir.FloatType(), rows)
    if kind == "float16":
        return builder.fpext(_load(builder, ir.VectorType(ir.HalfType(), rows), place, 0), floats)
    ints = ir.VectorType(_INT, rows)
    upper = builder.zext(_load(builder, ir.VectorType(_SHORT, rows), place, 0), ints)
    return builder.bitcast(builder.shl(upper, ir.Constant(ints, [16] * rows)), floats)


def _add(builder: Any, sums: list[Any], total: Any) -> None:
    """Add sums to the totals."""
    for i, value in enumerate(sums):
        at = i * 4 * value.type.count
        target = builder.inttoptr(builder.add(total, _WIDE(at)), value.type.as_pointer())
        builder.store(builder.fadd(value, _load(builder, value.type, total, at)), target, align=4)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _load(builder: Any, what: Any, base: Any, offset: int) -> Any:
    return builder.load(builder.inttoptr(builder.add(base, _WIDE(offset)), what.as_pointer()), align=2)


def _fetch(builder: Any, place: Any) -> None:
    """Ask the second cache for 64 bytes that are read soon; there may be none."""
    pointer = ir.IntType(8).as_pointer()
    fetch = builder.module.declare_intrinsic(
        "llvm.prefetch.p0i8", fnty=ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
    )
    builder.call(fetch, [builder.inttoptr(place, pointer), _INT(0), _INT(2), _INT(1)])


def _spread(builder: Any, number: Any, rows: int) -> Any:
    """A number in each of so many places."""
    floats, ints = ir.VectorType(ir.FloatType(), rows), ir.VectorType(_INT, rows)
    one = builder.insert_element(ir.Constant(floats, ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(one, ir.Constant(floats, ir.Undefined), ir.Constant(ints, [0] * rows))


@intrinsic
def _ask(_context: Any, address: Any) -> Any:
    """Have 64 bytes fetched."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _fetch(builder, arguments[0])
        return _INT(0)

    return types.int32(address), generate


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _scaled(x: Any, scales: Any, offsets: Any, out: Any) -> Any:
    """A row of x times the columns' scales; returns what their offsets give every row of the weight."""
    total = 0.0
    for j in range(x.size):
        out[j] = x[j] * scales[j] if scales[j] != 0 else np.float32(0)
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(offsets[j]) if offsets[j] != 0 else 0.0
    return np.float32(total)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _rows(
    rows: Any, kind: Any, step: Any, batch: Any, weight: Any, books: Any, pieces: Any, block: Any, scaled: Any,
    total: Any,
) -> None:  # fmt: skip
    """Add what a block of vectors gives to totals of `batch` rows of x."""
    indexed, blocks, entries = weight
    k, part = scaled.shape[1], np.empty((len(batch), total.shape[1]), np.float32)
    for few in range(0, pieces.shape[0], _FEW):
        part[:] = 0
        for p in range(few, min(few + _FEW, pieces.shape[0])):
            j, count, group = pieces[p, 0], pieces[p, 1], pieces[p, 3]
            x, apart = scaled.ctypes.data + 4 * j, np.int64(scaled.strides[0])
            for b in range(books.shape[0]):
                place = indexed + ((b * blocks + block) * k + j) * 2 * VECTORS
                entry = entries + books[b, 0] + books[b, 1] * group
                _piece(rows, kind, step, batch, place, x, apart, count, entry, part.ctypes.data)
        for m in range(len(batch)):
            total[m] += part[m]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _block(
    rows: Any, kind: Any, step: Any, weight: Any, books: Any, pieces: Any, outliers: Any, length: Any, block: Any,
    x: Any, scaled: Any, offset: Any, y: Any,
) -> None:  # fmt: skip
    """`VECTORS` times `length` columns of y, all rows."""
    total, first = np.empty((y.shape[0], VECTORS * len(rows)), np.float32), block * VECTORS * length
    columns, values = outliers
    for m in range(y.shape[0]):
        total[m] = offset[m]
        for c in range(columns.size):
            own, number = values[block, c], x[m, columns[c]]
            for i in range(own.size):
                total[m, i] += own[i] * number
    whole = y.shape[0] // len(_MANY) * len(_MANY)
    for m in range(0, whole, len(_MANY)):
        _rows(rows, kind, step, _MANY, weight, books, pieces, block, scaled[m:], total[m:])
    for m in range(whole, y.shape[0]):
        _rows(rows, kind, step, (0,), weight, books, pieces, block, scaled[m:], total[m:])
    for m in range(y.shape[0]):
        for r in range(min(VECTORS * length, y.shape[1] - first)):
            y[m, first + r] = total[m, r // length * len(rows) + r % length]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(rows: Any, kind: Any, step: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    (
        n, k, length, indexed, blocks, entries, size, books, count, pieces, parts, scales, offsets, places, values,
        outliers,
    ) = given  # fmt: skip
    for at in range(0, size, 64):
        _ask(entries + at)  # in order, before indices ask for them in any
    own, out = read(x, dtype, (m, k)), room(y, dtype, (m, n))
    book, piece = array(books, (count, 2), np.int64), array(pieces, (parts, 4), np.int64)
    place = array(places, outliers, np.int64)
    value = array(values, (blocks, outliers, VECTORS * len(rows)), np.float32)
    scaled, offset = np.empty((m, k), np.float32), np.empty(m, np.float32)
    for i in range(m):
        offset[i] = _scaled(own[i], array(scales, k, np.float32), array(offsets, k, np.float32), scaled[i])
    for block in prange(blocks):
        weight = indexed, blocks, entries
        _block(rows, kind, step, weight, book, piece, (place, value), length, block, own, scaled, offset, out)
    write(out, y, dtype)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(rows: Any, kind: Any, step: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    """Product of x [m, k] with a weight, written to y [m, n], by one thread; see `Vectors`."""
    _product(rows, kind, step, x, y, m, dtype, given)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(rows: Any, kind: Any, step: Any, x: Any, y: Any, m: Any, dtype: Any, given: Any) -> None:
    """The same by all."""
    _product(rows, kind, step, x, y, m, dtype, given)
