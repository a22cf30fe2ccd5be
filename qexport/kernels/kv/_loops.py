"""Loops of attention over packed keys and values on a CPU, compiled by numba.

A row is what one token has of one head. There are two ways to its numbers. Where codes of 2 or 4 bits are numbers
themselves, and nothing but scales and offsets comes after, 16 bytes at a time become floats; channels then lie in
*planes*: the first code of every byte, then the second of every byte, and so on, and what meets the row is put in this
order once. Else codes become numbers by a table, in their own order, and after scales come outliers and the rotation by
position, whatever the format has of them. Then the row meets all queries of the head. Rows are worked off in blocks
that stay in the first cache. `a` and `s` are `_stored.Arrays` and `_stored.Shape`.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from qexport.kernels.kv._codebooks import (
    can_look_up,
    look_up_2,
    look_up_3,
    look_up_4,
    look_up_pairs,
    turned_2,
    turned_3,
    turned_4,
)
from qexport.kernels.kv._vector import (
    affine_4,
    affine_16,
    channels_8,
    channels_16,
    copy_2,
    copy_4,
    dots_16,
    mix_16,
    number,
    planes_2_4,
    planes_2_8,
    planes_2_16,
    planes_4_4,
    planes_4_8,
    planes_4_16,
    rotate_8,
    rotate_16,
    share_16,
    two_groups,
)

BLOCK = 32  # tokens that are unpacked before they are multiplied
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_OPTIONS: Any = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": _FAST}
_INLINED: Any = {**_OPTIONS, "forceinline": True}  # a call with arrays costs as much as a row
_PARALLEL: Any = {**_OPTIONS, "parallel": True}


@njit(**_INLINED)
def _in_planes(
    codes: Any, at: Any, count: Any, bits: Any, flip: Any, scale: Any, offset: Any, out: Any, to: Any, step: Any
) -> None:  # fmt: skip
    """Numbers of `count` bytes, a multiple of 4; their first codes go to `to` and on, the next `step` further on."""
    j = 0
    if bits == 4:
        while j + 16 <= count:
            planes_4_16(codes, at + j, flip, scale, offset, out, to + j, step)
            j += 16
        while j + 8 <= count:
            planes_4_8(codes, at + j, flip, scale, offset, out, to + j, step)
            j += 8
        if j < count:
            planes_4_4(codes, at + j, flip, scale, offset, out, to + j, step)
    else:
        while j + 16 <= count:
            planes_2_16(codes, at + j, flip, scale, offset, out, to + j, step)
            j += 16
        while j + 8 <= count:
            planes_2_8(codes, at + j, flip, scale, offset, out, to + j, step)
            j += 8
        if j < count:
            planes_2_4(codes, at + j, flip, scale, offset, out, to + j, step)


@njit(**_INLINED)
def _of_group(a: Any, s: Any, b: Any, t: Any, head: Any, g: Any, groups: Any) -> Any:
    """Scale and offset of a group of a token's channels."""
    own = (b * s.rows + t) * s.pitch + head * s.per_head
    if s.flag == 0:
        return number(a.scales, own + g), number(a.offsets, own + g)
    bit = (head * groups + g) * s.flag
    at = (b * s.room + t) * s.flag_row + (bit >> 3)
    wide = np.int64(a.flags[at])
    if (bit & 7) + s.flag > 8:
        wide |= np.int64(a.flags[at + 1]) << 8
    power = (wide >> (bit & 7)) & ((1 << s.flag) - 1)
    scale = number(a.scales, own) * np.float32(1 << power)
    return scale, scale * a.offsets[0]


@njit(**_INLINED)
def _plane_rows(a: Any, s: Any, b: Any, head: Any, t: Any, count: Any, flat: Any, dim: Any) -> None:
    """Rows of the tokens [t, t + count) in planes; scales of channels are left out."""
    units, groups, size, flip = dim // s.unit, -(-dim // s.group), s.group // s.unit, np.int32(s.flip)
    for i in range(count):
        start, to = (b * s.room + t + i) * s.row + head * units, i * dim
        if s.by_channel:
            _in_planes(a.codes, start, units, s.bits, flip, np.float32(1), np.float32(0), flat, to, units)
        else:
            pairs = groups // 2 if s.bits == 4 and size == 8 and units % 16 == 0 else 0
            for g in range(0, 2 * pairs, 2):
                one, two = _of_group(a, s, b, t + i, head, g, groups), _of_group(a, s, b, t + i, head, g + 1, groups)
                lines = (one[0], two[0]), (one[1], two[1])
                two_groups(a.codes, start + 8 * g, flip, lines[0], lines[1], flat, to + 8 * g, units)
            for g in range(2 * pairs, groups):
                own = min(size, units - g * size)
                scale, offset = _of_group(a, s, b, t + i, head, g, groups)
                _in_planes(a.codes, start + g * size, own, s.bits, flip, scale, offset, flat, to + g * size, units)


