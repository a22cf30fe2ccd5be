"""Loops of `_planes`: sums of x where bits are set, by tables, sixteen rows of the weight at a time.

Of four numbers of x there are sixteen sums, one for each choice of them. They fill a register, and four bits of each of
sixteen rows pick theirs with one instruction of AVX-512: four columns of a plane cost a shift, a pick and an addition.

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
FOURS = 8  # of columns in a word

_WIDE, _FLOAT = ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(_FLOAT, LANES)


def fast() -> bool:
    """Whether numba compiles for a processor that has the instruction."""
    features = "" if config.DISABLE_JIT else cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512f" in features.split(",")


def blocks_of(planes: int) -> int:
    """Blocks of 16 rows that are worked off at once: as many sums as registers hold."""
    return 2 if planes <= 4 else 1


@intrinsic
def _group(
    _context: Any, planes: Any, fours: Any, below: Any, words: Any, tables: Any, steps: Any, numbers: Any
) -> Any:
    """Add what a group of columns gives to totals of `blocks_of(planes)` blocks of 16 rows.

    Args:
        planes: a tuple of so many.
        fours: a tuple of as many as a group has fours of columns in a word: 8, 4 or 2.
        below: bits of a word that lie below them.
        words: address of the first word: planes x blocks x 16 for each step.
        tables: address of the first table: 16 floats for each four of columns.
        steps: how many; more than one only of whole words.
        numbers: addresses of what a set bit of the first plane adds to each row, and of what every column adds; bytes
            from one plane's to the next one's; the sum of x; the address of the totals.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _planes, _fours, below, words, tables, steps, numbers = arguments
        count, each = signature.args[0].count, signature.args[1].count
        sums = _loop(builder, count, each, words, tables, steps, below)
        _finish(builder, count, sums, [builder.extract_value(numbers, i) for i in range(5)])
        return ir.IntType(32)(0)

    return types.int32(planes, fours, below, words, tables, steps, numbers), generate


def _loop(builder: Any, planes: int, fours: int, words: Any, tables: Any, steps: Any, below: Any) -> list[Any]:
    """Sums of each plane and block, plane by plane."""
    pick = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.sf.512", fnty=ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    )
    count = planes * blocks_of(planes)
    shift = _spread(builder, builder.trunc(below, ir.IntType(32)))
    before, body, behind = builder.block, builder.append_basic_block("step"), builder.append_basic_block("behind")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(_WIDE)
    i.add_incoming(_WIDE(0), before)
    sums = [builder.phi(_FLOATS) for _ in range(count)]
    place, table = (
        builder.add(base, builder.mul(i, _WIDE(size)))
        for base, size in ((words, 64 * count), (tables, 64 * fours))
    )  # fmt: skip
    found = [_load(builder, _INTS, place, 64 * s) for s in range(count)]
    if fours < FOURS:
        found = [builder.lshr(word, shift) for word in found]
    now = list(sums)
    for four in range(fours):
        own = _load(builder, _FLOATS, table, 64 * four)
        for s in range(count):
            now[s] = builder.fadd(now[s], builder.call(pick, [own, found[s]]))
            found[s] = builder.lshr(found[s], ir.Constant(_INTS, [4] * LANES))
    following = builder.add(i, _WIDE(1))
    i.add_incoming(following, body)
    for phi, value in zip(sums, now, strict=True):
        phi.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, steps), body, behind)
    builder.position_at_end(behind)
    return now


def _finish(builder: Any, planes: int, sums: list[Any], numbers: list[Any]) -> None:
    """Multiply sums and add them to the totals."""
    factors, beside, apart, x, total = numbers
    blocks = blocks_of(planes)
    whole = builder.bitcast(_spread(builder, builder.bitcast(x, ir.IntType(32))), _FLOATS)
    for b in range(blocks):
        value = _fma(builder, _load(builder, _FLOATS, beside, 64 * b), whole, _load(builder, _FLOATS, total, 64 * b))
        for p in range(planes):
            at = builder.add(factors, builder.mul(apart, _WIDE(p)))
            value = _fma(builder, sums[p * blocks + b], _load(builder, _FLOATS, at, 64 * b), value)
        target = builder.inttoptr(builder.add(total, _WIDE(64 * b)), _FLOATS.as_pointer())
        builder.store(value, target, align=4)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _load(builder: Any, what: Any, base: Any, offset: int) -> Any:
    return builder.load(builder.inttoptr(builder.add(base, _WIDE(offset)), what.as_pointer()), align=4)


