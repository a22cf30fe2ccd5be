"""Loops that write rows of a decoded weight.

Each row is written twice, the second time while a first-level cache has it: codes as floats, then what its groups make
of them. Both are loops that LLVM turns into vector instructions of whatever processor there is: eight codes come out of
one word of 64 bits, and a group is a run of floats that is worked on in place. Groups may begin anywhere.

Operations and their order are those of the formats' `decode`, and nothing lets the compiler fuse or reorder them.
All is in one file because numba looks only at that when it asks whether what it has compiled before is still good.
"""

from typing import Any

import numpy as np
from numba import njit, prange


@njit(cache=True, nogil=True, error_model="numpy")
def _word(raw: Any, at: Any, count: Any) -> Any:
    """So many bytes, at most eight, as one number."""
    word = np.uint64(0)
    for i in range(count):
        word |= np.uint64(raw[at + i]) << np.uint64(8 * i)
    return word


@njit(cache=True, nogil=True, error_model="numpy")
def _full_word(raw: Any, at: Any) -> Any:
    """Eight bytes as one number: one load, because the count is known and no place can be negative."""
    word, place = np.uint64(0), np.uint64(at)
    for i in range(8):
        word |= np.uint64(raw[place + np.uint64(i)]) << np.uint64(8 * i)
    return word


