"""Triton prologue of products of integers: rows of x are rounded as `qexport.inputs` says, bit for bit.

    _encode  a program a row: factors and permutation of the input, the row's range, then codes int8 [planes, m, KX]
    _sums    int32 [planes, m, groups], sums of the codes of each group of the weight, where the weight has zeros

KX is k filled up to whole tiles of the product with codes that are 0. Two planes are the low and the high eight bits of
`sdr`. Divisions are IEEE's; on a GPU torch multiplies by 1 / steps where it divides by a number, so a scale found there
by the reference may differ in its last bit from the one found here and on the processor.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.kernels._gemm import Launch
from qexport.schema import Tensors

BLOCK = 8192  # columns that a step covers, in the registers of 256 threads
_SUMMED = 4096  # codes that a step of `_sums` covers
_KINDS = ("token", "tensor", "sdr", "outliers")
_RAZOR = 32767  # largest of sdr's 16-bit integers


def supports(quant: Any) -> str | None:
    """Why an input can't be rounded by `_encode`, or None."""
    if quant.name not in _KINDS:
        return f"inputs rounded by {quant.name!r}; {', '.join(_KINDS)} are rounded"
    if quant.name == "sdr" and quant.group_size > BLOCK:
        return f"groups of {quant.group_size} of the input; up to {BLOCK} are rounded"
    return None


def planes_of(quant: Any) -> int:
    """Int8 matrices that the codes take."""
    return 2 if quant.name == "sdr" else 1


def has_zero(quant: Any) -> bool:
    """Whether 0 is coded as something else."""
    return not getattr(quant, "symmetric", True)


