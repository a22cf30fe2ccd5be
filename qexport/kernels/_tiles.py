"""Products of integers on processors that multiply four pairs of bytes in an instruction: all groups in one pass.

What comes out is, bit for bit, what `_integers.product` defines. The weight is held once, in tiles: 16 rows times 4
columns are 64 bytes, one register, and a tile has all columns of its rows. `LANES` rows, four tiles, are worked off
with up to eight rows of the input at a time, four bytes of each of which are one line of what the loop reads.

The instruction takes one factor without a sign: codes of the input are raised by 128, and what that adds, 128 times the
sum of a group's codes, is taken off again. Sums wrap around in int32 on the way, and are exact in the end.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats.base import Integers
from qexport.inputs.base import Codes
from qexport.kernels._threads import many
from qexport.kernels._tile_loops import LANES, available, by_all, by_one

__all__ = ["Tiles", "available", "columns", "prepare", "product"]

_LONGEST = 32768  # columns of an accumulator, as in `_integers`
_SMALL = 1 << 23  # products that one thread works off before others would have started
_HELD = 32  # of so many columns one may be held as floats: an eighth of a byte a weight


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight [n, k] in tiles, its rows filled up with zeros to a multiple of 64, its columns to one of 4.

    Attributes:
        arrays: of numpy, for numba:
            codes, int8 [rows / 16, columns / 4, 64], each 16 rows times 4 columns;
            bounds, int64 [parts + 1], where each part of a row starts and the last one ends, in fours of columns;
            group, int64 [parts], that each part belongs to;
            scales, float32 [groups, rows];
            zeros, int32 [groups, rows], or [0, rows] where all are 0;
            sums, int32 [parts, rows], of the codes of a part.
        shape: n and k.
        group_size: columns of a group.
        fixed: decoded columns that always meet floats, float32 [n, c], or None.
    """

    arrays: tuple[Any, ...]
    shape: tuple[int, int]
    group_size: int
    fixed: Tensor | None


def prepare(w: Integers, fixed: Tensor | None = None) -> Tiles | None:
    """Done once, at load: a byte a weight.

    Args:
        w: the weight.
        fixed: columns that always meet floats.

    Returns:
        None for groups that end within four columns.
    """
    n, k = w.codes.shape
    size = k if w.group_size == -1 else min(w.group_size, k)
    if size % 4 and size != k:
        return None
    cuts = [(g, j) for g, start in enumerate(range(0, k, size)) for j in range(start, min(start + size, k), _LONGEST)]
    stops = [*(j for _, j in cuts[1:]), k]
    sums = torch.stack([w.codes[:, j:stop].sum(1, dtype=torch.int32) for (_, j), stop in zip(cuts, stops, strict=True)])
    more = -n % LANES
    zeros = torch.empty(0, n + more, dtype=torch.int32) if w.zeros is None else F.pad(w.zeros.T, (0, more)).contiguous()
    tensors = (
        F.pad(w.codes, (0, -k % 4, 0, more)).view((n + more) // 16, 16, -1, 4).transpose(1, 2).flatten(2).contiguous(),
        torch.tensor([*(j // 4 for _, j in cuts), -(-k // 4)]),
        torch.tensor([g for g, _ in cuts]),
        F.pad(w.scales.T, (0, more)).contiguous(),
        zeros,
        F.pad(sums, (0, more)).contiguous(),
    )
    held = None
    if fixed is not None and 0 < fixed.numel() <= k // _HELD:
        held = _decoded(w.codes[:, fixed].T, fixed // size, tensors[3][:, :n], zeros[:, :n])
    return Tiles(tuple(t.numpy() for t in tensors), (n, k), size, held)


def columns(w: Tiles, wanted: Tensor) -> Tensor:
    """Some columns of the weight, decoded, float32 [n, c]."""
    (codes, _, _, scales, zeros, _), n = map(torch.from_numpy, w.arrays), w.shape[0]
    tiles = codes.view(*codes.shape[:2], 16, 4)
    found = tiles[:, wanted // 4, :, wanted % 4].flatten(1)[:, :n]
    return _decoded(found, wanted // w.group_size, scales[:, :n], zeros[:, :n])


def _decoded(codes: Tensor, group: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Columns as rows of codes, int8 [c, n], times their scales, float32 [n, c]."""
    values = codes.to(torch.float32)
    values = values.sub_(zeros[group]) if zeros.shape[0] else values
    return values.mul_(scales[group]).T.contiguous()


def product(codes: Codes, x: Tensor, w: Tiles) -> Tensor:
    """Input times the transposed weight, as `_integers.product`."""
    (n, k), m = w.shape, codes.scales.shape[0]
    planes = codes.planes if k % 4 == 0 else F.pad(codes.planes, (0, -k % 4))
    count = planes.shape[0] // m
    rows = min(1 << (m - 1).bit_length(), 8 // count)
    factors = np.ones((2, m + -m % rows), np.float32)
    factors[0, :m] = codes.scales.numpy()[:, 0]
    zeros = None if codes.zeros is None else codes.zeros.contiguous().numpy()[:, 0]
    given = planes.contiguous().numpy().view(np.int32).reshape(count, m, -1)
    y = torch.empty(factors.shape[1], w.arrays[3].shape[1])
    run = by_all if many(m * n * k * count, _SMALL) else by_one
    run(given, zeros, factors, k, w.arrays, y.numpy(), rows)
    y = y if y.shape == (m, n) else y[:m, :n].contiguous()
    if codes.columns is None:
        return y
    beside = columns(w, codes.columns) if w.fixed is None else w.fixed
    return y.addmm_(x.index_select(1, codes.columns), beside.T)
