"""Attention over packed keys and values by Triton: one skeleton, formats bring the functions of a tile.

    _packed  whole tiles of tokens that are packed on both sides (`_tiles`): nearly all of a long cache
    _part    the rest, tokens in full precision among them, wherever they lie (`_numbers`)
    _join    parts of a head in order (never atomics: the result is deterministic)

A tile's keys become numbers in registers, each read once for all queries of their head, as do the values, with online
softmax from tile to tile, in powers of 2. Keys that were coded before their rotation are decoded in halves, which are
rotated together; `_part` decodes them twice, the second time with the channels that they are rotated with. Products are
in the queries' type, sums in float32. What `_tiles` can't cut (`_cuts`) is left to `_part`, which takes several times
as many instructions a number.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.kernels._gemm import Launch, too_old
from qexport.kernels.kv.base import Past, Rows, Turn, reader

TILE = 32  # tokens of a step
NARROW = 16  # where a number costs more registers: codebooks, outliers, rotations
THREADS = (256, 512)  # of a program of `_part` for heads of up to 64 channels, and for larger ones with few registers
_WHOLE = 64  # tokens of a step of `_packed` where numbers and products cost few registers, NARROW elsewhere
_PROGRAMS = 396  # that fill a large GPU, three on each of 132 processors
_LARGEST = 128  # channels of a head
_WARP = 64 if torch.version.hip else 32


def supports(name: str, dim: int) -> str | None:
    """Why the kernel can't read heads of so many channels in this format, or None."""
    if dim > _LARGEST:
        return f"heads of {dim} channels; up to {_LARGEST} fit registers"
    return reader(name).obstacle() or too_old()


def attend(q: Tensor, keys: Past, values: Past, *, scaling: float) -> Tensor:
    """See `_cpu.attend`; on a GPU, or on the CPU under Triton's interpreter. The result is in the queries' type."""
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current device
        found, y = launches(q, keys, values, scaling=scaling)
        for launch in found:
            launch.run()
    return y


