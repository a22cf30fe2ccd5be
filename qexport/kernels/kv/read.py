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

from qexport.formats import _bits
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

    @property
    def groups(self) -> int:
        """Stored groups that are in use."""
        return self.stop // self.coder.group


@dataclass(frozen=True)
class Numbers:
    """Stored numbers as a kernel reads them.

    Attributes:
        bits: width of a code.
        values: float32 [2^bits], what a code stands for.
        by_channel: scales and offsets are [b or 1, groups, heads, dim] over `group` tokens; otherwise
            [b, tokens, heads, groups] over `group` channels.
        group: see `by_channel`.
        scales: float32.
        offsets: float32, like scales.
        flip: values are evenly spaced in the order of the codes with these bits turned over, and start at 0 (`values`
            and `offsets` say so); -1: they are whatever they are.
        slots: outliers float16 [b, tokens, slots] and their channels int16, or None.
    """

    bits: int
    values: Tensor
    by_channel: bool
    group: int
    scales: Tensor
    offsets: Tensor
    flip: int
    slots: tuple[Tensor, Tensor] | None = None

    @property
    def shared(self) -> bool:
        """Whether all sequences have the scales of the first."""
        return self.group == _ALL


def _kivi(past: Past, heads: int, dim: int) -> Numbers:
    coder = past.coder
    values = _plain(coder.bits).to(past.before.device)
    scales, offsets = (past.packed[name][:, : past.groups].to(torch.float32) for name in ("scales", "offsets"))
    if coder.fifo:
        return Numbers(coder.bits, values, False, min(coder.channels, dim), scales.squeeze(2), offsets.squeeze(2), 0)
    shape = (-1, (heads, dim))
    return Numbers(coder.bits, values, True, coder.group, scales.unflatten(*shape), offsets.unflatten(*shape), 0)


def _nuq(past: Past, heads: int, dim: int) -> Numbers:
    coder, packed = past.coder, past.packed
    memo = codebook_of(past, heads, dim)
    if coder.calibrated:
        scales, offsets = memo["scales"], memo["offsets"]
    else:
        own = (packed[name][:, : past.groups].to(torch.float32) for name in ("scales", "offsets"))
        scales, offsets = (t.unsqueeze(-1).expand(-1, -1, heads, 1) for t in own)
    slots = None
    if "outlier_values" in packed:
        slots = packed["outlier_values"][:, : past.groups, 0], packed["outlier_channels"][:, : past.groups, 0]
    values = memo["values"]
    return Numbers(coder.bits, values, coder.calibrated, _ALL if coder.calibrated else dim, scales, offsets, -1, slots)


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
    groups, half = _bits.groups_in(dim, coder.channels), 2 ** (coder.bits - 1)
    flags = _bits.unpack_bits(packed["flags"][:, : past.groups, 0], (8 - coder.bits).bit_length(), heads * groups)
    scales = packed["scales"][:, : past.groups, 0].to(torch.float32).unsqueeze(-1)
    scales = torch.exp2(flags.to(torch.float32)).unflatten(-1, (heads, groups)).mul_(scales)
    values = (_plain(coder.bits).to(torch.int32) ^ half).to(scales.device, torch.float32)
    return Numbers(coder.bits, values, False, min(coder.channels, dim), scales, scales * -half, half)


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
