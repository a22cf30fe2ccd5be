"""Tile functions of every format whose weights are scale * (code - zero), one scale and one zero a group of a row.

A format brings `PARAMETERS(w, row, n0, sub, column, by, A)` -> scale and zero * by, float32 [rows, columns]; `by` is a
number or float32 [1, columns], what a zero is multiplied by in any case, so that what is the same for all rows can be
multiplied once. It keeps per-group arrays in one of three layouts, KB = ceil(k / 32):
    groups of whole blocks of 32 columns, or one group a row     [n, groups]
    groups smaller than a block, `sub` of them in a block        [n, sub, KB]; group `sub b + h` at [h, b]
    any other size                                               [n, groups]; a scale is looked up for every weight
Of `w` only the first tensor is used here: the codes, as `_stream` lays them out. The format's constants `A` start with
those that `affine` gives: bits, window, sub, wide, count, reduce, width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.kernels._gemm import Decoder, blocks
from qexport.kernels._stream import EXPONENT, WINDOW, code, dot_codes, load_windows, load_words, windows_of


@dataclass(frozen=True)
class Groups:
    """How the groups of a row lie over its blocks of 32 codes.

    Attributes:
        sub: groups in a block; 0 if groups and blocks don't line up.
        wide: blocks in a group; the group size itself where sub is 0.
        count: groups in a row.
        reduce: neighbouring blocks that are added up before scales are applied; they share a group.
        width: columns of a per-group array.
    """

    sub: int
    wide: int
    count: int
    reduce: int
    width: int

    @staticmethod
    def of(group_size: int, k: int) -> "Groups":
        """Groups of `group_size` columns, -1 for one a row."""
        g = k if group_size == -1 else min(group_size, k)
        count = -(-k // g)
        if count == 1:
            return Groups(1, blocks(k), 1, 4, 1)
        if g % 32 == 0:
            return Groups(1, g // 32, count, next(r for r in (4, 2, 1) if g // 32 % r == 0), count)
        return Groups(32 // g, 1, count, 1, blocks(k)) if 32 % g == 0 else Groups(0, g, count, 1, count)

    def columns(self, values: Tensor, k: int) -> Tensor:
        """Per-group values [n, groups, ...] in the kernels' layout; what pads a row is 0."""
        if self.sub <= 1:
            return values.contiguous()
        short = blocks(k) * self.sub - values.shape[1]
        padded = torch.cat((values, values.new_zeros((values.shape[0], short, *values.shape[2:]))), 1)
        return padded.unflatten(1, (-1, self.sub)).transpose(1, 2).contiguous()


def affine(
    groups: Groups,
    bits: int,
    extra: tuple[int, ...],
    *,
    dot: Any,
    begin: Any,
    decode: Any,
    sparse: tuple[Any, Any] = (None, None),
) -> Decoder:
    """The decoder of such a format; `extra` follows the seven constants that this file reads from `A`.

    `sparse` are the decoder's `sparse` and `scatter`.
    """
    args = (bits, WINDOW[bits], groups.sub, groups.wide, groups.count, groups.reduce, groups.width, *extra)
    if groups.sub == 0:
        return Decoder(dot, begin, decode, args, *sparse)
    return Decoder(dot, begin, decode, args, *sparse, groups.reduce, groups.sub, bits, EXPONENT)


