"""Kernels that are wrong on purpose: each takes a real plugin and spoils one thing, for a gate to catch."""

from dataclasses import replace

import triton
import triton.language as tl

from qexport.kernels import uniform


class Spoiled:
    """A plugin with one part replaced."""

    def __init__(self, kernel, repack=None, launches=None, **parts) -> None:
        self.kernel = kernel
        self.change = repack or (lambda weights: weights)
        self.launches = launches or (lambda found: found)
        self.parts = parts

    def repack(self, fmt, packed, n, k):
        return self.change(self.kernel.repack(fmt, packed, n, k))

    def decoder(self, fmt, n, k):
        return replace(self.kernel.decoder(fmt, n, k), **self.parts)


@triton.jit
def _dot_wrong_sums(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """As `uniform.tile_dot`, but sums of x come from the wrong blocks."""
    return uniform.tile_dot(w, x_ptr, s_ptr + 1, row, n0, kb0, KB, KBP, BKB, EVEN, A)


@triton.jit
def _decode_wrong_code(
    w, state, row, n0, kb0, INDEX: tl.constexpr, KB: tl.constexpr, BKB: tl.constexpr, A: tl.constexpr
):
    """As `uniform.tile_decode`, but code 31 of a block is read as code 30."""
    READ: tl.constexpr = 30 if INDEX == 31 else INDEX
    return uniform.tile_decode(w, state, row, n0, kb0, READ, KB, BKB, A)


@triton.jit
def _dot_wrong_rows(
    w, x_ptr, s_ptr, row, n0, kb0, KB: tl.constexpr, KBP: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """As `uniform.tile_dot`, but rows past the end are read from memory that is not the matrix's."""
    beyond = (n0 + tl.arange(0, row.shape[0])).to(tl.int64)
    return uniform.tile_dot(w, x_ptr, s_ptr, beyond, n0, kb0, KB, KBP, BKB, EVEN, A)


def wrong_sums(kernel):
    return Spoiled(kernel, dot=_dot_wrong_sums)


def wrong_code(kernel):
    return Spoiled(kernel, decode=_decode_wrong_code)


def wrong_rows(kernel):
    return Spoiled(kernel, dot=_dot_wrong_rows)


def short_grid(kernel):
    """One program of the product is not launched."""

    def shorten(launches):
        product = launches[1]
        return [launches[0], replace(product, grid=(product.grid[0] - 1, *product.grid[1:])), *launches[2:]]

    return Spoiled(kernel, launches=shorten)


def fat_layout(kernel):
    """Scales as float32: right results, too many bytes."""

    def widen(weights):
        scales = weights[1].float()
        return weights[0], scales, *weights[2:]

    return Spoiled(kernel, repack=widen)
