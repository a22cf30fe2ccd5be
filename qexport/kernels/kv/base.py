"""What formats of caches store, said in one way that kernels understand.

A number is `offset + scale * values[code]`, plus the outliers that the token has in its channel, all of it rotated by
the token's position where keys were coded before that. Scales and offsets are of channels over groups of tokens, or of
tokens over groups of channels. So a new format needs a file beside this one, with a `Reader`.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from qexport import plugins
from qexport.schema import Tensors

ALL = 1 << 40  # tokens of a group that never ends


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
        return self.group == ALL


@dataclass(frozen=True)
class Rows:
    """A side as Triton's kernels take it: the format's functions, its tensors, and its constants (see `_numbers`)."""

    numbers: Any
    tile: Any
    tensors: tuple[Tensor, ...]
    args: tuple[int, ...]


class Reader(Protocol):
    """What a format says of its pasts. Its file is named after the format and ends with `plugin = <its Reader>`.

    Attributes:
        narrow: whether a number costs Triton's kernels so many registers that tiles have to be small.
    """

    narrow: bool

    def numbers(self, past: Past, heads: int, dim: int) -> Numbers:
        """What a past of so many heads and channels holds, for a CPU."""

    def rows(self, past: Past, heads: int, dim: int) -> Rows:
        """The same for Triton's kernels."""

    def obstacle(self) -> str | None:
        """Why Triton's kernels can't read it on this machine's GPU, or None."""


@cache
def reader(name: str) -> Reader:
    """By a format's name."""
    made: Reader = plugins.get("kernels.kv", name)()
    return made


def stored(past: Past, *names: str) -> tuple[Tensor, ...]:
    """Stored tensors."""
    return tuple(past.packed[name] for name in names)


def shape_of(past: Past, heads: int, dim: int) -> tuple[int, ...]:
    """The first constants of `Rows`."""
    return past.coder.bits, past.packed["codes"].shape[-1], heads, dim


@cache
def plain(bits: int) -> Tensor:
    """Codes as numbers, float32 [2^bits]."""
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
