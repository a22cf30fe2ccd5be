"""Reading the bit stream that codes are stored in, 32 codes at a time, from inside a kernel.

A row's stream is cut into blocks of 32 codes, `BITS` words each. The kernels' own layout puts word j of all blocks of a
row side by side, int32 [n, BITS, KB] with KB = ceil(k / 32): a thread then reads word j of four neighbouring blocks
with one 128-bit load, and every code is at a place that is known at compile time.

Read as a float32, a code that is left in its place below bit 23 is a subnormal number, exactly code * 2^(place - 149).
Multiplying it by x * 2^(EXPONENT - place) costs a mask and an FMA a weight: no shift, no conversion. Codes that reach
above bit 23 are first shifted down by 16, all of a word at once and with what they have in the next word (`place_of`).
With `EXPONENT` = 90 neither factor nor product leaves float32's range while |x| is below 2^37, and terms below 2^-67
are the smallest in full precision. The sum is scaled back once a row; sums of x are made as small. Hardware FMA takes
subnormal inputs at full rate; a compile-time gate checks that no compiler flushes them.

Where codes are converted one by one, they are cut from *windows*, each of which holds the next `CW` of them.
"""

import triton
import triton.language as tl
from torch import Tensor

WINDOW = (0, 16, 8, 7, 4, 4, 3, 3, 2)  # codes per window by width
EXPONENT = 90  # planes of x hold x * 2^(EXPONENT - place)


def split_words(qweight: Tensor, bits: int) -> Tensor:
    """Stored stream int32 [n, KB * bits] to the kernels' layout int32 [n, bits, KB]."""
    n, words = qweight.shape
    return qweight.reshape(n, words // bits, bits).transpose(1, 2).contiguous()


@triton.jit
def load_words(q_ptr, row, kb, BITS: tl.constexpr, KB: tl.constexpr, EVEN: tl.constexpr):
    """All words of blocks `kb` of rows `row`: a tuple of uint32 [rows, blocks]; zero past the end of a row."""
    at = q_ptr + row[:, None] * (BITS * KB) + kb[None, :]
    words = ()
    for j in tl.static_range(BITS):
        if EVEN:
            word = tl.load(at + j * KB, eviction_policy="evict_first")
        else:
            word = tl.load(at + j * KB, mask=kb[None, :] < KB, other=0, eviction_policy="evict_first")
        words = words + (word.to(tl.uint32, bitcast=True),)  # type: ignore[assignment]
    return words


@triton.jit
def load_windows(q_ptr, row, kb, BITS: tl.constexpr, CW: tl.constexpr, KB: tl.constexpr, EVEN: tl.constexpr):
    """All windows of blocks `kb` of rows `row`: a tuple of uint32 [rows, blocks]; zero past the end of a row."""
    return windows_of(load_words(q_ptr, row, kb, BITS, KB, EVEN), BITS, CW)


@triton.jit
def windows_of(words, BITS: tl.constexpr, CW: tl.constexpr):
    """All windows of blocks whose words are given."""
    windows = ()
    for v in tl.static_range((32 + CW - 1) // CW):
        windows = windows + (cut(words, v, BITS, CW),)  # type: ignore[assignment]
    return windows


@triton.jit
def cut(words, V: tl.constexpr, BITS: tl.constexpr, CW: tl.constexpr):
    """Window V of the block whose words are given."""
    J: tl.constexpr = V * CW * BITS // 32
    BIT: tl.constexpr = V * CW * BITS % 32
    COUNT: tl.constexpr = CW if (V + 1) * CW <= 32 else 32 - V * CW
    window = words[J]
    if BIT > 0:
        window = window >> BIT
        if BIT + COUNT * BITS > 32:
            window = window | (words[J + 1] << (32 - BIT))
    return window


@triton.jit
def code(windows, INDEX: tl.constexpr, BITS: tl.constexpr, CW: tl.constexpr):
    """Code INDEX of every block, float32."""
    return ((windows[INDEX // CW] >> (INDEX % CW * BITS)) & ((1 << BITS) - 1)).to(tl.int32).to(tl.float32)


@triton.constexpr_function
def place_of(i: int, bits: int) -> int:
    """Where `in_place` masks code i: where it lies in its word, or 16 below that if it would reach above bit 23."""
    place = i * bits % 32
    return place if place + bits <= 23 else place - 16


@triton.jit
def in_place(words, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Code INDEX of every block, float32: times 2^(its place - 149)."""
    PLACE: tl.constexpr = place_of(INDEX, BITS)
    J: tl.constexpr = INDEX * BITS // 32
    word = words[J]
    if PLACE != INDEX * BITS % 32:
        word = word >> 16
        if (J + 1) * 32 % BITS > 0:
            word = word | (words[J + 1] << 16)
    return (word & (((1 << BITS) - 1) << PLACE)).to(tl.float32, bitcast=True)


@triton.jit
def dot_codes(words, x_ptr, start, LO: tl.constexpr, HI: tl.constexpr, KBP: tl.constexpr, BITS: tl.constexpr):
    """Start, plus the sum of code * x over codes LO to HI of every block, float32 [rows, blocks].

    `x_ptr` [blocks] points into plane 0. Planes hold x * 2^(EXPONENT - place), see the module's text; `start` and what
    is returned are too small by 2^(149 - EXPONENT).
    """
    part = start
    for i in tl.static_range(LO, HI):
        part = tl.fma(in_place(words, i, BITS), tl.load(x_ptr + i * KBP)[None, :], part)
    return part
