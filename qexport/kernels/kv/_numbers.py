"""Functions of the cache formats for `decode`: the numbers of a tile of tokens and channels, float32 [BT, BD].

Each takes what is stored as it is stored (`w`), the sequence `b`, the `head`, packed tokens `p` int32 [BT] and channels
`c` int32 [BD], all of which there are (whoever asks for more than there is repeats the last), the `room` of a sequence
in tokens, the `slots` of a token for outliers (no constant, so that their loop stays one), and constants `A`:

    A[0]  bits of a code             A[4]  channels or tokens that share scales
    A[1]  words of a token's codes   A[5]  whether there are outliers
    A[2]  heads                      A[6]  what else the format needs
    A[3]  channels of a head

`STRAIGHT` says that c counts from 0, so that a word can be loaded once for all its codes.
"""

import triton
import triton.language as tl


@triton.jit
def bits_at(ptr, row, place, BITS: tl.constexpr):
    """Numbers `place` [BD] of bit-packed rows that start at words `row` [BT]: uint32 [BT, BD]."""
    at = place * BITS
    word, shift = at // 32, at % 32
    source = ptr + row[:, None] + word[None, :]
    found = tl.load(source).to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
    if 32 % BITS != 0:
        over = (shift + BITS > 32)[None, :]
        more = tl.load(source + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        found = found | tl.where(over, more << ((32 - shift) % 32)[None, :].to(tl.uint32), 0)
    return found & ((1 << BITS) - 1)


@triton.jit
def codes(ptr, b, head, p, c, room, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """Codes of a tile, uint32 [BT, BD]."""
    BITS: tl.constexpr = A[0]
    row = (b * room + p).to(tl.int64) * A[1]
    if STRAIGHT and 32 % BITS == 0 and A[3] * BITS % 32 == 0:
        PER: tl.constexpr = 32 // BITS
        word = tl.arange(0, c.shape[0] // PER)
        word = word if c.shape[0] == A[3] else tl.minimum(word, A[3] // PER - 1)
        found = tl.load(ptr + row[:, None] + (head * (A[3] // PER) + word)[None, :])
        shift = (tl.arange(0, PER) * BITS).to(tl.uint32)
        found = (found.to(tl.uint32, bitcast=True)[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
        found = tl.reshape(found, (p.shape[0], c.shape[0]))
    else:
        found = bits_at(ptr, row, head * A[3] + c, BITS)
    return found


@triton.jit
def kivi_keys(w, b, head, p, c, room, slots, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """`w`: codes, scales float16 [b, room / group, heads, dim], offsets."""
    code = codes(w[0], b, head, p, c, room, A, STRAIGHT).to(tl.int32).to(tl.float32)
    group = (b * (room // A[4]) + p // A[4]).to(tl.int64) * (A[2] * A[3])
    at = group[:, None] + (head * A[3] + c)[None, :]
    scale, offset = tl.load(w[1] + at), tl.load(w[2] + at)
    return code * scale.to(tl.float32) + offset.to(tl.float32)


@triton.jit
def kivi_values(w, b, head, p, c, room, slots, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """`w`: codes, scales float16 [b, room, heads, groups], offsets."""
    GROUPS: tl.constexpr = (A[3] + A[4] - 1) // A[4]
    code = codes(w[0], b, head, p, c, room, A, STRAIGHT).to(tl.int32).to(tl.float32)
    token = ((b * room + p).to(tl.int64) * A[2] + head) * GROUPS
    at = token[:, None] + (c // A[4])[None, :]
    scale, offset = tl.load(w[1] + at), tl.load(w[2] + at)
    return code * scale.to(tl.float32) + offset.to(tl.float32)


@triton.jit
def _slots(w, first: tl.constexpr, token, head, c, slots, A: tl.constexpr):
    """Outliers of a tile: values float16 [b, room, slots] and channels int16, at `w[first]` and behind it."""
    out = tl.zeros((token.shape[0], c.shape[0]), tl.float32)
    for i in range(slots):
        value = tl.load(w[first] + token * slots + i).to(tl.float32)
        channel = tl.load(w[first + 1] + token * slots + i).to(tl.int32) & 0xFFFF
        out += tl.where(channel[:, None] == (head * A[3] + c)[None, :], value[:, None], 0.0)
    return out


@triton.jit
def nuq_channels(w, b, head, p, c, room, slots, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """`w`: codes, codebook float32 [2^bits], scales float32 [heads, dim], offsets, outliers if there are any."""
    code = codes(w[0], b, head, p, c, room, A, STRAIGHT).to(tl.int32)
    scale = tl.load(w[2] + head * A[3] + c)
    offset = tl.load(w[3] + head * A[3] + c)
    out = tl.load(w[1] + code) * scale[None, :] + offset[None, :]
    if A[5] > 0:
        out += _slots(w, 4, (b * room + p).to(tl.int64), head, c, slots, A)
    return out


@triton.jit
def nuq_tokens(w, b, head, p, c, room, slots, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """`w`: codes, codebook float32 [2^bits], scales float16 [b, room], offsets, outliers if there are any."""
    code = codes(w[0], b, head, p, c, room, A, STRAIGHT).to(tl.int32)
    token = (b * room + p).to(tl.int64)
    scale = tl.load(w[2] + token).to(tl.float32)
    offset = tl.load(w[3] + token).to(tl.float32)
    out = tl.load(w[1] + code) * scale[:, None] + offset[:, None]
    if A[5] > 0:
        out += _slots(w, 4, token, head, c, slots, A)
    return out


@triton.jit
def sdr(w, b, head, p, c, room, slots, A: tl.constexpr, STRAIGHT: tl.constexpr):
    """`w`: codes, flags of A[6] // 256 bits in A[6] % 256 words a token, scales float16 [b, room, heads]."""
    HALF: tl.constexpr = 1 << (A[0] - 1)
    GROUPS: tl.constexpr = (A[3] + A[4] - 1) // A[4]
    code = codes(w[0], b, head, p, c, room, A, STRAIGHT).to(tl.int32)
    token = (b * room + p).to(tl.int64)
    flag = bits_at(w[1], token * (A[6] % 256), head * GROUPS + c // A[4], A[6] // 256).to(tl.int32)
    scale = tl.load(w[2] + token * A[2] + head).to(tl.float32)
    power = ((flag + 127) << 23).to(tl.float32, bitcast=True)
    return ((code ^ HALF) - HALF).to(tl.float32) * power * scale[:, None]
