"""Triton kernel of the `uniform` format: 1 to 8 bits, symmetric or not, any group size and any k.

Layout that the kernel reads (`repack`), per-group arrays as `_affine` says:
    words   int32 [n, bits, KB]            see `_stream`
    scales  float16 or bfloat16
    zeros   uint8, 1, 2 or 4 codes a byte  left out when symmetric
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qexport.formats._bits import unpack_bits
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


class UniformKernel:
    """See the module's text."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return too_old() if 1 <= fmt.bits <= 8 else f"codes of {fmt.bits} bits; 1 to 8 are read"

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """See the module's text."""
        groups = Groups.of(fmt.group_size, k)
        words, scales = split_words(packed["qweight"], fmt.bits), groups.columns(packed["scales"], k)
        if fmt.symmetric:
            return words, scales
        return words, scales, slots(groups.columns(unpack_bits(packed["qzeros"], fmt.bits, n).T, k), fmt.bits)

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The functions below with their constants."""
        groups = Groups.of(fmt.group_size, k)
        return affine(groups, fmt.bits, (int(fmt.symmetric),), dot=tile_dot, begin=tile_begin, decode=tile_decode)


@triton.jit
def _parameters(w, row, n0, sub: tl.constexpr, column, by, A: tl.constexpr):
    first = row_of(row, sub, A)
    scale = tl.load(w[1] + first[:, None] * A[6] + column[None, :]).to(tl.float32)
    # Not an early return: what follows one is compiled too, and there is no w[2] when symmetric.
    if A[7]:  # noqa: SIM108
        zero = tl.full(scale.shape, 1 << (A[0] - 1), tl.float32)
    else:
        zero = load_slot(w[2], first, column, A[6], A[0])
    return scale, zero * by


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


plugin = UniformKernel()