@njit(cache=True, nogil=True, error_model="numpy")
def _values(raw: Any, at: Any, bits: Any, values: Any, out: Any) -> None:
    """Values of the codes of a row, whose stream of bits begins at a byte."""
    mask, units = np.uint64((1 << bits) - 1), out.size // 8
    full = max(min(units, (raw.size - at - 8) // bits + 1), 0)  # beyond, eight bytes would go past the end
    for u in range(full):
        word, first = _full_word(raw, at + u * bits), np.uint64(8 * u)
        for j in range(8):
            out[first + np.uint64(j)] = values[(word >> np.uint64(j * bits)) & mask]
    for u in range(full, (out.size + 7) // 8):
        word = _word(raw, at + u * bits, bits)
        for j in range(min(8, out.size - 8 * u)):
            out[8 * u + j] = values[(word >> np.uint64(j * bits)) & mask]


@njit(cache=True, nogil=True, error_model="numpy")
def across(raw: Any, bits: Any, values: Any, out: Any) -> None:
    """Values of small codes that lie along n, float32 [n, groups], from all bytes of their words.

    Sixty-four rows at a time, so that what is written to, a column after the other, stays in a cache.
    """
    n, groups = out.shape
    width = raw.size // groups
    own = np.empty(64, np.float32)
    for first in range(0, n, 64):
        rows = min(64, n - first)
        for g in range(groups):
            _values(raw, g * width + first // 8 * bits, bits, values, own[:rows])
            for r in range(rows):
                out[first + r, g] = own[r]


@njit(cache=True, nogil=True, error_model="numpy")
def _affine_row(
    raw: Any, at: Any, bits: Any, values: Any, size: Any, zeros: Any, scales: Any, sparse: Any, row: Any, out: Any
) -> None:  # fmt: skip
    """Scale * (code - zero), then outliers."""
    _values(raw, at, bits, values, out)
    for g in range(scales.shape[1]):
        part, zero, scale = out[g * size : (g + 1) * size], zeros[row, g], scales[row, g]
        for j in range(part.size):
            part[j] = (part[j] - zero) * scale
    starts, columns, added = sparse
    if starts.size:
        for e in range(starts[row], starts[row + 1]):
            out[columns[e]] += added[e]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _affine(
    raw: Any, bits: Any, values: Any, size: Any, zeros: Any, scales: Any, sparse: Any, first: Any, out: Any
) -> None:  # fmt: skip
    width = raw.size // scales.shape[0]
    starts, columns, added = sparse
    for r in prange(out.shape[0]):
        row = first + r
        _affine_row(raw, row * width, bits, values, size, zeros, scales, (starts, columns, added), row, out[r])


@njit(cache=True, nogil=True, error_model="numpy")
def affine_by_one(
    raw: Any, bits: Any, values: Any, size: Any, zeros: Any, scales: Any, sparse: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """Write rows from `first` on of a weight that is scale * (code - zero), plus outliers; by one thread.

    Args:
        raw: bytes of the words of all rows.
        bits: of a code.
        values: the codes as floats, float32 [2^bits].
        size: columns of a group.
        zeros: float32 [n, groups].
        scales: float32 [n, groups].
        sparse: outliers: where those of each row start, [n + 1], or [0] if there are none; columns; float32 values.
        first: row.
        out: float32 [rows, k].
    """
    _affine(raw, bits, values, size, zeros, scales, sparse, first, out)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def affine_by_all(
    raw: Any, bits: Any, values: Any, size: Any, zeros: Any, scales: Any, sparse: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """The same by all."""
    _affine(raw, bits, values, size, zeros, scales, sparse, first, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _levels_row(
    raw: Any, at: Any, bits: Any, size: Any, levels: Any, above: Any, below: Any, scale: Any, row: Any, out: Any
) -> None:  # fmt: skip
    """Level of the code, times what its sign is multiplied by in the group, times the row's scale."""
    _values(raw, at, bits, levels, out)
    for g in range(above.shape[1]):
        part, up, down = out[g * size : (g + 1) * size], above[row, g], below[row, g]
        for j in range(part.size):
            part[j] = part[j] * (up if part[j] > 0 else down) * scale


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _levels(
    raw: Any, bits: Any, size: Any, levels: Any, above: Any, below: Any, scales: Any, first: Any, out: Any
) -> None:  # fmt: skip
    width = raw.size // above.shape[0]
    for r in prange(out.shape[0]):
        row = first + r
        _levels_row(raw, row * width, bits, size, levels, above, below, scales[row], row, out[r])


@njit(cache=True, nogil=True, error_model="numpy")
def levels_by_one(
    raw: Any, bits: Any, size: Any, levels: Any, above: Any, below: Any, scales: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """Write rows from `first` on of a weight that is level(code) * factor * scale; by one thread.

    Args:
        raw: bytes of the words of all rows.
        bits: of a code.
        size: columns of a group.
        levels: float32 [2^bits].
        above: factors of levels above 0, float32 [n, groups].
        below: of the others.
        scales: of rows, float32 [n].
        first: row.
        out: float32 [rows, k].
    """
    _levels(raw, bits, size, levels, above, below, scales, first, out)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def levels_by_all(
    raw: Any, bits: Any, size: Any, levels: Any, above: Any, below: Any, scales: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """The same by all."""
    _levels(raw, bits, size, levels, above, below, scales, first, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _spread(byte: Any) -> Any:
    """The bits of a byte as the lowest bits of eight."""
    word = np.uint64(byte) * np.uint64(0x0101010101010101) & np.uint64(0x8040201008040201)
    return (word + np.uint64(0x00406070787C7E7F)) >> np.uint64(7) & np.uint64(0x0101010101010101)


@njit(cache=True, nogil=True, error_model="numpy")
def _planes_row(
    raw: Any, at: Any, pitch: Any, size: Any, alpha: Any, offsets: Any, row: Any, words: Any, out: Any
) -> None:  # fmt: skip
    """An offset and signed numbers, added in their order; `words` takes eight codes each."""
    bits, codes = alpha.shape[2], words.view(np.uint8)
    for u in range(words.size):
        word, place = np.uint64(0), at + u
        for i in range(bits):
            word |= _spread(raw[place + i * pitch]) << np.uint64(i)
        words[u] = word
    for g in range(alpha.shape[1]):
        part, own = out[g * size : (g + 1) * size], codes[g * size : (g + 1) * size]
        part[:] = np.float32(0) + offsets[row, g]
        for i in range(bits):
            plus, bit = alpha[row, g, i], np.uint8(1 << i)
            minus = -plus
            for j in range(part.size):
                part[j] += plus if own[j] & bit else minus


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _planes(raw: Any, size: Any, alpha: Any, offsets: Any, first: Any, out: Any) -> None:
    pitch = raw.size // alpha.shape[2]
    width = pitch // alpha.shape[0]
    for r in prange(out.shape[0]):
        row = first + r
        words = np.empty((out.shape[1] + 7) // 8, np.uint64)
        _planes_row(raw, row * width, pitch, size, alpha, offsets, row, words, out[r])


@njit(cache=True, nogil=True, error_model="numpy")
def planes_by_one(raw: Any, size: Any, alpha: Any, offsets: Any, first: Any, out: Any) -> None:
    """Write rows from `first` on of a weight that is an offset and a number with a sign for each plane; by one thread.

    Args:
        raw: bytes of the words of all planes, of all their rows.
        size: columns of a group.
        alpha: float32 [n, groups, bits].
        offsets: float32 [n, groups].
        first: row.
        out: float32 [rows, k].
    """
    _planes(raw, size, alpha, offsets, first, out)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def planes_by_all(raw: Any, size: Any, alpha: Any, offsets: Any, first: Any, out: Any) -> None:
    """The same by all."""
    _planes(raw, size, alpha, offsets, first, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _vector_rows(low: Any, high: Any, codebook: Any, size: Any, add: Any, vector: Any, first: Any, out: Any) -> None:
    """Entries that the indices of a vector name, written or added to those of its rows that `out` has."""
    k, length = out.shape[1], codebook.shape[2]
    at = np.empty(k, np.int32)
    _values(low[0], vector * low[3], low[1], low[2], at)
    if high[1]:
        more = np.empty(k, np.int32)
        _values(high[0], vector * high[3], high[1], high[2], more)
        for j in range(k):
            at[j] += more[j]
    entries, flat = codebook.shape[1], codebook.reshape(-1)
    for j in range(k):
        at[j] = (j // size * entries + at[j]) * length
    for e in range(max(first - vector * length, 0), min(first + out.shape[0] - vector * length, length)):
        own = out[vector * length + e - first]
        if add:
            for j in range(k):
                own[j] += flat[np.uint64(at[j] + e)]
        else:
            for j in range(k):
                own[j] = flat[np.uint64(at[j] + e)]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _vectors(
    main: Any, rest: Any, size: Any, scales: Any, offsets: Any, columns: Any, values: Any, first: Any, out: Any
) -> None:
    low, high, codebook = main
    low2, high2, codebook2 = rest
    length = codebook.shape[2]
    begin = first // length
    for i in prange((first + out.shape[0] - 1) // length + 1 - begin):
        vector = begin + i
        _vector_rows(low, high, codebook, size, False, vector, first, out)
        if low2[1]:
            _vector_rows(low2, high2, codebook2, size, True, vector, first, out)
        for row in range(max(vector * length, first), min((vector + 1) * length, first + out.shape[0])):
            own = out[row - first]
            if scales.size:
                for j in range(own.size):
                    own[j] = own[j] * scales[j] + offsets[j]
            for c in range(columns.size):
                own[columns[c]] = values[row, c]


@njit(cache=True, nogil=True, error_model="numpy")
def vectors_by_one(
    main: Any, rest: Any, size: Any, scales: Any, offsets: Any, columns: Any, values: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """Write rows from `first` on of a weight of codebook entries; by one thread.

    Args:
        main: the low bytes of indices and what is above them: bytes of their words, bits of one, what these add to an
            index, int32 [2^bits], and bytes of a vector's; and the codebook, float32 [groups, entries, rows]. Bits are
            0 where there are none.
        rest: the same of what is added.
        size: columns of a group.
        scales: of columns, float32 [k], or [0].
        offsets: alike.
        columns: that are kept as they are.
        values: theirs, float32 [n, columns].
        first: row.
        out: float32 [rows, k].
    """
    low, high, codebook = main
    low2, high2, codebook2 = rest
    _vectors((low, high, codebook), (low2, high2, codebook2), size, scales, offsets, columns, values, first, out)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def vectors_by_all(
    main: Any, rest: Any, size: Any, scales: Any, offsets: Any, columns: Any, values: Any, first: Any, out: Any
) -> None:  # fmt: skip
    """The same by all."""
    low, high, codebook = main
    low2, high2, codebook2 = rest
    _vectors((low, high, codebook), (low2, high2, codebook2), size, scales, offsets, columns, values, first, out)
