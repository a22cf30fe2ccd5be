"""Loops that write rows of a decoded weight, and that multiply by them while a cache has them.

Codes of a row become integers or floats, eight at a time, then its groups are worked on in place, which LLVM turns into
vector instructions of whatever processor there is. Groups may begin anywhere.

Operations and their order are those of the formats' `decode`, and nothing lets the compiler fuse or reorder them. What
is multiplied by a decoded weight is summed in an order that depends on columns alone.

A weight is a tuple of arrays and numbers, without tuples inside, which loops of several threads can't take. The length
of `kind`, a tuple of zeros, says what it is made of: see `_WRITERS`.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import overload

from qexport.kernels.decode._lanes import (
    LANES,
    ROWS,
    add_entries,
    dots_1,
    dots_2,
    entries,
    scaled_4,
    scaled_8,
    sided,
    signed_8,
    signed_32,
    unpack_4,
    unpack_8,
)

_TASK = 64  # rows of a weight that a thread takes at once, or more
_TILE = 512  # columns of four rows that a first-level cache keeps while rows of x pass


@njit(cache=True, nogil=True, error_model="numpy")
def _full_word(raw: Any, at: Any) -> Any:
    """Eight bytes as one number: one load, because the count is known and no place can be negative."""
    word, place = np.uint64(0), np.uint64(at)
    for i in range(8):
        word |= np.uint64(raw[place + np.uint64(i)]) << np.uint64(8 * i)
    return word


@njit(cache=True, nogil=True, error_model="numpy")
def _whole(raw: Any, at: Any, bits: Any, count: Any) -> Any:
    """Units of eight codes from a byte on for which eight bytes can be read."""
    return max(min(count // LANES, (raw.size - at - 8) // bits + 1), 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _code(raw: Any, at: Any, bits: Any, j: Any) -> Any:
    """Code j of a stream of bits that begins at a byte."""
    place, shift = at + j * bits // 8, j * bits % 8
    word = np.int64(raw[place])
    if shift + bits > 8:
        word |= np.int64(raw[place + 1]) << 8
    return np.int32((word >> shift) & ((1 << bits) - 1))


@njit(cache=True, nogil=True, error_model="numpy")
def _codes(raw: Any, at: Any, bits: Any, out: Any) -> None:
    """The codes of a row, int32, whose stream of bits begins at a byte."""
    whole = LANES * _whole(raw, at, bits, out.size)
    if bits <= 4:
        for j in range(0, whole, LANES):
            unpack_4(raw, at + j // LANES * bits, bits, out, j)
    else:
        for j in range(0, whole, LANES):
            unpack_8(raw, at + j // LANES * bits, bits, out, j)
    for j in range(whole, out.size):
        out[j] = _code(raw, at, bits, j)


@njit(cache=True, nogil=True, error_model="numpy")
def _inner(begin: Any, end: Any, last: Any) -> Any:
    """First and last of the columns of a group that lie in whole eights, which end at `last` at the latest."""
    low = min((begin + LANES - 1) & -LANES, end)
    return low, max(min(end, last) & -LANES, low)


@njit(cache=True, nogil=True, error_model="numpy")
def across(raw: Any, bits: Any, values: Any, out: Any) -> None:
    """Values of small codes that lie along n, float32 [n, groups], from all bytes of their words.

    Sixty-four rows at a time, so that what is written to, a column after the other, stays in a cache.
    """
    n, groups = out.shape
    width = raw.size // groups
    own = np.empty(64, np.int32)
    for first in range(0, n, 64):
        rows = min(64, n - first)
        for g in range(groups):
            _codes(raw, g * width + first // 8 * bits, bits, own[:rows])
            for r in range(rows):
                out[first + r, g] = values[own[r]]


@njit(cache=True, nogil=True, error_model="numpy")
def _affine(given: Any, first: Any, count: Any, k: Any, out: Any) -> None:
    """Scale * (code - zero), then outliers.

    `given`: bytes of the words of all rows; bits of a code; columns of a group; zeros and scales, float32 [n, groups];
    and outliers: where those of each row start, [n + 1], or [0] if there are none, columns, and float32 values.
    """
    raw, bits, size, zeros, scales, starts, columns, added = given
    width = raw.size // scales.shape[0]
    for r in range(count):
        row, own, at = first + r, out[r], (first + r) * width
        last = LANES * _whole(raw, at, bits, k)
        for g in range(scales.shape[1]):
            zero, scale, begin, end = zeros[row, g], scales[row, g], g * size, min(g * size + size, k)
            low, high = _inner(begin, end, last)
            j, place = low, at + (low >> 3) * bits
            if bits <= 4:
                while j < high:
                    scaled_4(raw, place, bits, zero, scale, own, j)
                    j, place = j + LANES, place + bits
            else:
                while j < high:
                    scaled_8(raw, place, bits, zero, scale, own, j)
                    j, place = j + LANES, place + bits
            if high - low < end - begin:
                for j in range(begin, end):
                    if not low <= j < high:
                        own[j] = (np.float32(_code(raw, at, bits, j)) - zero) * scale
        if starts.size:
            for e in range(starts[row], starts[row + 1]):
                own[columns[e]] += added[e]


@njit(cache=True, nogil=True, error_model="numpy")
def _levels(given: Any, first: Any, count: Any, k: Any, out: Any) -> None:
    """Level of the code, times what its sign is multiplied by in the group, times the row's scale.

    `given`: bytes of the words of all rows; bits of a code; columns of a group; levels, float32 [2^bits]; those of two
    neighbours as one number, uint64 [4^bits], or [0] if codes have more than 4 bits; factors of levels above 0 and of
    the others, float32 [n, groups]; and scales of rows, float32 [n].
    """
    raw, bits, size, levels, pairs, above, below, scales = given
    width, codes = raw.size // scales.size, np.empty(k, np.int32)
    for r in range(count):
        row, own, at = first + r, out[r], (first + r) * width
        begun = LANES * _whole(raw, at, bits, k) if pairs.size else 0
        mask, two = np.uint64(pairs.size - 1), own[:begun].view(np.uint64)
        for u in range(begun // LANES):
            word, place = _full_word(raw, at + u * bits), np.uint64(4 * u)
            for j in range(4):
                two[place + np.uint64(j)] = pairs[(word >> np.uint64(2 * bits * j)) & mask]
        rest = codes[begun:]
        _codes(raw, at + begun // LANES * bits, bits, rest)
        for j in range(begun, k):
            own[j] = levels[rest[j - begun]]
        scale = scales[row]
        for g in range(above.shape[1]):
            up, down, begin, end = above[row, g], below[row, g], g * size, min(g * size + size, k)
            low, high = _inner(begin, end, k)
            j = low
            while j < high:
                sided(own, j, up, down, scale)
                j += LANES
            if high - low < end - begin:
                for j in range(begin, end):
                    if not low <= j < high:
                        own[j] = own[j] * (up if own[j] > 0 else down) * scale


@njit(cache=True, nogil=True, error_model="numpy")
def _sum_of_signed(raw: Any, at: Any, pitch: Any, alpha: Any, total: Any, j: Any) -> Any:
    """A number and those of planes, each with the sign that its plane has in a column."""
    for i in range(alpha.size):
        total += alpha[i] if _code(raw, at + i * pitch, 1, j) else -alpha[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _planes(given: Any, first: Any, count: Any, k: Any, out: Any) -> None:
    """An offset and signed numbers, added in their order.

    `given`: bytes of the words of all planes, of all their rows; columns of a group; alpha, float32 [n, groups, bits];
    and offsets, float32 [n, groups].
    """
    raw, size, alpha, offsets = given
    groups, bits = alpha.shape[1:]
    pitch = raw.size // bits
    width = pitch // alpha.shape[0]
    for r in range(count):
        row, to = first + r, r * out.shape[1]
        for g in range(groups):
            offset, own = np.float32(0) + offsets[row, g], (row * groups + g) * bits
            begin, end, at = g * size, min(g * size + size, k), row * width
            low, high = _inner(begin, end, k)
            j = low
            while high - j >= 4 * LANES:
                signed_32(raw, at + (j >> 3), pitch, alpha, own, bits, offset, out, to + j)
                j += 4 * LANES
            while j < high:
                signed_8(raw, at + (j >> 3), pitch, alpha, own, bits, offset, out, to + j)
                j += LANES
            if high - low < end - begin:
                for j in range(begin, end):
                    if not low <= j < high:
                        out[r, j] = _sum_of_signed(raw, at, pitch, alpha[row, g], offset, j)


@njit(cache=True, nogil=True, error_model="numpy")
def _places(raw: Any, bits: Any, width: Any, more: Any, more_bits: Any, more_width: Any, vector: Any, out: Any) -> None:
    """Indices of a vector, int32 [k], from their low bytes and what is above those."""
    _codes(raw, vector * width, bits, out)
    if more_bits:
        high = np.empty(out.size, np.int32)
        _codes(more, vector * more_width, more_bits, high)
        for j in range(out.size):
            out[j] += high[j] << 8


@njit(cache=True, nogil=True, error_model="numpy")
def _look_up(book: Any, size: Any, step: Any, length: Any, at: Any, span: Any, add: Any, out: Any, to: Any) -> None:
    """Rows `span[0]` to `span[1]` of the entries that indices name, written or added to rows of `out` from `to` on."""
    for begin in range(0, at.size, size):
        own, before = at[begin : begin + size], begin // size * step
        for j in range(own.size):
            own[j] = own[j] * length + before
    low, high = span
    pitch, full = out.shape[1], at.size // LANES * LANES
    for e in range(low, high, LANES):
        rows, place = min(high - e, LANES), (to + e - low) * pitch
        if add:
            for j in range(0, full, LANES):
                add_entries(book, at, j, e, out, place + j, pitch, rows)
        else:
            for j in range(0, full, LANES):
                entries(book, at, j, e, out, place + j, pitch, rows)
        for j in range(full, at.size):
            for r in range(rows):
                value = book[at[j] + e + r]
                out[to + e - low + r, j] = out[to + e - low + r, j] + value if add else value


@njit(cache=True, nogil=True, error_model="numpy")
def _vectors(given: Any, first: Any, count: Any, k: Any, out: Any) -> None:
    """Codebook entries, two added if there are two, then scales of columns, then those that are kept as they are.

    `given`: rows of an entry and columns of a group; of the first index of a vector the bytes of the words of its low
    bits, bits of one and bytes of a vector's, the same of what is above, its codebook, float32, flat with eight numbers
    more, and how many a group has; the same of the second; scales and offsets of columns, float32 [k], or [0]; columns
    that are kept; and their values, float32 [n, columns]. Bits are 0 where there are none.
    """
    (
        length, size, low, bits, width, high, more, more_width, book, step, low2, bits2, width2, high2, more2,
        more_width2, book2, step2, scales, offsets, columns, values,
    ) = given  # fmt: skip
    at = np.empty(k, np.int32)
    for vector in range(first // length, (first + count - 1) // length + 1):
        begin, end = max(vector * length, first), min((vector + 1) * length, first + count)
        span, to = (begin - vector * length, end - vector * length), begin - first
        _places(low, bits, width, high, more, more_width, vector, at)
        _look_up(book, size, step, length, at, span, False, out, to)
        if bits2:
            _places(low2, bits2, width2, high2, more2, more_width2, vector, at)
            _look_up(book2, size, step2, length, at, span, True, out, to)
        for row in range(begin, end):
            own = out[row - first]
            if scales.size:
                for j in range(k):
                    own[j] = own[j] * scales[j] + offsets[j]
            for c in range(columns.size):
                own[columns[c]] = values[row, c]


AFFINE, LEVELS, PLANES, VECTORS = (0,) * 1, (0,) * 2, (0,) * 3, (0,) * 4
_WRITERS = {
    1: lambda kind, given, first, count, k, out: _affine(given, first, count, k, out),
    2: lambda kind, given, first, count, k, out: _levels(given, first, count, k, out),
    3: lambda kind, given, first, count, k, out: _planes(given, first, count, k, out),
    4: lambda kind, given, first, count, k, out: _vectors(given, first, count, k, out),
}


def _write(kind: Any, given: Any, first: Any, count: Any, k: Any, out: Any) -> None:
    """Write so many rows from `first` on to the first k columns of those of `out`."""


@overload(_write, strict=False)  # lambdas have no annotations
def _writer(kind: Any, given: Any, first: Any, count: Any, k: Any, out: Any) -> Any:
    return _WRITERS[kind.count]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _fill(kind: Any, given: Any, step: Any, first: Any, out: Any) -> None:
    n, k = out.shape
    for task in prange(-(-n // step)):
        begin = task * step
        own = out[begin : begin + step]
        _write(kind, given, first + begin, own.shape[0], k, own)


@njit(cache=True, nogil=True, error_model="numpy")
def fill_by_one(kind: Any, given: Any, step: Any, first: Any, out: Any) -> None:
    """Write rows from `first` on of a weight into float32 [rows, k], `step` at a time; by one thread."""
    _fill(kind, given, step, first, out)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def fill_by_all(kind: Any, given: Any, step: Any, first: Any, out: Any) -> None:
    """The same by all."""
    _fill(kind, given, step, first, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _multiply(w: Any, x: Any, sums: Any, y: Any, first: Any) -> None:
    """Products of rows of x with so many rows of a weight, both filled up with zeros to whole eights of columns."""
    m, width = x.shape
    sums[:] = 0
    for begin in range(0, width, _TILE):
        units = min(_TILE, width - begin) // LANES
        for r in range(0, w.shape[0], ROWS):
            at, to = r * width + begin, r * m * LANES
            for i in range(0, m - 1, 2):
                dots_2(w, at, width, x, i * width + begin, width, units, sums, to + i * ROWS * LANES, ROWS * LANES)
            if m % 2:
                i = m - 1
                dots_1(w, at, width, x, i * width + begin, width, units, sums, to + i * ROWS * LANES, ROWS * LANES)
    for r in range(min(w.shape[0], y.shape[1] - first)):
        for i in range(m):
            own = sums[((r // ROWS * m + i) * ROWS + r % ROWS) * LANES :]
            y[i, first + r] = ((own[0] + own[4]) + (own[2] + own[6])) + ((own[1] + own[5]) + (own[3] + own[7]))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _product(kind: Any, given: Any, step: Any, k: Any, x: Any, y: Any) -> None:
    (m, width), n = x.shape, y.shape[1]
    rows = -(-_TASK // step) * step
    for task in prange(-(-n // rows)):
        w, sums = np.zeros((-(-step // ROWS) * ROWS, width), np.float32), np.empty(0, np.float32)
        sums = np.empty(w.shape[0] * m * LANES, np.float32)
        for first in range(task * rows, min(n, (task + 1) * rows), step):
            _write(kind, given, first, min(step, n - first), k, w)
            _multiply(w, x, sums, y[:, : first + step], first)


@njit(cache=True, nogil=True, error_model="numpy")
def product_by_one(kind: Any, given: Any, step: Any, k: Any, x: Any, y: Any) -> None:
    """Products of few rows of x with a weight [n, k], of which `step` rows are decoded at a time; by one thread.

    Args:
        kind: see above.
        given: see above.
        step: rows.
        k: columns.
        x: float32 [m, k filled up with zeros to whole eights].
        y: float32 [m, n].
    """
    _product(kind, given, step, k, x, y)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def product_by_all(kind: Any, given: Any, step: Any, k: Any, x: Any, y: Any) -> None:
    """The same by all."""
    _product(kind, given, step, k, x, y)