def _ceil(a: int, b: int) -> int:
    """As `triton.cdiv`, which is made for kernels too and takes 2 us a call."""
    return -(-a // b)


def _padded(size: int) -> int:
    """The next power of 2 that a product takes; see `_ceil`."""
    return max(16, 1 << (size - 1).bit_length())


def rows_of(past: Past) -> Rows:
    """What is stored of a side, with the functions that read it."""
    return reader(past.format).rows(past, past.before.shape[1], past.before.shape[3])


def _cuts(rows: Rows, turn: Turn | None) -> bool:
    """Whether `_tiles` can cut a side: whole words of a head or of what is rotated, powers of 2 for all that it has."""
    bits, dim, shared = rows.args[0], rows.args[3], rows.args[4]
    once = dim
    if turn is not None:
        once = turn.cos.shape[-1]
        if turn.neighbours or 2 * once != dim:
            return False
    powers = all(size & (size - 1) == 0 for size in (dim, shared))
    return powers and once >= 16 and bits in (2, 3, 4, 6, 8) and once * bits % 32 == 0


@dataclass(frozen=True)
class _Plan:
    """Tokens of `_packed`: `count` from number `first` on, in steps of `tile`; parts of it and of the rest."""

    first: int
    count: int
    tile: int
    per: int
    parts: int
    rest_per: int
    rest_parts: int

    @property
    def all_parts(self) -> int:
        return self.parts + self.rest_parts


def _plan(sides: tuple[Rows, Rows], keys: Past, values: Past, narrow: bool) -> _Plan:
    programs = max(_PROGRAMS // (keys.before.shape[0] * keys.before.shape[1]), 1)
    tile, first, count = NARROW if narrow else _WHOLE, 0, 0
    if _cuts(sides[0], keys.turn) and _cuts(sides[1], None):
        first = max(past.before.shape[2] for past in (keys, values))
        stop = min(past.before.shape[2] + past.stop - past.first for past in (keys, values))
        own = first - keys.before.shape[2] + keys.first  # number of the first key among the packed ones
        first += -own % min(tile, keys.coder.group)
        count = max(stop - first, 0) // tile * tile
    steps = count // tile
    per = _ceil(steps, programs)
    rest, step = keys.tokens - count, NARROW if reader(keys.format).narrow else TILE
    rest_per = _ceil(_ceil(rest, max(min(programs, _ceil(rest, 2 * TILE)), 1)), step) * step
    parts = _ceil(steps, per) if steps else 0
    return _Plan(first, count, tile, per * tile, parts, rest_per, _ceil(rest, rest_per) if rest else 0)


def launches(q: Tensor, keys: Past, values: Past, *, scaling: float) -> tuple[list[Launch], Tensor]:
    """The launches that fill y [b, heads of queries, dim], in order, and y. Meta tensors will do: nothing runs here."""
    batch, heads, wide = q.shape[0], keys.before.shape[1], values.before.shape[3]
    own, queries = batch * heads, q.shape[1] // heads
    sides = (rows_of(keys), rows_of(values))
    turn = keys.turn
    turns = (None, None) if turn is None else (turn.cos.contiguous(), turn.sin.contiguous())
    # The interpreter multiplies bfloat16 operands wrongly.
    exact = q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and q.device.type == "cpu")
    plan = _plan(sides, keys, values, exact or reader(keys.format).narrow)
    y = q.new_empty(batch, q.shape[1], wide)
    sums = q.new_empty((own, plan.all_parts, queries, wide), dtype=torch.float32)
    most = q.new_empty((own, plan.all_parts, queries, 2), dtype=torch.float32)
    constants = {
        "HEADS": heads, "QUERIES": queries, "QP": _padded(queries), "KA": sides[0].args,
        "VA": sides[1].args, "HALF": 0 if turn is None else turn.cos.shape[-1], "EXACT": exact,
    }  # fmt: skip
    shared = (q.contiguous(), sides[0].tensors, sides[1].tensors, *turns, sums, most, scaling * log2(e))
    out = []
    if plan.parts:
        out.append(_launch_packed(own, plan, sides, keys, values, shared, constants))
    if plan.rest_parts:
        out.append(_launch_part(own, plan, sides, keys, values, shared, constants))
    bd = _padded(wide)
    ends = {"QUERIES": queries, "D": wide, "BD": bd, "BP": 2048 // bd}
    out.append(Launch(_join, (own, queries), (sums, most, y, plan.all_parts), ends, 128 // _WARP))
    return out, y


def _launch_packed(
    own: int, plan: _Plan, sides: tuple[Rows, Rows], keys: Past, values: Past, shared: Any, constants: dict[str, Any]
) -> Launch:
    at = []
    for past in (keys, values):
        _, _, first, room, _, slots = _sizes(past)
        at += [plan.first - past.before.shape[2] + first, room, slots]
    mine = {"BT": plan.tile, "KEYS": sides[0].tile, "VALUES": sides[1].tile, "STAGES": 1 if plan.tile == NARROW else 2}
    args = (*shared, *at, plan.count, plan.per, plan.all_parts)
    large, threads = max(sides[0].args[3], sides[1].args[3]) > 64, 128
    if shared[0].dtype != torch.float16:  # numbers are float32, and products of float32 take registers
        threads = 256 if large else 128
    elif plan.tile > NARROW:
        threads = 128 if large else 64
    return Launch(_packed, (own, plan.parts), args, {**constants, **mine}, threads // _WARP)


def _launch_part(
    own: int, plan: _Plan, sides: tuple[Rows, Rows], keys: Past, values: Past, shared: Any, constants: dict[str, Any]
) -> Launch:
    dim, wide, turn = keys.before.shape[3], values.before.shape[3], keys.turn
    dense = [t.contiguous() for past in (keys, values) for t in (past.before, past.after)]
    sizes = [number for past in (keys, values) for number in _sizes(past)]
    mine = {
        "BT": NARROW if reader(keys.format).narrow or (constants["EXACT"] and dim > 64) else TILE, "BK": _padded(dim),
        "BV": _padded(wide), "KEYS": sides[0].numbers, "VALUES": sides[1].numbers,
        "BESIDE": turn is not None and turn.neighbours,
    }  # fmt: skip
    q, kw, vw, cos, sin, *rest = shared
    args = (
        q, kw, vw, *dense, cos, sin, *rest, *sizes, keys.tokens - plan.count, plan.rest_per,
        plan.first, plan.count, plan.parts, plan.all_parts,
    )  # fmt: skip
    threads = THREADS[max(dim, wide) > 64 and mine["BT"] > NARROW]
    return Launch(_part, (own, plan.rest_parts), args, {**constants, **mine}, threads // _WARP)


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
    "tokens",
    "per",
    "hole",
    "skip",
    "first_part",
    "parts",
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


@triton.jit(do_not_specialize=_VARYING)
def _part(
    q_ptr, kw, vw, k_before, k_after, v_before, v_after, cos_ptr, sin_ptr, sum_ptr, most_ptr, scaling,
    k_lead, k_count, k_first, k_room, k_tail, k_slots, v_lead, v_count, v_first, v_room, v_tail, v_slots, tokens, per,
    hole, skip, first_part, parts,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, QP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr, BESIDE: tl.constexpr,
    EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
):  # fmt: skip
    """Sums of values of one part, not divided yet, and for each query the largest score and the sum of powers.

    Its tokens are some of `tokens`; from number `hole` on they are `skip` further.
    """
    own = tl.program_id(0)
    b, h = own // HEADS, own % HEADS
    part = own.to(tl.int64) * parts + first_part + tl.program_id(1)
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
        number = t0 + tl.arange(0, BT)
        live, t = number < tokens, tl.where(number < hole, number, number + skip)
        k = _rows(
            kw, k_before, k_after, cos_ptr, sin_ptr, b, h, t, ck, k_lead, k_count, k_first, k_room, k_tail, k_slots,
            HEADS, KEYS, KA, HALF, BESIDE, KA[3],
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scaling
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        powers, fade = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
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


@triton.jit(do_not_specialize=["k_first", "k_room", "k_slots", "v_first", "v_room", "v_slots", "count", "per", "parts"])
def _packed(
    q_ptr, kw, vw, cos_ptr, sin_ptr, sum_ptr, most_ptr, scaling, k_first, k_room, k_slots, v_first, v_room, v_slots,
    count, per, parts,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, QP: tl.constexpr, BT: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `_part`, of whole tiles of tokens that are packed on both sides."""
    DK: tl.constexpr = KA[3]
    DV: tl.constexpr = VA[3]
    T: tl.constexpr = tl.float16 if (q_ptr.dtype.element_ty == tl.float16 and not EXACT) else tl.float32
    own = tl.program_id(0)
    b, h = own // HEADS, own % HEADS
    WIDE: tl.constexpr = HALF if HALF > 0 else DK  # channels that are read at once
    r, ck, cv = tl.arange(0, QP), tl.arange(0, WIDE), tl.arange(0, DV)
    kept = (r < QUERIES)[:, None]
    asked = q_ptr + ((own * QUERIES + r)[:, None] * DK + ck[None, :])
    q = tl.load(asked, mask=kept, other=0.0)
    q = q.to(tl.float32) if EXACT else q
    if HALF > 0:
        q2 = tl.load(asked + HALF, mask=kept, other=0.0)
        q2 = q2.to(tl.float32) if EXACT else q2
    most = tl.full((QP,), float("-inf"), tl.float32)
    total = tl.zeros((QP,), tl.float32)
    acc = tl.zeros((QP, DV), tl.float32)
    start = tl.program_id(1) * per
    for t0 in tl.range(start, tl.minimum(start + per, count), BT, num_stages=STAGES):
        k = KEYS(kw, b, h, k_first + t0, BT, 0, WIDE, k_room, k_slots, KA, T)
        if HALF > 0:
            k2 = KEYS(kw, b, h, k_first + t0, BT, HALF, WIDE, k_room, k_slots, KA, T)
            at = (k_first + t0 + tl.arange(0, BT))[:, None] * HALF + ck[None, :]
            cos, sin = tl.load(cos_ptr + at), tl.load(sin_ptr + at)
            k, k2 = k * cos - k2 * sin, k2 * cos + k * sin
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if HALF > 0:
            scores = tl.dot(q2, tl.trans(k2.to(q.dtype)), scores, input_precision="ieee")
        scores *= scaling
        higher = tl.maximum(most, tl.max(scores, axis=1))
        powers, fade = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
        v = VALUES(vw, b, h, v_first + t0, BT, 0, DV, v_room, v_slots, VA, T)
        acc = tl.dot(powers.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(powers, axis=1)
        most = higher
    at = (own.to(tl.int64) * parts + tl.program_id(1)) * QUERIES + r
    tl.store(sum_ptr + at[:, None] * DV + cv[None, :], acc, mask=kept)
    tl.store(most_ptr + at * 2, most, mask=r < QUERIES)
    tl.store(most_ptr + at * 2 + 1, total, mask=r < QUERIES)


@triton.jit(do_not_specialize=["parts"])
def _join(sum_ptr, most_ptr, y_ptr, parts, QUERIES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr):
    """Y of one query from its parts, BP at a time and in order."""
    own, r, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    most, total, acc = float("-inf"), 0.0, tl.zeros((BD,), tl.float32)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        live, at = part < parts, (own * parts + part) * QUERIES + r
        here = tl.load(most_ptr + at * 2, mask=live, other=float("-inf"))
        sums = tl.load(sum_ptr + at[:, None] * D + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        higher = tl.maximum(most, tl.max(here, axis=0))
        fade, gain = tl.exp2(most - higher), tl.exp2(here - higher)
        acc = acc * fade + tl.sum(sums * gain[:, None], axis=0)
        total = total * fade + tl.sum(tl.load(most_ptr + at * 2 + 1, mask=live, other=0.0) * gain, axis=0)
        most = higher
    tl.store(y_ptr + (own * QUERIES + r) * D + c, (acc / total).to(y_ptr.dtype.element_ty), mask=c < D)
