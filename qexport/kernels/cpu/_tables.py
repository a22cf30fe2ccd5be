"""Weights whose codes pick from tables of what columns give: levels times x, or sums of some numbers of x.

x meets the codes as integers: the largest entry of a piece of a group gets 24 bits, the others what is left for them.
That error is that of a float32 sum of the piece, or less; sums are exact, and pieces are added in float32.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.kernels.cpu._groups import pieces_of, size_of, too_small
from qexport.kernels.cpu._laid_out import LaidOut
from qexport.kernels.cpu._pages import placed
from qexport.kernels.cpu._table_loops import CODES, LANES, LONGEST, blocks_of, by_all, by_one, fast


@dataclass(frozen=True, eq=False)
class Tables(LaidOut):
    """A weight [n, k], its rows filled up to a multiple of 16 or 32, its groups to whole words.

    Attributes:
        kind: tuples as long as there are columns of an entry, planes, signs and scales of a group, bytes of a scale.
        weight: of numpy: codes, uint8 [blocks, words, planes, rows of a block / 16, 16, 4], of eight the second four in
            the upper halves; scales, float32, or float16 as int16, [blocks, groups, scales, rows of a block]; pieces of
            groups, see `pieces_of`.
        patterns: what the columns of an entry are multiplied by, float32 [columns, 16].
        shape: n and k.
    """

    kind: tuple[Any, ...]
    weight: tuple[Any, Any, Any]
    patterns: Any
    shape: tuple[int, int]

    @cached_property
    def given(self) -> tuple[Any, ...]:
        """See `LaidOut`."""
        codes, scales, pieces = self.weight
        numbers = (
            *self.shape, codes.ctypes.data, *codes.shape[:2], scales.ctypes.data, scales.shape[1], scales.shape[3],
            pieces.ctypes.data, len(pieces), self.patterns.ctypes.data,
        )  # fmt: skip
        return by_one, by_all, self.kind, numbers


def obstacle(group_size: int, k: int) -> str | None:
    """Why weights in such groups can't be laid out, or this processor can't pick from tables; or None."""
    if small := too_small(group_size, k):
        return small
    return None if fast() else "this processor lacks AVX-512 VBMI or VNNI, which the CPU's kernel looks sums up with"


def filled(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Values [n, k], each group filled up to whole words of codes for so many columns each."""
    n, k = values.shape
    size = size_of(group_size, k)
    wide = F.pad(values, (0, -k % size)).view(n, -1, size)
    return F.pad(wide, (0, -size % (CODES * columns))).flatten(1)


def prepare(codes: Tensor, scales: Tensor, signs: int, patterns: Tensor, shape: tuple[int, int], size: int) -> Tables:
    """Lay a weight out.

    Args:
        codes: uint8 [planes, n, groups of whole words], see `filled`.
        scales: float32 [n, groups, planes x signs, or one more]: the last one is then what every column adds.
        signs: 2 if levels above 0, which have the bit `SIDE`, have scales of their own, or 1.
        patterns: float32 [columns, 16], what the columns of an entry are multiplied by.
        shape: n and k.
        size: columns of a group, -1 for one a row.
    """
    planes, (columns, _) = codes.shape[0], patterns.shape
    rows = LANES * blocks_of(planes)
    more = -shape[0] % rows
    wide = F.pad(codes, (0, 0, 0, more)).view(planes, -1, rows // LANES, LANES, codes.shape[2] // CODES, 2, 4)
    low, high = wide.permute(5, 1, 4, 0, 2, 3, 6)
    half = scales.half()
    exact = torch.equal(half.float(), scales)
    own = F.pad(half.view(torch.int16) if exact else scales, (0, 0, 0, 0, 0, more))
    own = own.view(-1, rows, *scales.shape[1:]).permute(0, 2, 3, 1).contiguous()
    kind = tuple((0,) * count for count in (columns, planes, signs, scales.shape[2], own.itemsize))
    pieces = pieces_of(shape[1], size, LONGEST, CODES * columns)
    weight = (placed((low | high << 4).contiguous().numpy()), placed(own.numpy()), pieces)
    return Tables(kind, weight, patterns.contiguous().numpy(), shape)
