"""Weights that are sums of numbers where bits of planes are set, one for each plane and group of a row.

Sums of four neighbours of x are looked up by four bits of a plane: see `_plane_loops`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats._bits import pack_bits
from qexport.kernels._threads import many
from qexport.kernels.cpu._groups import in_units, size_of, too_small
from qexport.kernels.cpu._plane_loops import LANES, blocks_of, by_all, by_one, fast

_SMALL = 1 << 18  # products that one thread works off before others would have started


@dataclass(frozen=True, eq=False)
class Planes:
    """A weight [n, k], its rows filled up to a multiple of 16 or 32, its groups to whole fours of columns.

    Attributes:
        fours: of columns that a group has in a word: 8, 4 or 2.
        size: columns of a group, the last one may have fewer.
        arrays: of numpy: bits, int32 [blocks, words, planes, rows of a block]; what a set bit adds, float32
            [groups, planes, rows]; what every column adds, float32 [groups, rows].
        shape: n and k.
    """

    fours: int
    size: int
    arrays: tuple[Any, Any, Any]
    shape: tuple[int, int]

    def product(self, x: Tensor) -> Tensor:
        """See `Weight`."""
        n, k = self.shape
        y = torch.empty(x.shape[0], n)
        run = by_all if many(x.shape[0] * n * k, _SMALL) else by_one
        run((0,) * self.arrays[0].shape[2], (0,) * self.fours, x.numpy(), self.arrays, self.size, y.numpy())
        return y


def obstacle(group_size: int, k: int) -> str | None:
    """Why weights in such groups can't be laid out, or this processor can't look sums up; or None."""
    if small := too_small(group_size, k):
        return small
    return None if fast() else "this processor lacks AVX-512, which the CPU's kernel looks sums up with"


def prepare(codes: Tensor, set_bits: Tensor, always: Tensor, group_size: int) -> Planes:
    """Lay a weight out.

    Args:
        codes: uint8 [n, k], bit p of which is that of plane p.
        set_bits: what a set bit adds, float32 [n, groups, planes].
        always: what every column adds, float32 [n, groups].
        group_size: columns of a group, -1 for one a row.
    """
    n, k = codes.shape
    planes, rows = set_bits.shape[2], LANES * blocks_of(set_bits.shape[2])
    size = size_of(group_size, k)
    wide, fours = in_units(codes, size, rows)
    more = wide.shape[0] - n
    words = torch.stack([pack_bits(wide >> p & 1, 1) for p in range(planes)])  # [planes, rows, words]
    own = words.view(planes, -1, rows, words.shape[2]).permute(1, 3, 0, 2).contiguous()
    factors = F.pad(set_bits.permute(1, 2, 0), (0, more)).contiguous()
    arrays = (own.numpy(), factors.numpy(), F.pad(always.T, (0, more)).contiguous().numpy())
    return Planes(fours, size, arrays, (n, k))
