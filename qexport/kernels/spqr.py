"""Triton kernel of the `spqr` format: codes with two-level parameters, plus sparse outliers that are added.

Layout that the kernel reads (`repack`), per-group arrays as `_affine` says:
    words             int32 [n, bits, KB]            see `_stream`
    pairs             int32, 8, 4 or 2 pairs a word  first-level codes of a group in 2, 4 or 8 bits each: scale, zero
    stats             16-bit float [4, rows, ...]    scale step, scale zero, zero step, zero zero of a block of rows
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
    row_of,
    slot_bits,
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
        scales, zeros = (
            groups.columns(unpack_bits(packed[name], bits, n).T, k)
            for name, bits in (("qscales", fmt.scale_bits), ("qzeros", fmt.zero_bits))
        )
        pairs = _pairs(scales, zeros, _slot(fmt))
        stats = groups.columns(packed["stats"], k).movedim(-1, 0).contiguous()
        return words, pairs, stats, *(packed[f"outlier_{name}"] for name in ("rows", "columns", "values"))

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants."""
        rows = fmt.stats_group
        extra = (_slot(fmt), rows, rows & -rows, -(-n // rows))
        groups, sparse = Groups.of(fmt.group_size, k), (tile_sparse, tile_scatter)
        return affine(groups, fmt.bits, extra, dot=tile_dot, begin=tile_begin, decode=tile_decode, sparse=sparse)


def _slot(fmt: Any) -> int:
    """Bits that a first-level code takes in `pairs`."""
    return slot_bits(max(fmt.scale_bits, fmt.zero_bits))


def _pairs(scales: Tensor, zeros: Tensor, slot: int) -> Tensor:
    """Pack two uint8 [..., c] into int32 [..., ceil(c / per)], `per` = 16 // slot pairs a word, lowest first."""
    codes = torch.stack((scales, zeros), -1).to(torch.int32)
    per = 16 // slot
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % per)).unflatten(-2, (-1, per)).flatten(-2)
    return (padded << torch.arange(0, 32, slot, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)


@triton.jit
def _parameters(w, row, n0, sub: tl.constexpr, column, by, A: tl.constexpr):
    """See `_affine`. What the rows of a tile share is multiplied first; a group is left with two FMAs."""
    SLOT: tl.constexpr = A[7]
    EACH: tl.constexpr = A[10] * A[6] * (A[2] if A[2] > 1 else 1)
    CODE: tl.constexpr = (1 << SLOT) - 1
    PER: tl.constexpr = 16 // SLOT
    WORDS: tl.constexpr = (A[6] + PER - 1) // PER
    word = tl.load(w[1] + row_of(row, sub, A)[:, None] * WORDS + (column // PER)[None, :]).to(tl.uint32, bitcast=True)
    place = (column % PER * (2 * SLOT))[None, :]
    down = ((127 - place) << 23).to(tl.float32, bitcast=True)  # 2^-place: codes are converted where they lie
    # The rows of a tile are a power of two: if they divide a block's, the tile shares its second level.
    block = tl.full((1,), n0 // A[8], tl.int64) if row.shape[0] <= A[9] else row // A[8]
    at = w[2] + row_of(block, sub, A)[:, None] * A[6] + column[None, :]
    scale_step = tl.load(at).to(tl.float32)
    scale_zero = tl.load(at + EACH).to(tl.float32) * scale_step  # exact: 11 bits each
    zero_step = tl.load(at + 2 * EACH).to(tl.float32) * by
    zero_zero = tl.load(at + 3 * EACH).to(tl.float32) * zero_step
    scale = tl.fma((word & (CODE << place)).to(tl.float32), scale_step * down, -scale_zero)
    zero = tl.fma((word & (CODE << (place + SLOT))).to(tl.float32), zero_step * (down / (1 << SLOT)), -zero_zero)
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
    start = tl.load(w[3] + row)
    end = tl.load(w[3] + row + 1)
    acc = tl.zeros((row.shape[0], m.shape[0]), tl.float32)
    for done in range(0, tl.max(end - start), E):
        entry = start[:, None] + done + tl.arange(0, E)[None, :]
        live = entry < end[:, None]
        column = tl.load(w[4] + entry, mask=live, other=0).to(tl.int64)
        value = tl.load(w[5] + entry, mask=live, other=0.0).to(tl.float32)
        at = column[:, :, None] * M + m[None, None, :]
        x = tl.load(x_ptr + at, mask=live[:, :, None], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, :, None] * x, axis=1)
    return acc


@triton.jit
def tile_scatter(w, out_ptr, row, live, at, KBP: tl.constexpr, E: tl.constexpr):
    """Add outliers to decoded rows: E entries of every row at a time, no two of which meet."""
    start = tl.load(w[3] + row)
    end = tl.where(live, tl.load(w[3] + row + 1), start)
    for done in range(0, tl.max(end - start), E):
        entry = start[:, None] + done + tl.arange(0, E)[None, :]
        mine = entry < end[:, None]
        column = tl.load(w[4] + entry, mask=mine, other=0).to(tl.int64)
        value = tl.load(w[5] + entry, mask=mine, other=0.0).to(tl.float32)
        place = out_ptr + at[:, None] + column % 32 * KBP + column // 32
        value += tl.load(place, mask=mine, other=0.0).to(tl.float32)
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=mine)


plugin = SpqrKernel()
