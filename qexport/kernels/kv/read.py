"""What formats of caches store, said in one way that kernels understand.

A number is `offset + scale * values[code]`, plus the outliers that the token has in its channel, all of it rotated by
the token's position where keys were coded before that. Scales and offsets are of channels over groups of tokens, or of
tokens over groups of channels. So a new format needs a function here and no kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qexport.schema import Tensors

_ALL = 1 << 40  # tokens of a group that never ends


@dataclass(frozen=True)
class Turn:
    """Rotations of packed tokens: cosines and sines, float32 [tokens, half], and which channels go together.

    Attributes:
        cos: of each token, the first packed one first.
        sin: like cos.
        neighbours: channels 2 i and 2 i + 1 are a pair; otherwise i and i + half.
    """

    cos: Tensor
    sin: Tensor
    neighbours: bool


@dataclass(frozen=True)
class Past:
    """Keys or values of sequences of one start that queries see.

    Attributes:
        format: name of the cache's format.
        coder: its coder of this side.
        static: what was calibrated for the layer.
        packed: stored tensors [b, room, ...], with room for more groups than there are.
        first: number of the first packed token that is seen.
        stop: how many packed tokens there are, those before `first` included.
        before: tokens in full precision before them, [b, heads, t, dim].
        after: tokens in full precision after them, like `before`.
        turn: rotations that are still to be done, or None.
        memo: what a reader made of `static` when it first saw it; belongs to the side of the cache.
    """

    format: str
    coder: Any
    static: Tensors
    packed: Tensors
    first: int
    stop: int
    before: Tensor
    after: Tensor
    turn: Turn | None = None
    memo: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All that are seen."""
        return self.before.shape[2] + self.stop - self.first + self.after.shape[2]


@dataclass(frozen=True)
class Numbers:
    """Stored numbers as a kernel reads them; `room` is that of `Past.packed`.

    Attributes:
        bits: width of a code.
        values: float32 [2^bits], what a code stands for.
        by_channel: scales and offsets are of channels, over `group` tokens a row; otherwise of `group` channels, and a
            row is a token's.
        group: see `by_channel`.
        scales: float16 or float32 [b or 1, room or 1, numbers of a row].
        offsets: like scales.
        per_head: scales of a head in a row; 0: all heads have the same one.
        flip: values are evenly spaced in the order of the codes with these bits turned over, and start at 0 (`values`
            and `offsets` say so); -1: they are whatever they are.
        slots: outliers float16 [b, room, slots] and their channels int16, or None.
        flags: uint8 [b, room, bytes], bit-packed along heads and groups: the power of 2 that multiplies a head's scale
            to that of a group, whose offset is that times the one number of `offsets`. None where there are none.
        flag_bits: width of a flag; 0: none.
    """

    bits: int
    values: Tensor
    by_channel: bool
    group: int
    scales: Tensor
    offsets: Tensor
    per_head: int
    flip: int
    slots: tuple[Tensor, Tensor] | None = None
    flags: Tensor | None = None
    flag_bits: int = 0

    @property
    def shared(self) -> bool:
        """Whether all tokens of all sequences have the scales of the first."""
        return self.group == _ALL


def _kivi(past: Past, heads: int, dim: int) -> Numbers:
    coder, values = past.coder, _plain(past.coder.bits)
    scales, offsets = past.packed["scales"].flatten(2), past.packed["offsets"].flatten(2)
    group = min(coder.channels, dim) if coder.fifo else coder.group
    return Numbers(coder.bits, values, not coder.fifo, group, scales, offsets, scales.shape[2] // heads, 0)


def _nuq(past: Past, heads: int, dim: int) -> Numbers:
    coder, packed, memo = past.coder, past.packed, codebook_of(past, heads, dim)
    slots = None
    if "outlier_values" in packed:
        slots = packed["outlier_values"].flatten(1, 2), packed["outlier_channels"].flatten(1, 2)
    if coder.calibrated:
        scales, offsets = memo["scales"], memo["offsets"]
        return Numbers(coder.bits, memo["values"], True, _ALL, scales, offsets, dim, -1, slots)
    return Numbers(coder.bits, memo["values"], False, dim, packed["scales"], packed["offsets"], 0, -1, slots)


def codebook_of(past: Past, heads: int, dim: int) -> dict[str, Tensor]:
    """What a layer's codes stand for, and where they are calibrated the ranges of its channels; made once."""
    coder, memo = past.coder, past.memo
    if not memo:
        values = past.static[f"{coder.side}_lut"].to(torch.float32)
        if coder.qnorm:
            scale, offset = past.static[f"{coder.side}_qnorm"].to(torch.float32)
            values = values * scale + offset
        ranges = coder.range_of(values, past.static) if coder.calibrated else {}
        memo.update({"values": values, **{name: t.view(1, 1, heads, dim) for name, t in ranges.items()}})
    return memo


def _sdr(past: Past, heads: int, dim: int) -> Numbers:
    coder, packed = past.coder, past.packed
    half, width = 2 ** (coder.bits - 1), (8 - coder.bits).bit_length()
    values = (_plain(coder.bits).to(torch.int32) ^ half).to(torch.float32)
    scales, flags = packed["scales"].flatten(1, 2), packed["flags"].flatten(1, 2).view(torch.uint8)
    group = min(coder.channels, dim)
    offsets = torch.full((1,), -float(half))
    return Numbers(coder.bits, values, False, group, scales, offsets, 1, half, flags=flags, flag_bits=width)


READERS: Mapping[str, Callable[[Past, int, int], Numbers]] = MappingProxyType({"kivi": _kivi, "nuq": _nuq, "sdr": _sdr})
"""By the name of the format: what a past of so many heads and channels holds."""


@cache
def _plain(bits: int) -> Tensor:
    """Codes as numbers."""
    return torch.arange(2**bits, dtype=torch.float32)


def span_of(bits: int, dim: int) -> int:
    """Codes that are looked up together: those of a byte, two of 3 bits, or one where heads don't begin with a byte."""
    span, unit = {2: (4, 4), 3: (2, 8), 4: (2, 2)}.get(bits, (1, 1))
    return span if dim % unit == 0 else 1


def table_of(values: Tensor, bits: int, span: int) -> Tensor:
    """What `span` codes in a row stand for, the first in the lowest bits: float32 [2^(bits * span) * span]."""
    packed = torch.arange(2 ** (bits * span), device=values.device)
    shifts = torch.arange(span, device=values.device) * bits
    return values[(packed.unsqueeze(1) >> shifts) & (2**bits - 1)].flatten()