@njit(**_INLINED)
def _look_up(codes: Any, at: Any, bits: Any, table: Any, out: Any, to: Any, dim: Any) -> None:
    """As `_expand`, 16 channels at a time, by a table of single codes."""
    done = 0
    while bits == 4 and done + 32 <= dim:
        look_up_pairs(codes, at + done // 2, table, out, to + done)
        done += 32
    for j in range(done // 16, dim // 16):
        if bits == 4:
            look_up_4(codes, at + 8 * j, table, out, to + 16 * j)
        elif bits == 3:
            look_up_3(codes, at + 6 * j, table, out, to + 16 * j)
        else:
            look_up_2(codes, at + 4 * j, table, out, to + 16 * j)


@njit(**_INLINED)
def _no_look_up(codes: Any, at: Any, bits: Any, table: Any, out: Any, to: Any, dim: Any) -> None:
    """Where the processor has no such instruction, `WIDE` is 0 and nobody asks."""


WIDE = 16 if can_look_up() else 0
"""Codes that are looked up by one instruction, and the `span` that says so; 0: none."""
_looked_up = _look_up if WIDE else _no_look_up


@njit(**_INLINED)
def _expand(codes: Any, start: Any, first: Any, bits: Any, span: Any, table: Any, out: Any, to: Any, dim: Any) -> None:
    """out[to : to + dim] = what codes [first, first + dim) of the row at byte `start` stand for."""
    if span == 16:
        _looked_up(codes, start + first * bits // 8, bits, table, out, to, dim)
    elif span == 2 and bits == 4:
        at = start + first // 2
        for j in range(dim // 2):
            copy_2(table, 2 * np.int64(codes[at + j]), out, to + 2 * j)
    elif span == 4:
        at = start + first // 4
        for j in range(dim // 4):
            copy_4(table, 4 * np.int64(codes[at + j]), out, to + 4 * j)
    elif span == 2:  # 8 codes of 3 bits in 3 bytes
        at = start + first // 8 * 3
        for j in range(dim // 8):
            three = np.int64(codes[at]) | (np.int64(codes[at + 1]) << 8) | (np.int64(codes[at + 2]) << 16)
            for i in range(4):
                copy_2(table, 2 * ((three >> (6 * i)) & 63), out, to + 8 * j + 2 * i)
            at += 3
    else:
        for c in range(dim):
            bit = (first + c) * bits
            byte = start + (bit >> 3)
            wide = np.int64(codes[byte])
            if (bit & 7) + bits > 8:
                wide |= np.int64(codes[byte + 1]) << 8
            out[to + c] = table[(wide >> (bit & 7)) & ((1 << bits) - 1)]


@njit(**_INLINED)
def _affine(out: Any, to: Any, count: Any, scale: Any, offset: Any) -> None:
    """out[to : to + count] = itself * scale + offset."""
    j = to
    while j + 16 <= to + count:
        affine_16(out, j, scale, offset)
        j += 16
    while j + 4 <= to + count:
        affine_4(out, j, scale, offset)
        j += 4
    while j < to + count:
        out[j] = out[j] * scale + offset
        j += 1


@njit(**_INLINED)
def _scale_channels(out: Any, to: Any, dim: Any, scales: Any, offsets: Any, at: Any) -> None:
    """out[to : to + dim] = itself * scales + offsets, those of its channels."""
    c = 0
    while c + 16 <= dim:
        channels_16(out, to + c, scales, offsets, at + c)
        c += 16
    while c + 8 <= dim:
        channels_8(out, to + c, scales, offsets, at + c)
        c += 8
    while c < dim:
        out[to + c] = out[to + c] * number(scales, at + c) + number(offsets, at + c)
        c += 1


@njit(**_INLINED)
def _rotate(out: Any, to: Any, cos: Any, sin: Any, at: Any, half: Any, neighbours: Any) -> None:
    """Turn a row by the token's position."""
    c = 0
    while not neighbours and c + 16 <= half:
        rotate_16(out, to + c, half, cos, sin, at + c)
        c += 16
    while not neighbours and c + 8 <= half:
        rotate_8(out, to + c, half, cos, sin, at + c)
        c += 8
    while c < half:
        one, two = (to + 2 * c, to + 2 * c + 1) if neighbours else (to + c, to + half + c)
        a, b = out[one], out[two]
        out[one] = a * cos[at + c] - b * sin[at + c]
        out[two] = b * cos[at + c] + a * sin[at + c]
        c += 1


@njit(**_INLINED)
def _turned_rows(a: Any, s: Any, b: Any, head: Any, t: Any, count: Any, flat: Any, dim: Any) -> None:
    """Rows of a codebook with scales of channels, rotated: all at once, 16 channels and those that turn with them."""
    line = (b * s.rows + t // s.group) * s.pitch + head * s.per_head
    for c in range(0, s.rope, 16):
        at, angle = (b * s.room + t) * s.row + ((head * dim + c) * s.bits >> 3), t * s.rope + c
        own = line + c
        if s.bits == 4:
            turned_4(
                a.codes, at, s.row, a.table, a.scales, a.offsets, own, a.cos, a.sin, angle, s.rope, flat, c, dim, count
            )
        elif s.bits == 3:
            turned_3(
                a.codes, at, s.row, a.table, a.scales, a.offsets, own, a.cos, a.sin, angle, s.rope, flat, c, dim, count
            )
        else:
            turned_2(
                a.codes, at, s.row, a.table, a.scales, a.offsets, own, a.cos, a.sin, angle, s.rope, flat, c, dim, count
            )


@njit(**_INLINED)
def _no_turned_rows(a: Any, s: Any, b: Any, head: Any, t: Any, count: Any, flat: Any, dim: Any) -> None:
    """Where the processor has no such instruction nobody asks."""


_all_at_once = _turned_rows if WIDE else _no_turned_rows


@njit(**_OPTIONS)
def _block(a: Any, s: Any, b: Any, head: Any, t: Any, count: Any, folded: Any, rows: Any) -> None:
    """Rows of the tokens [t, t + count) of a head of a sequence, without outliers, and without scales if folded."""
    dim, flat = rows.shape[1], rows.reshape(-1)
    if s.unit:
        _plane_rows(a, s, b, head, t, count, flat, dim)
        return
    if s.span == 16 and s.by_channel and 2 * s.rope == dim and s.rope % 16 == 0 and not s.neighbours:
        _all_at_once(a, s, b, head, t, count, flat, dim)
        return
    groups = -(-dim // s.group)
    for i in range(count):
        token = b * s.room + t + i
        _expand(a.codes, token * s.row, head * dim, s.bits, s.span, a.table, flat, i * dim, dim)
        if not s.by_channel and not folded:
            for g in range(groups):
                size = min(s.group, dim - g * s.group)
                scale, offset = _of_group(a, s, b, t + i, head, g, groups)
                _affine(flat, i * dim + g * s.group, size, scale, offset)
    if s.by_channel and not folded:
        at = (b * s.rows + t // s.group) * s.pitch + head * s.per_head
        for i in range(count):
            _scale_channels(flat, i * dim, dim, a.scales, a.offsets, at)
    for i in range(count if s.rope else 0):
        _rotate(flat, i * dim, a.cos, a.sin, (t + i) * s.rope, s.rope, s.neighbours)


@njit(**_OPTIONS)
def _fold(q: Any, scales: Any, offsets: Any, order: Any, at: Any, own: Any, folded: Any, bias: Any) -> None:
    """Scales of channels times the queries of a head, and the queries' products with the offsets; `own` is scratch."""
    for c in range(q.shape[1]):
        own[0, c], own[1, c] = number(scales, at + order[c]), number(offsets, at + order[c])
    for r in range(q.shape[0]):
        shift = np.float32(0)
        for c in range(q.shape[1]):
            folded[r, c] = q[r, c] * own[0, c]
            shift += q[r, c] * own[1, c]
        bias[r] = shift


@njit(**_OPTIONS)
def _dots(rows: Any, count: Any, q: Any, bias: Any, out: Any, at: Any, step: Any) -> None:
    """out[at + r * step + t] = rows[t] . q[r] + bias[r] for the first `count` rows."""
    dim = q.shape[1]
    flat, other = rows.reshape(-1), q.reshape(-1)
    for r in range(q.shape[0]):
        to = at + r * step
        t = 0
        while dim % 16 == 0 and t + 16 <= count:
            dots_16(flat, t * dim, dim, other, r * dim, bias[r], out, to + t)
            t += 16
        while t + 4 <= count:
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(dim):
                x = q[r, c]
                s0 += x * rows[t, c]
                s1 += x * rows[t + 1, c]
                s2 += x * rows[t + 2, c]
                s3 += x * rows[t + 3, c]
            out[to + t], out[to + t + 1] = s0 + bias[r], s1 + bias[r]
            out[to + t + 2], out[to + t + 3] = s2 + bias[r], s3 + bias[r]
            t += 4
        while t < count:
            s0 = np.float32(0)
            for c in range(dim):
                s0 += q[r, c] * rows[t, c]
            out[to + t] = s0 + bias[r]
            t += 1


@njit(**_OPTIONS)
def _mix(rows: Any, count: Any, p: Any, at: Any, step: Any, out: Any) -> None:
    """out[r] += sum over the first `count` rows of p[at + r * step + t] * rows[t]."""
    dim = out.shape[1]
    flat, sums = rows.reshape(-1), out.reshape(-1)
    for r in range(out.shape[0]):
        own = at + r * step
        t = 0
        while dim % 16 == 0 and t + 16 <= count:
            mix_16(flat, t * dim, dim, p, own + t, sums, r * dim)
            t += 16
        while t < count:
            p0 = p[own + t]
            for c in range(dim):
                out[r, c] += p0 * rows[t, c]
            t += 1


@njit(**_OPTIONS)
def _share(a: Any, s: Any, b: Any, head: Any, t: Any, count: Any, p: Any, at: Any, shares: Any, shift: Any) -> None:
    """Scales of tokens times their weights p in place of the weights, and what their offsets add to all channels."""
    i = 0
    while s.pitch == 1 and s.flag == 0 and i + 16 <= count:
        for r in range(shift.size):
            line = b * s.rows + t + i
            shift[r] += share_16(a.scales, a.offsets, line, p, at + r * s.total + t + i, shares, r * BLOCK + i)
        i += 16
    while i < count:
        scale, offset = _of_group(a, s, b, t + i, head, 0, 1)
        for r in range(shift.size):
            weight = p[at + r * s.total + t + i]
            shares[r * BLOCK + i] = weight * scale
            shift[r] += weight * offset
        i += 1


@njit(**_OPTIONS)
def _value_slots(a: Any, s: Any, b: Any, t: Any, count: Any, p: Any, out: Any) -> None:
    """out[head, r] += outliers of the tokens [t, t + count) times their weights p."""
    heads, queries, dim = out.shape
    flat, inverse = out.reshape(-1), (1 << 32) // dim + 1  # exact for channels below 2^16
    for i in range(count):
        at = (b * s.room + t + i) * s.slots
        for j in range(at, at + s.slots):
            value, channel = number(a.slot_values, j), np.int64(a.slot_channels[j])
            head = (channel * inverse) >> 32
            to = np.uint64(channel + head * (queries - 1) * dim)
            own = np.uint64((b * heads + head) * queries * s.total + s.lead - s.first + t + i)
            for r in range(queries):
                flat[to + np.uint64(r * dim)] += p[own + np.uint64(r * s.total)] * value


@njit(**_OPTIONS)
def _key_slots(a: Any, s: Any, b: Any, t: Any, count: Any, q: Any, out: Any) -> None:
    """Scores += products of queries q [heads, queries, dim] with the outliers of the tokens [t, t + count)."""
    heads, queries, dim = q.shape
    flat, inverse = q.reshape(-1), (1 << 32) // dim + 1
    for i in range(count):
        at = (b * s.room + t + i) * s.slots
        for j in range(at, at + s.slots):
            value, channel = number(a.slot_values, j), np.int64(a.slot_channels[j])
            head = (channel * inverse) >> 32
            c = channel - head * dim
            # What a number becomes in its own channel and in the one that turns with it.
            other, here, there = c, value, np.float32(0)
            if c < 2 * s.rope:
                second = (c & 1) if s.neighbours else np.int64(c >= s.rope)
                pair = c >> 1 if s.neighbours else c - second * s.rope
                other = c + (1 if s.neighbours else s.rope) * (1 - 2 * second)
                turn = (t + i) * s.rope + pair
                here, there = value * a.cos[turn], value * a.sin[turn] * np.float32(1 - 2 * second)
            own = head * queries * dim
            to = (b * heads + head) * queries * s.total + s.lead - s.first + t + i
            for r in range(queries):
                row = own + r * dim
                out[np.uint64(to + r * s.total)] += (
                    flat[np.uint64(row + c)] * here + flat[np.uint64(row + other)] * there
                )


@njit(**_OPTIONS)
def _keys(item: Any, q: Any, a: Any, s: Any, splits: Any, out: Any) -> None:
    """Scores of part `item` of all parts and sequences; heads take turns, so that rotations are read once for all."""
    heads, queries, dim = q.shape[1:]
    b, part = item // splits, item % splits
    rows, times, bias = np.empty((BLOCK, dim), np.float32), q[b].copy(), np.zeros((heads, queries), np.float32)
    scratch = np.empty((2, dim), np.float32)
    folded = s.by_channel and not s.rope
    t = s.first + part * s.split
    last, known = min(t + s.split, s.stop), -1
    while t < last:
        count = min(BLOCK, last - t)
        if s.by_channel:
            group = t // s.group
            count = min(count, (group + 1) * s.group - t)
            for head in range(heads if folded and group != known else 0):
                at = (b * s.rows + group) * s.pitch + head * s.per_head
                _fold(q[b, head], a.scales, a.offsets, a.order, at, scratch, times[head], bias[head])
            known = group
        for head in range(heads):
            _block(a, s, b, head, t, count, folded, rows)
            to = (b * heads + head) * queries * s.total + s.lead - s.first + t
            _dots(rows, count, times[head], bias[head], out, to, s.total)
        if s.slots:
            _key_slots(a, s, b, t, count, q[b], out)
        t += count


@njit(**_OPTIONS)
def _values(item: Any, splits: Any, p: Any, a: Any, s: Any, out: Any) -> None:
    """Sums of part `item` of all parts and sequences."""
    heads, queries, dim = out.shape[1], out.shape[3], out.shape[4]
    b, part = item // splits, item % splits
    rows, total = np.empty((BLOCK, dim), np.float32), np.zeros((heads, queries, dim), np.float32)
    t = s.first + part * s.split
    last = min(t + s.split, s.stop)
    folded = not s.by_channel and s.group >= dim and not s.unit and not s.rope
    shares, shift = np.empty(queries * BLOCK, np.float32), np.zeros((heads, queries), np.float32)
    while t < last:
        count = min(BLOCK, last - t)
        for head in range(heads):
            at = (b * heads + head) * queries * s.total + s.lead - s.first
            _block(a, s, b, head, t, count, folded, rows)
            if folded:
                _share(a, s, b, head, t, count, p, at, shares, shift[head])
                _mix(rows, count, shares, 0, BLOCK, total[head])
            else:
                _mix(rows, count, p, at + t, s.total, total[head])
        if s.slots:
            _value_slots(a, s, b, t, count, p, total)
        t += count
    for head in range(heads):
        for r in range(queries):
            for c in range(dim):
                out[b, head, part, r, c] = total[head, r, c] + shift[head, r]


@njit(**_OPTIONS)
def keys(q: Any, a: Any, s: Any, splits: Any, out: Any) -> None:
    """Products of queries with packed keys.

    Args:
        q: float32 [b, heads, queries, dim], channels in the order of rows.
        a: `Arrays`.
        s: `Shape`.
        splits: parts that the tokens are cut into.
        out: float32, flat [b, heads, queries, total]; columns from `lead` on are filled.
    """
    for item in range(q.shape[0] * splits):
        _keys(item, q, a, s, splits, out)


@njit(**_PARALLEL)
def keys_by_all(q: Any, a: Any, s: Any, splits: Any, out: Any) -> None:
    """As `keys`, by several threads."""
    for item in prange(q.shape[0] * splits):
        _keys(item, q, a, s, splits, out)


@njit(**_OPTIONS)
def values(p: Any, a: Any, s: Any, out: Any) -> None:
    """Sums of packed values, weighted by p.

    Args:
        p: float32, flat [b, heads, queries, total]; columns from `lead` on are read.
        a: `Arrays`.
        s: `Shape`.
        out: float32 [b, heads, parts, queries, dim], channels in the order of rows.
    """
    for item in range(out.shape[0] * out.shape[2]):
        _values(item, out.shape[2], p, a, s, out)


@njit(**_PARALLEL)
def values_by_all(p: Any, a: Any, s: Any, out: Any) -> None:
    """As `values`, by several threads."""
    for item in prange(out.shape[0] * out.shape[2]):
        _values(item, out.shape[2], p, a, s, out)
