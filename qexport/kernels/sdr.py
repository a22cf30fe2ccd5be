"""Triton kernel of the `sdr` format: signed codes shifted by a flag of their group, one scale a row.

Layout that the kernel reads (`repack`), per-group arrays as `_affine` says:
    words   int32 [n, bits, KB]            see `_stream`; codes are signed + 2^(bits - 1), whatever their stored coding
    flags   uint8, 1, 2 or 4 codes a byte
    scales  float32 [n]
A group's scale is the row's times 2^flag, made by adding to the exponent.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qexport.formats._bits import pack_bits
from qexport.kernels._affine import (
    Groups,
    affine,
    affine_begin,
    affine_decode,
    affine_dot,
    load_slot,
    row_of,
    slots,
)
from qexport.kernels._gemm import Decoder, too_old
from qexport.kernels._stream import split_words
from qexport.schema import Tensors


class SdrKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return too_old()

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        fields, groups = fmt.unpack(packed, n, k), Groups.of(fmt.group_size, k)
        raised = fmt.signed(fields["codes"]).add_(2 ** (fmt.bits - 1)).byte()
        flags = slots(groups.columns(fields["flags"].byte(), k), max(fmt.flag_bits, 1))
        return split_words(pack_bits(raised, fmt.bits), fmt.bits), flags, packed["scales"]

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants."""
        extra = (max(fmt.flag_bits, 1),)
        groups = Groups.of(fmt.group_size, k)
        return affine(groups, fmt.bits, extra, dot=tile_dot, begin=tile_begin, decode=tile_decode)


@triton.jit
def _parameters(w, row, n0, sub: tl.constexpr, column, by, A: tl.constexpr):
    flag = load_slot(w[1], row_of(row, sub, A), column, A[6], A[7]).to(tl.int32)
    scale = tl.load(w[2] + row)[:, None] * ((flag + 127) << 23).to(tl.float32, bitcast=True)
    return scale, tl.full(scale.shape, 1 << (A[0] - 1), tl.float32) * by


@triton.jit
def tile_dot(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """See `_affine`."""
    return affine_dot(w, x_ptr, s_ptr, row, n0, kb0, KB, KBP, BKB, EVEN, A, _parameters)


@triton.jit
def tile_begin(w, row, n0, kb0, KB: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr):
    """See `_affine`."""
    return affine_begin(w, row, n0, kb0, KB, BKB, EVEN, A, _parameters)


@triton.jit
def tile_decode(w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr):
    """See `_affine`."""
    return affine_decode(w, state, row, n0, kb0, INDEX, KB, BKB, A, _parameters)


plugin = SdrKernel()
