"""The product of `_int_gemm`: int8 codes of x and of w to y.

    int_product   a tile of y, its groups one after the other
    _add          a tile of codes of w times those of x; of two codes a byte the low ones, then the high ones
    _rescaled     a group's sums, or those of a pair of groups, added to the floats

Sums of the low and the high plane of x are `a` and `a2`; `b` and `b2` are those of a pair's second group. What a layout
does not need stays 0 and is not compiled.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def int_product(
    x_ptr, factor_ptr, shift_ptr, sums_ptr, w_ptr, scale_ptr, zero_ptr, term_ptr, extra_ptr, y_ptr, M, N,
    KX: tl.constexpr, KW: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
    TILE: tl.constexpr, NIBBLES: tl.constexpr, PAIR: tl.constexpr, LONG: tl.constexpr, TWO: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of x times BN rows of w, which are the first factor."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row, own = tl.minimum(n, N - 1), tl.minimum(m, M - 1)  # rows past the end are the last one again, not stored
    w = w_ptr + row.to(tl.int64)[:, None] * KW
    x = x_ptr + own.to(tl.int64)[None, :] * KX
    live = (m < M)[None, :]  # nothing is read for rows that only fill up a tile
    x2 = x + M.to(tl.int64) * KX
    total = tl.zeros((BN, BM), tl.float32)
    none = tl.zeros((BN, BM), tl.int32)
    JOINED: tl.constexpr = 2 if PAIR else 1
    if LONG:
        for p in range(PARTS // JOINED):
            a, a2, b, b2 = none, none, none, none
            for s0 in tl.range(0, tl.minimum(STEPS, KX // TILE - p * STEPS), UNROLL, num_stages=STAGES):
                for u in tl.static_range(UNROLL):
                    a, a2, b, b2 = _add(a, a2, b, b2, w, x, x2, live, p, s0 + u, SIZE, STEPS, TILE, NIBBLES, PAIR, TWO)
            total = _rescaled(
                total, a, a2, b, b2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, p, row, own, M, N, PARTS,
                NIBBLES, PAIR, TWO,
            )  # fmt: skip
    else:
        for p0 in tl.range(0, PARTS // JOINED, UNROLL, num_stages=STAGES):
            for u in tl.static_range(UNROLL):
                a, a2, b, b2 = none, none, none, none
                for s in tl.static_range(STEPS):
                    a, a2, b, b2 = _add(a, a2, b, b2, w, x, x2, live, p0 + u, s, SIZE, STEPS, TILE, NIBBLES, PAIR, TWO)
                total = _rescaled(
                    total, a, a2, b, b2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, p0 + u, row, own, M, N,
                    PARTS, NIBBLES, PAIR, TWO,
                )  # fmt: skip
    y = total * tl.load(factor_ptr + own)[None, :]
    mask = live & (n < N)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if extra_ptr is not None:
        y += tl.load(extra_ptr + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add(
    a, a2, b, b2, w, x, x2, live, p, s, SIZE: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
    NIBBLES: tl.constexpr, PAIR: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Step s of part p, or of the two parts p, added to the sums of products with the low and the high plane."""
    BYTES: tl.constexpr = TILE // 2 if NIBBLES else TILE
    SPAN: tl.constexpr = SIZE if PAIR else BYTES  # columns from the low nibble of a byte to the high one
    byte = (p * STEPS + s) * BYTES + tl.arange(0, BYTES)
    k = (p * (2 * SIZE) + s * BYTES if PAIR else (p * STEPS + s) * TILE) + tl.arange(0, BYTES)[:, None]
    codes = tl.load(w + byte[None, :], eviction_policy="evict_first")
    if not NIBBLES:
        a = tl.dot(codes, tl.load(x + k, mask=live, other=0), a, out_dtype=tl.int32)
        if TWO:
            a2 = tl.dot(codes, tl.load(x2 + k, mask=live, other=0), a2, out_dtype=tl.int32)
    else:
        low, high = codes << 4, codes & -16  # 16 times the code, which costs one instruction, not two
        a = tl.dot(low, tl.load(x + k, mask=live, other=0), a, out_dtype=tl.int32)
        if TWO:
            a2 = tl.dot(low, tl.load(x2 + k, mask=live, other=0), a2, out_dtype=tl.int32)
        if PAIR:
            b = tl.dot(high, tl.load(x + SPAN + k, mask=live, other=0), b, out_dtype=tl.int32)
            if TWO:
                b2 = tl.dot(high, tl.load(x2 + SPAN + k, mask=live, other=0), b2, out_dtype=tl.int32)
        else:
            a = tl.dot(high, tl.load(x + SPAN + k, mask=live, other=0), a, out_dtype=tl.int32)
            if TWO:
                a2 = tl.dot(high, tl.load(x2 + SPAN + k, mask=live, other=0), a2, out_dtype=tl.int32)
    return a, a2, b, b2


@triton.jit
def _rescaled(
    total, a, a2, b, b2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, p, row, own, M, N, PARTS: tl.constexpr,
    NIBBLES: tl.constexpr, PAIR: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Total plus part p, or both parts p in order."""
    if PAIR:
        total = _one(
            total, a, a2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, 2 * p, row, own, M, N, PARTS, NIBBLES, TWO
        )
        p = 2 * p + 1
        a, a2 = b, b2
    return _one(
        total, a, a2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, p, row, own, M, N, PARTS, NIBBLES, TWO
    )


@triton.jit
def _one(
    total, a, a2, shift_ptr, sums_ptr, scale_ptr, zero_ptr, term_ptr, p, row, own, M, N, PARTS: tl.constexpr,
    NIBBLES: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Total plus part p: its exact sums, corrected for zeros, times its scale."""
    at = p * N + row
    if NIBBLES:
        a, a2 = a >> 4, a2 >> 4
    if shift_ptr is not None:
        a -= tl.load(term_ptr + at).to(tl.int32)[:, None] * tl.load(shift_ptr + own)[None, :]
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + at).to(tl.int32)[:, None]
        a -= zero * tl.load(sums_ptr + own * PARTS + p)[None, :]
        if TWO:
            a2 -= zero * tl.load(sums_ptr + (M + own) * PARTS + p)[None, :]
    part = a.to(tl.float32)
    if TWO:
        part += a2.to(tl.float32) * 256.0
    return total + part * tl.load(scale_ptr + at).to(tl.float32)[:, None]