def _spread(builder: Any, word: Any) -> Any:
    """A word in each of 16 places."""
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), word, ir.IntType(32)(0))
    return builder.shuffle_vector(one, ir.Constant(_INTS, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


@njit(cache=True, nogil=True, error_model="numpy")
def _tables(x: Any, size: Any, fours: Any, steps: Any, tables: Any, sums: Any) -> None:
    """Sums of each four of a row of x, group by group, and of each group; a group's last ones are of fewer."""
    width = 4 * fours * steps
    for g in range(sums.size):
        first, stop, total = g * size, min((g + 1) * size, x.size), np.float32(0)
        for j in range(first, stop):
            total += x[j]
        sums[g] = total
        for four in range(min(width // 4, tables.shape[0] - g * (width // 4))):
            own = tables[g * (width // 4) + four]
            own[0] = 0
            for bit in range(4):
                j = first + 4 * four + bit
                value = x[j] if j < stop else np.float32(0)
                for i in range(1 << bit):
                    own[(1 << bit) + i] = own[i] + value


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _block(planes: Any, fours: Any, weight: Any, block: Any, tables: Any, sums: Any, size: Any, y: Any) -> None:
    """Sixteen or 32 columns of y, all rows."""
    words, factors, beside = weight
    rows, groups, wide = words.shape[3], factors.shape[0], factors.shape[2]
    steps = (size + 31) // 32 if len(fours) == FOURS else 1
    total, first = np.empty(rows, np.float32), block * words.shape[3]
    start = words.ctypes.data + words.strides[0] * block
    for m in range(y.shape[0]):
        total[:] = 0
        for g in range(groups):
            word = g * steps if len(fours) == FOURS else g * len(fours) // FOURS
            below = np.int64(0 if len(fours) == FOURS else g * len(fours) % FOURS * 4)
            numbers = (
                factors.ctypes.data + 4 * (g * len(planes) * wide + first),
                beside.ctypes.data + 4 * (g * wide + first), np.int64(4 * wide), sums[m, g], total.ctypes.data,
            )  # fmt: skip
            table = tables[m].ctypes.data + 4 * LANES * len(fours) * steps * g
            step = np.int64(min(steps, words.shape[1] - word))
            _group(planes, fours, below, start + word * words.strides[1], table, step, numbers)
        for r in range(min(rows, y.shape[1] - first)):
            y[m, first + r] = total[r]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(planes: Any, fours: Any, x: Any, weight: Any, size: Any, y: Any) -> None:
    words, factors, _ = weight
    tables = np.empty((x.shape[0], words.shape[1] * FOURS, LANES), np.float32)
    sums = np.empty((x.shape[0], factors.shape[0]), np.float32)
    steps = (size + 31) // 32 if len(fours) == FOURS else 1
    for m in range(x.shape[0]):
        _tables(x[m], size, len(fours), steps, tables[m], sums[m])
    for block in prange(words.shape[0]):
        _block(planes, fours, weight, block, tables, sums, size, y)


@njit(cache=True, nogil=True, error_model="numpy")
def by_one(planes: Any, fours: Any, x: Any, weight: Any, size: Any, y: Any) -> None:
    """Product of x [m, k] with a weight, written to y [m, n], by one thread; see `Planes`."""
    _product(planes, fours, x, weight, size, y)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def by_all(planes: Any, fours: Any, x: Any, weight: Any, size: Any, y: Any) -> None:
    """The same by all."""
    _product(planes, fours, x, weight, size, y)
