"""Triton kernel of the `bcq` format: sums of signed numbers, read plane by plane.

Layout that the kernel reads (`repack`), KB = ceil(k / 32):
    words    int32 [n, bits, KB]      bit b of word (p, c) is the sign of plane p at column 32 c + b
    alpha    [bits, ...]              per-group arrays as `_affine` says, one behind the other
    offset   likewise, one of them    left out without an offset
A plane's part of a group is alpha (2 (sum of x where its bit is 1) - sum of x): with a bit left in its place, as
`_stream` says of codes, that is a mask and an FMA for each weight and plane. The offset takes the sum of x alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.kernels._affine import Groups, affine, column_of, row_of
from qexport.kernels._gemm import Decoder, too_old
from qexport.kernels._stream import dot_codes
from qexport.schema import Tensors


class BcqKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return too_old()

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        groups = Groups.of(fmt.group_size, k)
        words = packed["binary"].transpose(0, 1).contiguous()
        alpha = torch.stack([groups.columns(packed["alpha"][..., p], k) for p in range(fmt.bits)])
        if fmt.offset == "none":
            return words, alpha
        return words, alpha, groups.columns(packed["offset"], k)

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants; to the skeleton the codes are one bit wide."""
        groups = Groups.of(fmt.group_size, k)
        extra = (fmt.bits, int(fmt.offset != "none"), n)
        return affine(groups, 1, extra, dot=tile_dot, begin=tile_begin, decode=tile_decode)


@triton.jit
def _load_plane(q_ptr, row, kb, P: tl.constexpr, PLANES: tl.constexpr, KB: tl.constexpr, EVEN: tl.constexpr):
    """The words of plane P at blocks `kb` of rows `row`, uint32 [rows, blocks]; zero past the end of a row."""
    at = q_ptr + row[:, None] * (PLANES * KB) + P * KB + kb[None, :]
    if EVEN:
        word = tl.load(at, eviction_policy="evict_first")
    else:
        word = tl.load(at, mask=kb[None, :] < KB, other=0, eviction_policy="evict_first")
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def _alpha(w, row, P: tl.constexpr, sub: tl.constexpr, column, A: tl.constexpr):
    """Alpha of plane P, float32 [rows, columns]."""
    first = row_of(row, sub, A)[:, None] * A[6] + column[None, :]
    return tl.load(w[1] + first + P * (A[9] * A[2] * A[6] if A[2] > 1 else A[9] * A[6])).to(tl.float32)


@triton.jit
def _offset(w, row, sub: tl.constexpr, column, A: tl.constexpr):
    """Offset, float32 [rows, columns]."""
    return tl.load(w[2] + row_of(row, sub, A)[:, None] * A[6] + column[None, :]).to(tl.float32)


@triton.jit
def tile_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """Contract x with blocks kb0 and on, plane by plane."""
    SUB: tl.constexpr = A[2]
    RED: tl.constexpr = A[5]
    PLANES: tl.constexpr = A[7]
    kb = kb0 + tl.arange(0, BKB)
    acc = tl.zeros((row.shape[0], BKB // RED), tl.float32)
    if SUB == 0:
        for i in tl.static_range(32):
            column = tl.minimum((kb * 32 + i) // A[3], A[4] - 1)
            x = tl.load(x_ptr + i * KBP + kb)[None, :]
            if A[8]:
                acc += _offset(w, row, 0, column, A) * x
            for p in tl.static_range(PLANES):
                word = _load_plane(w[0], row, kb, p, PLANES, KB, EVEN)
                acc += _alpha(w, row, p, 0, column, A) * (((word >> i) & 1).to(tl.int32) * 2 - 1).to(tl.float32) * x
    else:
        quad = kb0 // RED + tl.arange(0, BKB // RED)
        column = column_of(quad, EVEN, A)
        for h in tl.static_range(SUB):
            total = tl.load(s_ptr + h * (KBP // RED) + quad)[None, :]
            if A[8]:
                acc += _offset(w, row, h, column, A) * total
            for p in tl.static_range(PLANES):
                word = _load_plane(w[0], row, kb, p, PLANES, KB, EVEN)
                none = tl.zeros(word.shape, tl.float32)
                part = dot_codes((word,), x_ptr + kb, none, h * (32 // SUB), (h + 1) * (32 // SUB), KBP, 1)
                if RED > 1:
                    part = tl.sum(tl.reshape(part, (row.shape[0], BKB // RED, RED)), axis=2)
                acc += _alpha(w, row, p, h, column, A) * (2.0 * part - total)
    return acc


@triton.jit
def tile_begin(w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """Words of a tile, and alphas and offsets of its groups."""
    SUB: tl.constexpr = A[2]
    PLANES: tl.constexpr = A[7]
    kb = kb0 + tl.arange(0, BKB)
    words = ()
    for p in tl.static_range(PLANES):
        words = words + (_load_plane(w[0], row, kb, p, PLANES, KB, EVEN),)  # type: ignore[assignment]
    numbers = ()
    for h in tl.static_range(SUB):
        column = tl.minimum(kb // A[3], A[6] - 1)
        for p in tl.static_range(PLANES):
            numbers = numbers + (_alpha(w, row, p, h, column, A),)  # type: ignore[assignment]
        if A[8]:
            numbers = numbers + (_offset(w, row, h, column, A),)  # type: ignore[assignment]
    return words, numbers


@triton.jit
def tile_decode(w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr):
    """Weights INDEX of all blocks of a tile."""
    words, numbers = state
    PLANES: tl.constexpr = A[7]
    EACH: tl.constexpr = A[7] + A[8]
    H: tl.constexpr = INDEX * A[2] // 32
    kb = kb0 + tl.arange(0, BKB)
    column = tl.minimum((kb * 32 + INDEX) // A[3], A[4] - 1)
    out = tl.zeros(words[0].shape, tl.float32)
    if A[8]:
        out += _offset(w, row, 0, column, A) if A[2] == 0 else numbers[H * EACH + A[7]]
    for p in tl.static_range(PLANES):
        alpha = _alpha(w, row, p, 0, column, A) if A[2] == 0 else numbers[H * EACH + p]
        out += tl.where((words[p] >> INDEX) & 1 != 0, alpha, -alpha)
    return out


plugin = BcqKernel()