def slot_bits(bits: int) -> int:
    """Bits that a per-group code takes in the kernels' byte arrays: the next of 2, 4 and 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def slots(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., c] into uint8 [..., ceil(c / per)], `per` = 8 // slot_bits(bits) codes a byte, lowest first."""
    slot = slot_bits(bits)
    per = 8 // slot
    c = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -c % per)).reshape(*codes.shape[:-1], -(-c // per), per)
    shifts = torch.arange(0, 8, slot, dtype=torch.uint8, device=codes.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


@triton.jit
def row_of(row, sub: tl.constexpr, A: tl.constexpr):
    """First index of a per-group array."""
    return row * A[2] + sub if A[2] > 1 else row


@triton.jit
def load_slot(codes_ptr, first, column, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Codes packed by `slots` at [first, column] of an array with so many columns, float32 [rows, columns]."""
    PER: tl.constexpr = 4 if BITS <= 2 else (2 if BITS <= 4 else 1)
    BYTES: tl.constexpr = (COLUMNS + PER - 1) // PER
    at = codes_ptr + first[:, None] * BYTES
    if PER == 1:
        out = tl.load(at + column[None, :]).to(tl.float32)
    else:
        byte = tl.load(at + (column // PER)[None, :]).to(tl.int32)
        out = ((byte >> (column % PER * (8 // PER))[None, :]) & ((1 << (8 // PER)) - 1)).to(tl.float32)
    return out


@triton.jit
def affine_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Contract x with blocks kb0 and on: sum over groups of scale * (sum of code * x - zero * sum of x)."""
    BITS: tl.constexpr = A[0]
    SUB: tl.constexpr = A[2]
    RED: tl.constexpr = A[5]
    kb = kb0 + tl.arange(0, BKB)
    words = load_words(w[0], row, kb, BITS, KB, EVEN)
    acc = tl.zeros((row.shape[0], BKB // RED), tl.float32)
    if SUB == 0:
        windows = windows_of(words, BITS, A[1])
        for i in tl.static_range(32):
            scale, zero = PARAMETERS(w, row, n0, 0, tl.minimum((kb * 32 + i) // A[3], A[4] - 1), 1.0, A)
            acc += (code(windows, i, BITS, A[1]) - zero) * scale * tl.load(x_ptr + i * KBP + kb)[None, :]
    else:
        quad = kb0 // RED + tl.arange(0, BKB // RED)
        for h in tl.static_range(SUB):
            total = tl.load(s_ptr + h * (KBP // RED) + quad)[None, :]
            scale, less = PARAMETERS(w, row, n0, h, column_of(quad, EVEN, A), total, A)
            start = -less if RED == 1 else tl.zeros((row.shape[0], BKB), tl.float32)
            part = dot_codes(words, x_ptr + kb, start, h * (32 // SUB), (h + 1) * (32 // SUB), KBP, BITS)
            if RED > 1:
                part = tl.sum(tl.reshape(part, (row.shape[0], BKB // RED, RED)), axis=2) - less
            acc += scale * part
    return acc


@triton.jit
def column_of(quad, EVEN: tl.constexpr, A: tl.constexpr):
    """Column of the group of blocks `RED * quad` and on; past the end of a row the last column, where x is 0."""
    if A[4] == 1:
        out = quad * 0
    elif EVEN:
        out = quad // (A[3] // A[5])
    else:
        out = tl.minimum(quad // (A[3] // A[5]), A[6] - 1)
    return out


@triton.jit
def affine_begin(
    w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr, PARAMETERS: tl.constexpr
):
    """Windows of a tile, and scales and zeros of its groups."""
    kb = kb0 + tl.arange(0, BKB)
    SUB: tl.constexpr = A[2]
    windows = load_windows(w[0], row, kb, A[0], A[1], KB, EVEN)
    scales = ()
    zeros = ()
    for h in tl.static_range(SUB):
        column = tl.minimum(kb // A[3], A[6] - 1)
        scale, zero = PARAMETERS(w, row, n0, h, column, 1.0, A)
        scales = scales + (scale,)  # type: ignore[assignment]
        zeros = zeros + (zero,)  # type: ignore[assignment]
    return windows, scales, zeros


@triton.jit
def affine_decode(
    w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr,
    PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Weights INDEX of all blocks of a tile."""
    windows, scales, zeros = state
    if A[2] == 0:
        kb = kb0 + tl.arange(0, BKB)
        scale, zero = PARAMETERS(w, row, n0, 0, tl.minimum((kb * 32 + INDEX) // A[3], A[4] - 1), 1.0, A)
    else:
        scale = scales[INDEX * A[2] // 32]
        zero = zeros[INDEX * A[2] // 32]
    return (code(windows, INDEX, A[0], A[1]) - zero) * scale
