"""Attention over packed keys and values by Triton: one skeleton, formats bring the function of a tile (`_numbers`).

    _part   one part of the tokens of one head of keys: all its queries, online softmax over tiles of tokens
    _join   parts of a head in order (never atomics: the result is deterministic)

A tile's keys become numbers in registers, each read once for all queries of their head, as do the values. Tokens in
full precision, before and after the packed ones, are read as they are. Keys that were coded before their rotation are
decoded twice, the second time with the channels that they are rotated with. Products are in the queries' type, sums in
float32. Speed is static, never timed: it was judged from compiled code, not on a GPU.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.kernels._gemm import Launch, too_old
from qexport.kernels.kv import _numbers
from qexport.kernels.kv.read import READERS, Past

TILE = 32  # tokens of a step
NARROW = 16  # where a number costs more registers: codebooks, outliers, rotations
THREADS = (256, 512)  # of a program for heads of up to 64 channels, and for larger ones
_PROGRAMS = 384  # that fill a large GPU
_LARGEST = 128  # channels of a head


@dataclass(frozen=True)
class Rows:
    """A side as `_part` takes it: the format's function, its tensors, and its constants (see `_numbers`)."""

    numbers: Any
    tensors: tuple[Tensor, ...]
    args: tuple[int, ...]


def supports(name: str, dim: int) -> str | None:
    """Why the kernel can't read heads of so many channels in this format, or None."""
    if name not in READERS:
        return f"no kernel reads format {name!r}"
    if name == "nuq" and torch.version.hip:
        return "codebooks and outliers do not fit the registers of AMD GPUs"
    most = _LARGEST // 2 if name == "nuq" else _LARGEST
    return too_old() if dim <= most else f"heads of {dim} channels; up to {most} fit registers"


def attend(q: Tensor, keys: Past, values: Past, *, scaling: float) -> Tensor:
    """See `cpu.attend`; on a GPU, or on the CPU under Triton's interpreter. The result is in the queries' type."""
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current device
        found, y = launches(q, keys, values, scaling=scaling)
        for launch in found:
            launch.run()
    return y


def rows_of(past: Past) -> Rows:
    """What is stored of a side, with the function that reads it."""
    coder, packed, heads, dim = past.coder, past.packed, past.before.shape[1], past.before.shape[3]
    base = (coder.bits, packed["codes"].shape[-1], heads, dim)
    if past.format == "kivi":
        tensors = (packed["codes"], packed["scales"], packed["offsets"])
        if coder.fifo:
            return Rows(_numbers.kivi_values, tensors, (*base, min(coder.channels, dim), 0, 0))
        return Rows(_numbers.kivi_keys, tensors, (*base, coder.group, 0, 0))
    if past.format == "sdr":
        flags = 256 * (8 - coder.bits).bit_length() + packed["flags"].shape[-1]
        tensors = (packed["codes"], packed["flags"], packed["scales"])
        return Rows(_numbers.sdr, tensors, (*base, min(coder.channels, dim), 0, flags))
    numbers = READERS[past.format](past, heads, dim)
    outliers = tuple(packed[name] for name in ("outlier_values", "outlier_channels") if name in packed)
    args = (*base, dim, int(bool(outliers)), 0)
    if coder.calibrated:
        scales, offsets = (t.contiguous() for t in (numbers.scales, numbers.offsets))
        return Rows(_numbers.nuq_channels, (packed["codes"], numbers.values, scales, offsets, *outliers), args)
    own = (packed["scales"], packed["offsets"])
    return Rows(_numbers.nuq_tokens, (packed["codes"], numbers.values, *own, *outliers), args)


