"""Rounding of inputs and rescaling of products on a CPU, one pass each, compiled by numba.

What comes out is, bit for bit, what `qexport.inputs` and `_integers.product` define by tensor operations, of which each
would pass over memory again and take as long to start as a small product. numba is optional (`qexport[cpu]`).
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from qexport.inputs.base import Rounding
from qexport.kernels._threads import many

_SMALL = 1 << 16  # numbers that one thread works off before others would have started
_INFINITY = 0x7F800000  # bits of a float32; those of a NaN are above, without the sign


@njit(cache=True, nogil=True, error_model="numpy")
def _token_row(x: Any, bits: Any, codes: Any, top: Any) -> Any:
    """Codes of a row within +-top, and its scale; `bits` are x as int32."""
    largest = np.int32(0)
    for j in range(bits.size):
        largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))
    if largest > _INFINITY:
        codes[:] = 0
        return np.float32(np.nan)
    scale = np.array([largest], np.int32).view(np.float32)[0] / top
    if scale <= 0:
        scale = np.float32(1)
    for j in range(x.size):
        codes[j] = np.int8(min(max(np.rint(x[j] / scale), -top), top))
    return scale


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _razor_group(whole: Any, low: Any, high: Any, first: Any, size: Any, width: Any, lengths: Any) -> None:
    """Planes of the group of `size` integers that starts at `first`."""
    top = np.float32(1 << (width - 1))
    ones = np.int32(0)  # leads with the same bit as the largest
    for j in range(size):
        ones |= abs(whole[first + j])
    shift = max(np.int32(lengths[ones & np.int32(32767)]) - np.int32(width - 1), np.int32(0))
    down = np.float32(1) / np.float32(1 << shift)
    for j in range(size):
        cut = np.int32(min(max(np.rint(np.float32(whole[first + j]) * down), -top), top - np.float32(1))) << shift
        above = (cut + 128) >> 8
        low[first + j], high[first + j] = np.int8(cut - (above << 8)), np.int8(above)


@njit(cache=True, nogil=True, error_model="numpy")
def _razor_row(x: Any, scale: Any, low: Any, high: Any, group: Any, width: Any, lengths: Any) -> None:
    """Planes of a row of 16-bit integers, of which each group keeps `width` bits; `lengths` of numbers in bits."""
    largest = np.float32(32767)
    if not np.isfinite(scale):  # whatever the codes are, the result is NaN
        low[:], high[:] = 0, 0
        return
    whole = np.empty(x.size, np.int32)
    for j in range(x.size):
        whole[j] = np.int32(min(max(np.rint(x[j] / scale), -largest), largest))
    done = 0
    if group == 16:  # loops of a known length become straight code
        while done + 16 <= x.size:
            _razor_group(whole, low, high, done, 16, width, lengths)
            done += 16
    while done < x.size:
        _razor_group(whole, low, high, done, min(group, x.size - done), width, lengths)
        done += group


@njit(cache=True, nogil=True, error_model="numpy")
def _rescale_row(parts: Any, row: Any, above: Any, scales: Any, own: Any, y: Any, more: Any) -> None:
    """Sum over groups of scale * accumulator, added to y if there is `more` in it, times the row's own scale.

    `above` is the row of the high plane, or -1.
    """
    for g in range(parts.shape[0]):
        for j in range(y.size):
            value = np.float32(parts[g, row, j])
            if above >= 0:
                value = value + np.float32(parts[g, above, j]) * np.float32(256)
            value = value * scales[g, j]
            y[j] = y[j] + value if more or g > 0 else value
    for j in range(y.size):
        y[j] = y[j] * own


@njit(cache=True, nogil=True, error_model="numpy")
def _tokens(x: Any, bits: Any, codes: Any, scales: Any, top: Any) -> None:
    for i in range(x.shape[0]):
        scales[i] = _token_row(x[i], bits[i], codes[i], top)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def _tokens_by_all(x: Any, bits: Any, codes: Any, scales: Any, top: Any) -> None:
    for i in prange(x.shape[0]):
        scales[i] = _token_row(x[i], bits[i], codes[i], top)


@njit(cache=True, nogil=True, error_model="numpy")
def _razor(x: Any, scales: Any, planes: Any, group: Any, width: Any, lengths: Any) -> None:
    for i in range(x.shape[0]):
        _razor_row(x[i], scales[i], planes[i], planes[x.shape[0] + i], group, width, lengths)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def _razor_by_all(x: Any, scales: Any, planes: Any, group: Any, width: Any, lengths: Any) -> None:
    for i in prange(x.shape[0]):
        _razor_row(x[i], scales[i], planes[i], planes[x.shape[0] + i], group, width, lengths)


@njit(cache=True, nogil=True, error_model="numpy")
def _rescale(parts: Any, scales: Any, own: Any, y: Any, more: Any) -> None:
    m = y.shape[0]
    for i in range(m):
        _rescale_row(parts, i, m + i if parts.shape[1] > m else -1, scales, own[i], y[i], more)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)
def _rescale_by_all(parts: Any, scales: Any, own: Any, y: Any, more: Any) -> None:
    m = y.shape[0]
    for i in prange(m):
        _rescale_row(parts, i, m + i if parts.shape[1] > m else -1, scales, own[i], y[i], more)


class Loops(Rounding):
    """See the module's text."""

    def rounded(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """See `Rounding`."""
        x = x.contiguous()
        codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
        run = _tokens_by_all if many(x.shape[0] * x.shape[1], _SMALL, x.shape[0]) else _tokens
        given = x.numpy()
        run(given, given.view(np.int32), codes.numpy(), scales.numpy()[:, 0], np.float32(2 ** (bits - 1) - 1))
        return codes, scales

    def razored(self, x: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
        """See `Rounding`."""
        x = x.contiguous()
        planes = torch.empty(2 * x.shape[0], x.shape[1], dtype=torch.int8)
        run = _razor_by_all if many(x.shape[0] * x.shape[1], _SMALL, x.shape[0]) else _razor
        run(x.numpy(), scales.contiguous().numpy()[:, 0], planes.numpy(), min(group_size, x.shape[1]), bits, _lengths())
        return planes


BY_LOOPS = Loops()


def rescaled(parts: Tensor, scales: Tensor, own: Tensor | None, y: Tensor, *, more: bool) -> None:
    """Add accumulators, int32 [groups, m or 2 m, n], times scales [groups, n] to y, float32 [m, n].

    `own` are scales of rows, float32 [m, 1], that all is multiplied by in the end, None if this is not the end; `more`
    says whether anything is in y yet.
    """
    run = _rescale_by_all if many(y.shape[0] * parts.shape[0] * parts.shape[2], _SMALL, y.shape[0]) else _rescale
    factors = np.ones(y.shape[0], np.float32) if own is None else own.contiguous().numpy()[:, 0]
    run(parts.numpy(), scales.numpy(), factors, y.numpy(), more)


@cache
def _lengths() -> Any:
    """Bits of every number below 2^15, uint8."""
    return np.array([number.bit_length() for number in range(1 << 15)], np.uint8)
