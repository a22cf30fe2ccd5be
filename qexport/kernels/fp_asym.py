"""Triton kernel of the `fp_asym` format: levels from a table, with one scale for either sign.

Layout that the kernel reads (`repack`), per-group arrays as `_affine` says:
    words        int32 [n, bits, KB]   see `_stream`
    scales_pos   float16 or bfloat16
    scales_neg   likewise, left out with one scale
    levels       float32 [2^bits]      by code
The products of x with levels above and below 0 are summed apart, so that scales are applied once a group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.formats.fp_asym import TABLES
from qexport.kernels._affine import Groups, affine, column_of, row_of
from qexport.kernels._gemm import Decoder, too_old
from qexport.kernels._stream import load_windows, split_words
from qexport.schema import Tensors


class FpAsymKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return too_old()

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        groups = Groups.of(fmt.group_size, k)
        scales = [groups.columns(packed[name], k) for name in ("scales_pos", "scales_neg") if name in packed]
        levels = torch.tensor(TABLES[fmt.code], dtype=torch.float32, device=packed["qweight"].device)
        return split_words(packed["qweight"], fmt.bits), levels, *scales

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants; x is used as it is."""
        groups = Groups.of(fmt.group_size, k)
        made = affine(groups, fmt.bits, (int(fmt.two_scales),), dot=tile_dot, begin=tile_begin, decode=tile_decode)
        return Decoder(tile_dot, tile_begin, tile_decode, made.args, reduce=made.reduce)


@triton.jit
def _scales(w, row, sub: tl.constexpr, column, A: tl.constexpr):
    """Scales of both signs, float32 [rows, columns]."""
    at = row_of(row, sub, A)[:, None] * A[6] + column[None, :]
    pos = tl.load(w[2] + at).to(tl.float32)
    if A[7]:  # noqa: SIM108  not a conditional expression: there is no w[3] with one scale
        neg = tl.load(w[3] + at).to(tl.float32)
    else:
        neg = pos
    return pos, neg


@triton.jit
def _level(w, windows, INDEX: tl.constexpr, A: tl.constexpr):
    """Level of code INDEX of every block, float32."""
    code = (windows[INDEX // A[1]] >> (INDEX % A[1] * A[0])) & ((1 << A[0]) - 1)
    return tl.load(w[1] + code.to(tl.int32))


@triton.jit
def tile_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """Contract x with blocks kb0 and on."""
    SUB: tl.constexpr = A[2]
    RED: tl.constexpr = A[5]
    kb = kb0 + tl.arange(0, BKB)
    windows = load_windows(w[0], row, kb, A[0], A[1], KB, EVEN)
    acc = tl.zeros((row.shape[0], BKB // RED), tl.float32)
    if SUB == 0:
        for i in tl.static_range(32):
            pos, neg = _scales(w, row, 0, tl.minimum((kb * 32 + i) // A[3], A[4] - 1), A)
            level = _level(w, windows, i, A)
            acc += tl.where(level > 0, pos, neg) * level * tl.load(x_ptr + i * KBP + kb)[None, :]
    else:
        column = column_of(kb0 // RED + tl.arange(0, BKB // RED), EVEN, A)
        for h in tl.static_range(SUB):
            above = tl.zeros((row.shape[0], BKB), tl.float32)
            below = tl.zeros((row.shape[0], BKB), tl.float32)
            for i in tl.static_range(h * (32 // SUB), (h + 1) * (32 // SUB)):
                level = _level(w, windows, i, A)
                x = tl.load(x_ptr + i * KBP + kb)[None, :]
                above = tl.fma(tl.maximum(level, 0.0), x, above)
                below = tl.fma(tl.minimum(level, 0.0), x, below)
            if RED > 1:
                above = tl.sum(tl.reshape(above, (row.shape[0], BKB // RED, RED)), axis=2)
                below = tl.sum(tl.reshape(below, (row.shape[0], BKB // RED, RED)), axis=2)
            pos, neg = _scales(w, row, h, column, A)
            acc += pos * above + neg * below
    return acc


@triton.jit
def tile_begin(w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """Windows of a tile, and scales of its groups."""
    SUB: tl.constexpr = A[2]
    kb = kb0 + tl.arange(0, BKB)
    windows = load_windows(w[0], row, kb, A[0], A[1], KB, EVEN)
    scales = ()
    for h in tl.static_range(SUB):
        scales = scales + (_scales(w, row, h, tl.minimum(kb // A[3], A[6] - 1), A),)  # type: ignore[assignment]
    return windows, scales


@triton.jit
def tile_decode(w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr):
    """Weights INDEX of all blocks of a tile."""
    windows, scales = state
    if A[2] == 0:
        kb = kb0 + tl.arange(0, BKB)
        pos, neg = _scales(w, row, 0, tl.minimum((kb * 32 + INDEX) // A[3], A[4] - 1), A)
    else:
        pos, neg = scales[INDEX * A[2] // 32]
    level = _level(w, windows, INDEX, A)
    return tl.where(level > 0, pos, neg) * level


plugin = FpAsymKernel()
