"""Triton kernel of the `vector` format: indices into codebooks, scales and offsets of columns, whole columns.

Layout that the kernel reads (`repack`), KB = ceil(k / 32), P the next power of two of a vector's rows:
    outliers, values   int32 [1 + c], their number, then the columns; 16-bit float [n, c]; left out if there are none
    words, high        int32 [V, bits, KB]   low 8 bits of the indices, and those above if there are any, see `_stream`
    codebook           16-bit float [G, 2^bits, P]     an entry is one load; zeros fill it up
    ...                the same three for the second index, if there is one
    columns            16-bit float [2, 32, KB]     scale and offset of column 32 b + i at [i, b], 0 at outlier columns;
                       left out if nothing is scaled and there are no outliers
Every program looks up entries all over a codebook: it stays in a cache, and only indices come from memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.formats._bits import groups_in
from qexport.kernels._gemm import Decoder, blocks, too_old
from qexport.kernels._stream import WINDOW, load_windows, split_words
from qexport.schema import Tensors

_LONGEST = 8  # rows of a vector: 16 take more registers than there are


class VectorKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        own = fmt.sized(n, k)
        if own.vector_length > _LONGEST:
            return f"vectors of {own.vector_length} rows; up to {_LONGEST} are read"
        widest = max(own.index_bits, own.residual_bits)
        if groups_in(k, own.group_size) * (triton.next_power_of_2(own.vector_length) << widest) >= 2**31:
            return "codebooks of 2^31 numbers or more"
        return too_old()

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        own = fmt.sized(n, k)
        out = []
        if own.outlier_columns:
            columns = packed["outlier_index"].to(torch.int32)
            out += [torch.cat((columns.new_tensor([columns.numel()]), columns)), packed["outlier_values"]]
        for name, codebook, width in own.indexed:
            out.append(split_words(packed[name], min(width, 8)))
            if width > 8:
                out.append(split_words(packed[f"{name}_high"], width - 8))
            short = triton.next_power_of_2(own.vector_length) - own.vector_length
            out.append(torch.nn.functional.pad(packed[codebook], (0, short)).contiguous())
        return (*out, _columns(own, packed, k)) if own.normalize or own.outlier_columns else tuple(out)

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants."""
        own = fmt.sized(n, k)
        v, sparse = own.vector_length, tile_sparse if own.outlier_columns else None
        books, cached, at = list[int](), list[int](), 2 if sparse else 0
        for bits in (own.index_bits, own.residual_bits):
            low, high = min(bits, 8), max(bits - 8, 0)
            books += [bits, at, low, WINDOW[low], high, WINDOW[high]]
            at += (3 if high else 2) if bits else 0
            cached += [at - 1] if bits else []
        groups = groups_in(k, own.group_size)
        size = 0 if groups == 1 else own.group_size
        columns = at if own.normalize or sparse else -1
        cached += [columns] if columns >= 0 else []
        args = (v, triton.next_power_of_2(v), -(-n // v), groups, size, columns, *books)
        both = (sparse, tile_scatter if sparse else None)
        return Decoder(tile_dot, tile_begin, tile_decode, args, *both, reduce=0, vector=v, cached=tuple(cached))


def _columns(own: Any, packed: Tensors, k: int) -> Tensor:
    """Scales and offsets of columns, [2, 32, KB]."""
    both = packed["codebook"].new_zeros((2, 32 * blocks(k)))
    both[0, :k] = 1
    if own.normalize:
        both[0, :k], both[1, :k] = packed["column_scales"], packed["column_offsets"]
    if own.outlier_columns:
        both[:, packed["outlier_index"].long()] = 0
    return both.view(2, -1, 32).transpose(1, 2).contiguous()


# Constants `A`: rows of a vector, P, vectors in a column, groups, columns in a group (0: there is one group), where in
# `w` the columns' scales are (-1: nowhere), then for both indices: bits (0: there is none), where in `w` its tensors
# are, low bits, window, high bits, window. `BOOK` is where those of an index start.


@triton.jit
def _load_indices(w, vector, kb, BOOK: tl.constexpr, KB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """Windows of low and of high bits of an index."""
    low = load_windows(w[A[BOOK + 1]], vector, kb, A[BOOK + 2], A[BOOK + 3], KB, EVEN)
    if A[BOOK + 4] > 0:  # noqa: SIM108  not a conditional expression: there may be no such tensor
        high = load_windows(w[A[BOOK + 1] + 1], vector, kb, A[BOOK + 4], A[BOOK + 5], KB, EVEN)
    else:
        high = low
    return low, high


@triton.jit
def _index(windows, INDEX: tl.constexpr, BOOK: tl.constexpr, A: tl.constexpr):
    """Index of column INDEX of every block, int32 [vectors, blocks]."""
    low, high = windows
    index = (low[INDEX // A[BOOK + 3]] >> (INDEX % A[BOOK + 3] * A[BOOK + 2])) & ((1 << A[BOOK + 2]) - 1)
    if A[BOOK + 4] > 0:
        above = (high[INDEX // A[BOOK + 5]] >> (INDEX % A[BOOK + 5] * A[BOOK + 4])) & ((1 << A[BOOK + 4]) - 1)
        index = index | (above << 8)
    return index.to(tl.int32)


@triton.jit
def _load_code(q_ptr, vector, kb, INDEX: tl.constexpr, BITS: tl.constexpr, KB: tl.constexpr):
    """Code INDEX of every block from the one or two words that it lies in, uint32 [vectors, blocks]."""
    BIT: tl.constexpr = INDEX * BITS % 32
    at = q_ptr + vector[:, None] * (BITS * KB) + (INDEX * BITS // 32 * KB + kb)[None, :]
    inside = kb[None, :] < KB
    code = tl.load(at, mask=inside, other=0, eviction_policy="evict_first").to(tl.uint32, bitcast=True) >> BIT
    if BIT + BITS > 32:
        above = tl.load(at + KB, mask=inside, other=0, eviction_policy="evict_first")
        code = code | (above.to(tl.uint32, bitcast=True) << (32 - BIT))
    return code & ((1 << BITS) - 1)


@triton.jit
def _load_index(w, vector, kb, INDEX: tl.constexpr, BOOK: tl.constexpr, KB: tl.constexpr, A: tl.constexpr):
    """As `_index`, without windows: what holds them would not fit registers beside another index and a sum."""
    index = _load_code(w[A[BOOK + 1]], vector, kb, INDEX, A[BOOK + 2], KB)
    if A[BOOK + 4] > 0:
        index = index | (_load_code(w[A[BOOK + 1] + 1], vector, kb, INDEX, A[BOOK + 4], KB) << 8)
    return index.to(tl.int32)


@triton.jit
def _entries(w, index, kb, INDEX: tl.constexpr, BOOK: tl.constexpr, A: tl.constexpr):
    """Codebook entries of indices of column INDEX of every block, float32 [vectors, blocks, P]."""
    if A[4] > 0:
        group = kb // (A[4] // 32) if A[4] % 32 == 0 else (kb * 32 + INDEX) // A[4]
        index += (tl.minimum(group, A[3] - 1) << A[BOOK])[None, :]
    at = (index * A[1])[:, :, None] + tl.arange(0, A[1])[None, None, :]
    return tl.load(w[A[BOOK + 1] + (2 if A[BOOK + 4] > 0 else 1)] + at).to(tl.float32)


@triton.jit
def _column(w, kb, INDEX: tl.constexpr, WHICH: tl.constexpr, KB: tl.constexpr, A: tl.constexpr):
    """Scale (WHICH = 0) or offset of column INDEX of every block, float32 [blocks]; past the end of a row any one."""
    return tl.load(w[A[5]] + (WHICH * 32 + INDEX) * KB + tl.minimum(kb, KB - 1)).to(tl.float32)


@triton.jit
def _vectors(row, n0, A: tl.constexpr):
    """Vectors of the tile, int64; past the end the last one."""
    return tl.minimum(n0 // A[0] + tl.arange(0, row.shape[0] // A[1]), A[2] - 1).to(tl.int64)


@triton.jit
def tile_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """Contract x with blocks kb0 and on: x times scale times entries, and once for all rows x times offset."""
    P: tl.constexpr = A[1]
    kb = kb0 + tl.arange(0, BKB)
    vector = _vectors(row, n0, A)
    acc = tl.zeros((row.shape[0] // P, BKB, P), tl.float32)
    same = tl.zeros((BKB,), tl.float32)
    for book in tl.static_range(6, 18, 6):
        if A[book] > 0:
            windows = _load_indices(w, vector, kb, book, KB, EVEN, A)
            for i in tl.static_range(32):
                x = tl.load(x_ptr + i * KBP + kb)
                if A[5] >= 0:
                    if book == 6:
                        same = tl.fma(x, _column(w, kb, i, 1, KB, A), same)
                    x = x * _column(w, kb, i, 0, KB, A)
                acc = tl.fma(_entries(w, _index(windows, i, book, A), kb, i, book, A), x[None, :, None], acc)
    return tl.reshape(tl.sum(acc, axis=1) + tl.sum(same), (row.shape[0], 1))


@triton.jit
def tile_begin(w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """Vectors of a tile and windows of their first index."""
    kb = kb0 + tl.arange(0, BKB)
    vector = _vectors(row, n0, A)
    return vector, _load_indices(w, vector, kb, 6, KB, EVEN, A)


@triton.jit
def tile_decode(w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr):
    """Weights INDEX of all blocks of a tile."""
    kb = kb0 + tl.arange(0, BKB)
    vector, windows = state
    out = _entries(w, _index(windows, INDEX, 6, A), kb, INDEX, 6, A)
    if A[12] > 0:
        out += _entries(w, _load_index(w, vector, kb, INDEX, 12, KB, A), kb, INDEX, 12, A)
    if A[5] >= 0:
        out = out * _column(w, kb, INDEX, 0, KB, A)[None, :, None] + _column(w, kb, INDEX, 1, KB, A)[None, :, None]
    return tl.reshape(tl.permute(out, (0, 2, 1)), (row.shape[0], BKB))


@triton.jit
def tile_sparse(w, x_ptr, row, m, M, E: tl.constexpr):
    """Outlier columns times x [k, M], one after the other.

    Not several at once: Triton 3.6 takes the sum of an outer product's terms for a matrix product, and makes a wrong
    one of few terms, one in tf32 of more.
    """
    count = tl.load(w[0])
    acc = tl.zeros((row.shape[0], m.shape[0]), tl.float32)
    for entry in range(count):
        column = tl.load(w[0] + 1 + entry).to(tl.int64)
        value = tl.load(w[1] + row.to(tl.int64) * count + entry).to(tl.float32)
        acc = tl.fma(value[:, None], tl.load(x_ptr + column * M + m).to(tl.float32)[None, :], acc)
    return acc


@triton.jit
def tile_scatter(w, out_ptr, row, live, at, KBP: tl.constexpr, E: tl.constexpr):
    """Write outlier columns, where codes stand for 0, into decoded rows."""
    count = tl.load(w[0])
    for entry in range(count):
        column = tl.load(w[0] + 1 + entry).to(tl.int64)
        value = tl.load(w[1] + row.to(tl.int64) * count + entry)
        place = out_ptr + at + column % 32 * KBP + column // 32
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=live)


plugin = VectorKernel()
