"""Functions of the cache formats for whole tiles of packed tokens: numbers [BT, D] of a head.

Each takes what is stored as it is stored (`w`), the sequence `b`, the `head`, the first packed token `p0` of BT which
all exist, the first channel `c0` of D (constants), the `room` of a sequence in tokens, the `slots` of a token, the
constants `A` of `_numbers`, and the `dtype` of the numbers, float16 or float32. Words of codes are loaded once and
spread in registers; what numbers share is loaded once. Addresses in a tile are int32, beside one base of int64.
"""

import triton
import triton.language as tl

from qexport.kernels.kv._numbers import bits_at


@triton.jit
def _spread(units, BITS: tl.constexpr, PER: tl.constexpr):
    """Codes of units [BT, U] that hold PER each, lowest first: [BT, U * PER], with what lies above each."""
    if PER > 1:
        units = _spread(tl.interleave(units, units >> (BITS * (PER // 2))), BITS, PER // 2)
    return units


@triton.jit
def codes(ptr, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, A: tl.constexpr):
    """Codes of a tile, uint32, with what lies above each."""
    BITS: tl.constexpr = A[0]
    WORDS: tl.constexpr = A[1]
    HEAD: tl.constexpr = A[3]
    base = ptr + (b * room + p0).to(tl.int64) * WORDS
    row = tl.arange(0, BT)[:, None] * WORDS
    if 32 % BITS == 0:
        unit = (head * HEAD + c0) * BITS // 32 + tl.arange(0, D * BITS // 32)[None, :]
        found = _spread(tl.load(base + row + unit).to(tl.uint32, bitcast=True), BITS, 32 // BITS)
    else:  # 8 codes of 3 bits, or 4 of 6, in 24 bits; as bytes Triton 3.6 gets them wrong
        PER: tl.constexpr = 24 // BITS
        unit = (head * HEAD + c0) // PER + tl.arange(0, D // PER)
        found = _spread(bits_at(base, tl.arange(0, BT) * WORDS, unit, 24), BITS, PER)
    return found


@triton.jit
def _number(code, BITS: tl.constexpr, SIGNED: tl.constexpr, dtype: tl.constexpr):
    """Codes as numbers. In float16 1024 + code is code with a few bits set, which is faster than converting it."""
    HALF: tl.constexpr = SIGNED * (1 << (BITS - 1))
    code = (code & ((1 << BITS) - 1)) ^ HALF
    if dtype == tl.float16:
        number = (code | 0x6400).to(tl.uint16).to(dtype, bitcast=True) - (1024.0 + HALF)
    else:
        number = (code.to(tl.int32) - HALF).to(dtype)
    return number


@triton.jit
def _wide(x, D: tl.constexpr, SIZE: tl.constexpr):
    """Numbers [BT, D / SIZE] of groups of channels, for each channel: [BT, D]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], D // SIZE, SIZE)), (x.shape[0], D))


@triton.jit
def kivi_keys(
    w, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, slots, A: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`w`: codes, scales float16 [b, room / group, heads, dim], offsets. A tile lies in a group, or groups in it."""
    GROUP: tl.constexpr = A[4]
    HEAD: tl.constexpr = A[3]
    WIDTH: tl.constexpr = A[2] * HEAD
    SIZE: tl.constexpr = min(GROUP, BT)
    number = _number(codes(w[0], b, head, p0, BT, c0, D, room, A), A[0], 0, dtype)
    base = (b * (room // GROUP) + p0 // GROUP).to(tl.int64) * WIDTH
    at = (tl.arange(0, BT // SIZE) * WIDTH)[:, None] + (head * HEAD + c0 + tl.arange(0, D))[None, :]
    scale, offset = tl.load(w[1] + base + at).to(dtype), tl.load(w[2] + base + at).to(dtype)
    number = tl.reshape(number, (BT // SIZE, SIZE, D)) * scale[:, None, :] + offset[:, None, :]
    return tl.reshape(number, (BT, D))


@triton.jit
def kivi_values(
    w, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, slots, A: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`w`: codes, scales float16 [b, room, heads, groups], offsets."""
    SIZE: tl.constexpr = A[4]
    GROUPS: tl.constexpr = D // SIZE
    ROW: tl.constexpr = A[2] * GROUPS
    number = _number(codes(w[0], b, head, p0, BT, c0, D, room, A), A[0], 0, dtype)
    base = (b * room + p0).to(tl.int64) * ROW
    at = tl.arange(0, BT)[:, None] * ROW + (head * GROUPS + tl.arange(0, GROUPS))[None, :]
    scale, offset = tl.load(w[1] + base + at).to(dtype), tl.load(w[2] + base + at).to(dtype)
    return number * _wide(scale, D, SIZE) + _wide(offset, D, SIZE)


@triton.jit
def sdr(
    w, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, slots, A: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`w`: codes, flags of A[6] // 256 bits in A[6] % 256 words a token, scales float16 [b, room, heads]."""
    SIZE: tl.constexpr = A[4]
    BITS: tl.constexpr = A[6] // 256
    WORDS: tl.constexpr = A[6] % 256
    HEADS: tl.constexpr = A[2]
    number = _number(codes(w[0], b, head, p0, BT, c0, D, room, A), A[0], 1, dtype)
    token, row = (b * room + p0).to(tl.int64), tl.arange(0, BT)
    place = (head * (D // SIZE) + tl.arange(0, D // SIZE)) * BITS
    word, shift = place // 32, place % 32
    source = w[1] + token * WORDS + (row[:, None] * WORDS + word[None, :])
    flag = tl.load(source).to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
    if 32 % BITS != 0:  # some lie in two words
        over = (shift + BITS > 32)[None, :]
        more = tl.load(source + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        flag = flag | tl.where(over, more << ((32 - shift) % 32)[None, :].to(tl.uint32), 0)
    scale = tl.load(w[2] + token * HEADS + head + row * HEADS).to(tl.float32)
    power = (((flag & ((1 << BITS) - 1)).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return number * _wide((power * scale[:, None]).to(dtype), D, SIZE)


@triton.jit
def _slots(w, first: tl.constexpr, token, ch, slots, BT: tl.constexpr, D: tl.constexpr):
    """Outliers in channels from `ch` on: values float16 [b, room, slots] and channels int16, at `w[first]`."""
    out = tl.zeros((BT, D), tl.float32)
    place = tl.arange(0, D)
    for i in range(slots):
        at = token * slots + (tl.arange(0, BT) * slots + i)
        value = tl.load(w[first] + at).to(tl.float32)
        channel = (tl.load(w[first + 1] + at).to(tl.int32) & 0xFFFF) - ch
        out += tl.where(channel[:, None] == place[None, :], value[:, None], 0.0)
    return out


@triton.jit
def nuq_channels(
    w, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, slots, A: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`w`: codes, codebook float32 [2^bits], scales float32 [heads, dim], offsets, outliers if there are any."""
    MASK: tl.constexpr = (1 << A[0]) - 1
    code, ch = codes(w[0], b, head, p0, BT, c0, D, room, A) & MASK, head * A[3] + c0
    scale, offset = tl.load(w[2] + ch + tl.arange(0, D)), tl.load(w[3] + ch + tl.arange(0, D))
    out = tl.load(w[1] + code) * scale[None, :] + offset[None, :]
    if A[5] > 0:
        out += _slots(w, 4, (b * room + p0).to(tl.int64), ch, slots, BT, D)
    return out


@triton.jit
def nuq_tokens(
    w, b, head, p0, BT: tl.constexpr, c0: tl.constexpr, D: tl.constexpr, room, slots, A: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`w`: codes, codebook float32 [2^bits], scales float16 [b, room], offsets, outliers if there are any."""
    MASK: tl.constexpr = (1 << A[0]) - 1
    code, ch = codes(w[0], b, head, p0, BT, c0, D, room, A) & MASK, head * A[3] + c0
    token = (b * room + p0).to(tl.int64)
    scale = tl.load(w[2] + token + tl.arange(0, BT)).to(tl.float32)
    offset = tl.load(w[3] + token + tl.arange(0, BT)).to(tl.float32)
    out = tl.load(w[1] + code) * scale[:, None] + offset[:, None]
    if A[5] > 0:
        out += _slots(w, 4, token, ch, slots, BT, D)
    return out
