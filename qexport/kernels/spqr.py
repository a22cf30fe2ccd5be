"""Triton kernel of the `spqr` format: codes with two-level parameters, plus sparse outliers that are added.

Layout that the kernel reads (`repack`), per-group arrays as `_affine` says:
    words             int32 [n, bits, KB]            see `_stream`
    scale_codes       uint8, 1, 2 or 4 codes a byte  first-level codes of the scale ...
    zero_codes        likewise                       ... and of the zero of a group
    stats             int64, ceil(n / 16) "rows"     four 16-bit floats: scale step, scale zero, zero step, zero zero
    rows, cols, vals  int32 [n + 1], uint16 or int32 [nnz], 16-bit float [nnz]   outliers as stored
scale = scale step * (scale code - scale zero), zero likewise. Outliers are added where the parts of k are summed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.formats._bits import unpack_bits
from qexport.kernels._affine import (
    Groups,
    affine,
    affine_begin,
    affine_decode,
    affine_dot,
    load_slot,
    row_of,
    slots,
)
from qexport.kernels._gemm import Decoder, too_old
from qexport.kernels._stream import split_words
from qexport.schema import Tensors


class SpqrKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        widest = max(fmt.bits, fmt.scale_bits, fmt.zero_bits)
        return too_old() if widest <= 8 else f"codes of {widest} bits; 1 to 8 are read"

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        groups = Groups.of(fmt.group_size, k)
        words = split_words(packed["qweight"], fmt.bits)
        first = [
            slots(groups.columns(unpack_bits(packed[name], bits, n).T, k), bits)
            for name, bits in (("qscales", fmt.scale_bits), ("qzeros", fmt.zero_bits))
        ]
        stats = groups.columns(
            packed["stats"].clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(-1), k
        )
        return words, *first, stats, *(packed[f"outlier_{name}"] for name in ("rows", "columns", "values"))

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants."""
        rows = fmt.stats_group
        extra = (fmt.scale_bits, fmt.zero_bits, rows, int(fmt.scale_dtype == "bfloat16"), rows & -rows)
        groups, sparse = Groups.of(fmt.group_size, k), (tile_sparse, tile_scatter)
        return affine(groups, fmt.bits, extra, dot=tile_dot, begin=tile_begin, decode=tile_decode, sparse=sparse)


@triton.jit
def _half(word, AT: tl.constexpr, BF16: tl.constexpr):
    """16-bit float AT of an int64, as float32."""
    bits = (word >> (16 * AT)).to(tl.int32)
    if BF16:
        out = (bits << 16).to(tl.float32, bitcast=True)
    else:
        out = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return out


@triton.jit
def _parameters(w, row, n0, sub: tl.constexpr, column, KB: tl.constexpr, A: tl.constexpr):
    first = row_of(row, sub, A)
    scale_code = load_slot(w[1], first, column, A[6], A[7])
    zero_code = load_slot(w[2], first, column, A[6], A[8])
    # The rows of a tile are a power of two: if they divide a block's, the tile shares its second level.
    block = tl.full((1,), n0 // A[9], tl.int64) if row.shape[0] <= A[11] else row // A[9]
    stats = tl.load(w[3] + row_of(block, sub, A)[:, None] * A[6] + column[None, :])
    scale = _half(stats, 0, A[10]) * (scale_code - _half(stats, 1, A[10]))
    zero = _half(stats, 2, A[10]) * (zero_code - _half(stats, 3, A[10]))
    return scale, zero


@triton.jit
def tile_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """See `_affine`."""
    return affine_dot(w, x_ptr, s_ptr, row, n0, kb0, KB, KBP, BKB, EVEN, A, _parameters)


@triton.jit
def tile_begin(w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """See `_affine`."""
    return affine_begin(w, row, n0, kb0, KB, BKB, EVEN, A, _parameters)


@triton.jit
def tile_decode(w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr):
    """See `_affine`."""
    return affine_decode(w, state, row, n0, kb0, INDEX, KB, BKB, A, _parameters)


@triton.jit
def tile_sparse(w, x_ptr, row, m, M, E: tl.constexpr):
    """Outliers times x [k, M]: E entries of every row at a time."""
    start = tl.load(w[4] + row)
    end = tl.load(w[4] + row + 1)
    acc = tl.zeros((row.shape[0], m.shape[0]), tl.float32)
    for done in range(0, tl.max(end - start), E):
        entry = start[:, None] + done + tl.arange(0, E)[None, :]
        live = entry < end[:, None]
        column = tl.load(w[5] + entry, mask=live, other=0).to(tl.int64)
        value = tl.load(w[6] + entry, mask=live, other=0.0).to(tl.float32)
        at = column[:, :, None] * M + m[None, None, :]
        x = tl.load(x_ptr + at, mask=live[:, :, None], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, :, None] * x, axis=1)
    return acc


@triton.jit
def tile_scatter(w, out_ptr, row, live, at, KBP: tl.constexpr, E: tl.constexpr):
    """Add outliers to decoded rows: E entries of every row at a time, no two of which meet."""
    start = tl.load(w[4] + row)
    end = tl.where(live, tl.load(w[4] + row + 1), start)
    for done in range(0, tl.max(end - start), E):
        entry = start[:, None] + done + tl.arange(0, E)[None, :]
        mine = entry < end[:, None]
        column = tl.load(w[5] + entry, mask=mine, other=0).to(tl.int64)
        value = tl.load(w[6] + entry, mask=mine, other=0.0).to(tl.float32)
        place = out_ptr + at[:, None] + column % 32 * KBP + column // 32
        value += tl.load(place, mask=mine, other=0.0).to(tl.float32)
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=mine)


plugin = SpqrKernel()