def launches(q: Tensor, keys: Past, values: Past, *, scaling: float) -> tuple[list[Launch], Tensor]:
    """The launches that fill y [b, heads of queries, dim], in order, and y. Meta tensors will do: nothing runs here."""
    batch, heads, dim = q.shape[0], keys.before.shape[1], q.shape[2]
    queries, wide = q.shape[1] // heads, values.before.shape[3]
    tokens, tile = keys.tokens, NARROW if keys.format == "nuq" else TILE
    split = max(1, min(_PROGRAMS // (batch * heads), triton.cdiv(tokens, 4 * TILE)))
    per = triton.cdiv(triton.cdiv(tokens, split), tile) * tile
    split = triton.cdiv(tokens, per)
    padded = max(16, triton.next_power_of_2(queries))
    y = q.new_empty(batch, q.shape[1], wide)
    sums = q.new_empty((batch * heads, split, queries, wide), dtype=torch.float32)
    most = q.new_empty((batch * heads, split, queries, 2), dtype=torch.float32)
    sides, turn = [rows_of(past) for past in (keys, values)], keys.turn
    cos, sin = (None, None) if turn is None else (turn.cos.contiguous(), turn.sin.contiguous())
    dense = [t.contiguous() for past in (keys, values) for t in (past.before, past.after)]
    sizes = [number for past in (keys, values) for number in _sizes(past)]
    # The interpreter multiplies bfloat16 operands wrongly.
    exact = q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and q.device.type == "cpu")
    part = Launch(
        _part, (batch * heads, split),
        (
            q.contiguous(), sides[0].tensors, sides[1].tensors, *dense, cos, sin, sums, most, scaling, *sizes,
            tokens, per,
        ),
        {
            "HEADS": heads, "QUERIES": queries, "QP": padded, "BT": tile, "BK": max(16, triton.next_power_of_2(dim)),
            "BV": max(16, triton.next_power_of_2(wide)), "KEYS": sides[0].numbers, "VALUES": sides[1].numbers,
            "HALF": 0 if turn is None else turn.cos.shape[-1], "BESIDE": turn is not None and turn.neighbours,
            "EXACT": exact, "KA": sides[0].args, "VA": sides[1].args,
        }, THREADS[max(dim, wide) > 64] // (64 if torch.version.hip else 32),
    )  # fmt: skip
    bd = max(16, triton.next_power_of_2(wide))
    join = Launch(_join, (batch * heads, queries), (sums, most, y, split), {"QUERIES": queries, "D": wide, "BD": bd}, 1)
    return [part, join], y


def _sizes(past: Past) -> tuple[int, ...]:
    """Tokens before the packed ones, packed ones that are seen, the first of these, room, tokens behind, outliers."""
    codes = past.packed["codes"]
    slots = past.packed["outlier_values"].shape[-1] if "outlier_values" in past.packed else 0
    room = codes.shape[1] * codes.shape[2]
    return past.before.shape[2], past.stop - past.first, past.first, room, past.after.shape[2], slots


_VARYING = [
    "k_lead",
    "k_count",
    "k_first",
    "k_room",
    "k_tail",
    "k_slots",
    "v_lead",
    "v_count",
    "v_first",
    "v_room",
    "v_tail",
    "v_slots",
]


@triton.jit
def _dense(ptr, head, t, c, count, D: tl.constexpr):
    """Rows t [BT] of tokens in full precision, 0 beyond their `count`."""
    live = ((t >= 0) & (t < count))[:, None] & (c < D)[None, :]
    at = (head * count + t)[:, None].to(tl.int64) * D + c[None, :]
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _turned(
    w, cos_ptr, sin_ptr, b, head, p, c, room, slots, NUMBERS: tl.constexpr, A: tl.constexpr, HALF: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """Numbers rotated by the positions of their tokens."""
    if BESIDE:
        pair, second, other = c // 2, c % 2 == 1, c ^ 1
    else:
        pair, second = c % HALF, c >= HALF
        other = tl.where(second, c - HALF, c + HALF)
    turns = c < 2 * HALF
    at = p[:, None] * HALF + tl.where(turns, pair, 0)[None, :]
    out = NUMBERS(w, b, head, p, tl.where(turns, other, c), room, slots, A, False)
    out *= tl.load(sin_ptr + at) * tl.where(turns, tl.where(second, 1.0, -1.0), 0.0)[None, :]
    own = NUMBERS(w, b, head, p, c, room, slots, A, True)
    return out + own * tl.where(turns[None, :], tl.load(cos_ptr + at), 1.0)


@triton.jit
def _rows(
    w, before_ptr, after_ptr, cos_ptr, sin_ptr, b, h, t, c, lead, count, first, room, tail, slots, HEADS: tl.constexpr,
    NUMBERS: tl.constexpr, A: tl.constexpr, HALF: tl.constexpr, BESIDE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows of tokens t [BT], wherever they lie: float32 [BT, BD]."""
    out = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    low, high = tl.min(t, axis=0), tl.max(t, axis=0)
    if (low < lead + count) & (high >= lead):
        p = t - lead + first
        live = ((t >= lead) & (t < lead + count))[:, None] & (c < D)[None, :]
        p = tl.minimum(tl.maximum(p, first), first + count - 1)
        inside = c if c.shape[0] == D else tl.minimum(c, D - 1)
        if HALF > 0:
            found = _turned(w, cos_ptr, sin_ptr, b, h, p, inside, room, slots, NUMBERS, A, HALF, BESIDE)
        else:
            found = NUMBERS(w, b, h, p, inside, room, slots, A, True)
        out = tl.where(live, found, 0.0)
    if low < lead:
        out += _dense(before_ptr, b * HEADS + h, t, c, lead, D)
    if high >= lead + count:
        out += _dense(after_ptr, b * HEADS + h, t - lead - count, c, tail, D)
    return out


@triton.jit(do_not_specialize=[*_VARYING, "tokens", "per"])
def _part(
    q_ptr, kw, vw, k_before, k_after, v_before, v_after, cos_ptr, sin_ptr, sum_ptr, most_ptr, scaling,
    k_lead, k_count, k_first, k_room, k_tail, k_slots, v_lead, v_count, v_first, v_room, v_tail, v_slots, tokens, per,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, QP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr, BESIDE: tl.constexpr,
    EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
):  # fmt: skip
    """Sums of values of one part, not divided yet, and for each query the largest score and the sum of powers."""
    own = tl.program_id(0)
    b, h = own // HEADS, own % HEADS
    part = own.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    r, ck, cv = tl.arange(0, QP), tl.arange(0, BK), tl.arange(0, BV)
    kept = r < QUERIES
    asked = kept[:, None] & (ck < KA[3])[None, :]
    q = tl.load(q_ptr + (own * QUERIES + r)[:, None] * KA[3] + ck[None, :], mask=asked, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    most = tl.full((QP,), float("-inf"), tl.float32)
    total = tl.zeros((QP,), tl.float32)
    acc = tl.zeros((QP, BV), tl.float32)
    start = tl.program_id(1) * per
    for t0 in range(start, tl.minimum(start + per, tokens), BT):
        t = t0 + tl.arange(0, BT)
        k = _rows(
            kw, k_before, k_after, cos_ptr, sin_ptr, b, h, t, ck, k_lead, k_count, k_first, k_room, k_tail, k_slots,
            HEADS, KEYS, KA, HALF, BESIDE, KA[3],
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scaling
        scores = tl.where((t < tokens)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        powers, fade = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
        v = _rows(
            vw, v_before, v_after, cos_ptr, sin_ptr, b, h, t, cv, v_lead, v_count, v_first, v_room, v_tail, v_slots,
            HEADS, VALUES, VA, 0, False, VA[3],
        )  # fmt: skip
        acc = tl.dot(powers.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(powers, axis=1)
        most = higher
    at = part * QUERIES + r
    tl.store(sum_ptr + at[:, None] * VA[3] + cv[None, :], acc, mask=kept[:, None] & (cv < VA[3])[None, :])
    tl.store(most_ptr + at * 2, most, mask=kept)
    tl.store(most_ptr + at * 2 + 1, total, mask=kept)


@triton.jit(do_not_specialize=["split"])
def _join(sum_ptr, most_ptr, y_ptr, split, QUERIES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Y of one query from its parts in order."""
    own, r, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    most, total, acc = float("-inf"), 0.0, tl.zeros((BD,), tl.float32)
    for part in range(split):
        at = (own * split + part) * QUERIES + r
        here = tl.load(most_ptr + at * 2)
        higher = tl.maximum(most, here)
        fade, gain = tl.exp(most - higher), tl.exp(here - higher)
        acc = acc * fade + tl.load(sum_ptr + at * D + c, mask=c < D, other=0.0) * gain
        total = total * fade + tl.load(most_ptr + at * 2 + 1) * gain
        most = higher
    tl.store(y_ptr + (own * QUERIES + r) * D + c, (acc / total).to(y_ptr.dtype.element_ty), mask=c < D)