def launches(
    quant: Any, x: Tensor, packed: Tensors, mask: Tensor | None, width: int, *, permute: bool, scale: bool, groups: int,
    size: int,
) -> tuple[list[Launch], Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launches that round x, and what they fill.

    Args:
        quant: the quantizer.
        x: [m, k].
        packed: stored tensors of the linear.
        mask: int8 [k], 1 for stored columns that stay floats, or None.
        width: KX.
        permute: apply `input_perm`.
        scale: apply `input_scale`.
        groups: groups whose sums are wanted; 0: no sums.
        size: columns of such a group.

    Returns:
        Launches, codes int8 [planes, m, KX], scales float32 [m], zeros int32 [m] or None, sums int32 [planes, m,
        groups] or None.
    """
    m, k = x.shape
    planes, razor = planes_of(quant), quant.name == "sdr"
    codes = x.new_empty((planes, m, width), dtype=torch.int8)
    scales = x.new_empty((m,), dtype=torch.float32)
    zeros = x.new_empty((m,), dtype=torch.int32) if has_zero(quant) else None
    segment = quant.group_size if razor else min(BLOCK, triton.next_power_of_2(width))
    padded = triton.next_power_of_2(segment)
    rows = max(1, min(BLOCK, triton.next_power_of_2(width)) // padded)
    args = (
        x, packed["input_perm"] if permute else None, packed["input_scale"] if scale else None, mask,
        packed.get("input_quant_scale"), packed.get("input_quant_zero"), codes, scales, zeros, m, k,
    )  # fmt: skip
    constants = {
        "KX": width, "BITS": quant.bits, "RAZOR": razor, "SEGMENT": segment, "PADDED": padded, "ROWS": rows,
        "STEPS": triton.cdiv(width, segment * rows),
    }  # fmt: skip
    threads = min(256, max(64, rows * padded // 16))
    out = [Launch(_encode, (m,), args, constants, _warps(threads))]
    if not groups:
        return out, codes, scales, zeros, None
    sums = x.new_empty((planes, m, groups), dtype=torch.int32)
    part = min(_SUMMED, triton.next_power_of_2(size))
    several = min(_SUMMED // part, triton.next_power_of_2(groups))
    constants = {"KX": width, "GROUPS": groups, "SIZE": size, "PART": part, "SEVERAL": several}
    grid = (m, triton.cdiv(groups, several), planes)
    out.append(Launch(_sums, grid, (codes, sums, m), constants, _warps(128)))
    return out, codes, scales, zeros, sums


def _warps(threads: int) -> int:
    return max(1, threads // (64 if torch.version.hip else 32))


@triton.jit
def _round(x):
    """Half to even, for |x| up to 2^22; what is larger stays larger than that. No compiler may fold this without leave
    to reorder sums, which Triton does not give."""  # noqa: D209
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _columns(step, SEGMENT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KX: tl.constexpr):
    """Columns of a step, [ROWS, PADDED]; KX for those that only fill up."""
    i = tl.arange(0, PADDED)[None, :]
    k = (step * ROWS + tl.arange(0, ROWS))[:, None] * SEGMENT + i
    return tl.where(i < SEGMENT, k, KX) if SEGMENT < PADDED else k


@triton.jit
def _values(x_ptr, perm_ptr, scale_ptr, mask_ptr, m, k, K):
    """Columns k of row m as floats; 0 past the end and where a column is multiplied as a float."""
    live = k < K
    source = k
    if perm_ptr is not None:
        source = tl.load(perm_ptr + k, mask=live, other=0).to(tl.int32)
    x = tl.load(x_ptr + m * K + source, mask=live, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + source, mask=live, other=0.0)
    if mask_ptr is not None:
        x = tl.where(tl.load(mask_ptr + k, mask=live, other=0) != 0, 0.0, x)
    return x


@triton.jit
def _razored(whole, BITS: tl.constexpr):
    """Integers cut to the bits that lead their group, a group a row; int32."""
    largest = tl.max(tl.abs(whole), axis=1).to(tl.int32, bitcast=True)
    length = tl.where(largest > 0, (largest >> 23) - 126, 0)
    flag = tl.maximum(length - (BITS - 1), 0)
    down = ((127 - flag) << 23).to(tl.float32, bitcast=True)[:, None]
    TOP: tl.constexpr = 1 << (BITS - 1)
    cut = tl.minimum(tl.maximum(_round(whole * down), -TOP), TOP - 1)
    return cut.to(tl.int32) << flag[:, None]


@triton.jit
def _range(
    x_ptr, perm_ptr, scale_ptr, mask_ptr, m, K, KX: tl.constexpr, BITS: tl.constexpr, RAZOR: tl.constexpr,
    SIGNED: tl.constexpr, SEGMENT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Scale and zero of row m."""
    low = tl.zeros((ROWS, PADDED), tl.float32)
    high = tl.zeros((ROWS, PADDED), tl.float32)
    for step in range(STEPS):
        x = _values(x_ptr, perm_ptr, scale_ptr, mask_ptr, m, _columns(step, SEGMENT, PADDED, ROWS, KX), K)
        if SIGNED:
            high = tl.maximum(high, tl.abs(x))
        else:
            high = tl.maximum(high, x)
            low = tl.minimum(low, x)
    largest = tl.max(tl.max(high, axis=1), axis=0)
    if SIGNED:
        smallest = 0.0
        scale = tl.div_rn(largest, 32767.0 if RAZOR else (1 << (BITS - 1)) - 1.0)
    else:
        smallest = tl.min(tl.min(low, axis=1), axis=0)
        scale = tl.div_rn(largest - smallest, (1 << BITS) - 1.0)
    scale = tl.where(scale > 0, scale, 1.0)
    zero = 0 if SIGNED else _round(tl.div_rn(-smallest, scale)).to(tl.int32) - (1 << (BITS - 1))
    return scale, zero


@triton.jit(do_not_specialize=["M"])
def _encode(
    x_ptr, perm_ptr, scale_ptr, mask_ptr, fixed_ptr, fixed_zero_ptr, codes_ptr, scales_ptr, zeros_ptr, M, K,
    KX: tl.constexpr, BITS: tl.constexpr, RAZOR: tl.constexpr, SEGMENT: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of x."""
    m = tl.program_id(0).to(tl.int64)
    SIGNED: tl.constexpr = zeros_ptr is None
    zero = 0
    if fixed_ptr is None:
        scale, zero = _range(
            x_ptr, perm_ptr, scale_ptr, mask_ptr, m, K, KX, BITS, RAZOR, SIGNED, SEGMENT, PADDED, ROWS, STEPS
        )
    else:
        scale = tl.load(fixed_ptr)
        if not SIGNED:
            zero = tl.load(fixed_zero_ptr)
    if not SIGNED:
        tl.store(zeros_ptr + m, zero)
    broken = tl.zeros((ROWS, PADDED), tl.int32)
    TOP: tl.constexpr = 32767.0 if RAZOR else (1 << (BITS - 1)) - 1.0
    BOTTOM: tl.constexpr = -TOP if SIGNED else -TOP - 1.0
    for step in range(STEPS):
        k = _columns(step, SEGMENT, PADDED, ROWS, KX)
        x = _values(x_ptr, perm_ptr, scale_ptr, mask_ptr, m, k, K)
        broken = broken | (x != x).to(tl.int32)
        x = _round(tl.div_rn(x, scale))
        if not SIGNED:
            x = x + zero
        code = tl.minimum(tl.maximum(x, BOTTOM), TOP)
        at = codes_ptr + m * KX + k
        if RAZOR:
            whole = _razored(code, BITS)
            upper = (whole + 128) >> 8
            tl.store(at + M.to(tl.int64) * KX, upper.to(tl.int8), mask=k < KX)
            tl.store(at, (whole - (upper << 8)).to(tl.int8), mask=k < KX)
        else:
            tl.store(at, tl.where(k < K, code, 0.0).to(tl.int8), mask=k < KX)
    # No code could tell of a NaN; the scale does.
    tl.store(scales_ptr + m, tl.where(tl.max(tl.max(broken, axis=1), axis=0) > 0, float("nan"), scale))


@triton.jit(do_not_specialize=["M"])
def _sums(
    codes_ptr, sums_ptr, M, KX: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    SEVERAL: tl.constexpr,
):  # fmt: skip
    """Groups SEVERAL * program_id(1) and on of row program_id(0) of plane program_id(2)."""
    row = tl.program_id(2).to(tl.int64) * M + tl.program_id(0)
    group = tl.program_id(1) * SEVERAL + tl.arange(0, SEVERAL)
    acc = tl.zeros((SEVERAL,), tl.int32)
    for first in range(0, SIZE, PART):
        i = first + tl.arange(0, PART)
        k = group[:, None] * SIZE + i[None, :]
        code = tl.load(codes_ptr + row * KX + k, mask=(i < SIZE)[None, :] & (k < KX), other=0)
        acc += tl.sum(code.to(tl.int32), axis=1)
    tl.store(sums_ptr + row * GROUPS + group, acc, mask=group < GROUPS)
