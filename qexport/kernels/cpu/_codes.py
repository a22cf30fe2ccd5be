"""Weights that are factor * (code - zero), factor and zero one a group of a row, and outliers beside.

x meets the codes as integers: the largest number of a group gets 24 bits, the others what is left for them. That error
is that of a float32 sum of the group, or less; products and their sums are exact, and groups are added in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.kernels.cpu._code_loops import KINDS, ROWS, SIZES, STEPS, by_all, by_one, fast, parts_of
from qexport.kernels.cpu._groups import in_units, size_of, too_small
from qexport.kernels.cpu._laid_out import LaidOut
from qexport.kernels.cpu._pages import placed

_LONGEST = 65536  # columns of a group, whose products of codes and digits an int32 holds
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True, eq=False)
class Codes(LaidOut):
    """A weight [n, k], its rows filled up to a multiple of `ROWS`, its groups to whole fours of columns.

    Attributes:
        bits: of a code.
        fours: of columns that a group has in a unit of eight: 8, 4 or 2.
        size: columns of a group, the last one may have fewer.
        groups: in a row, and more that are empty, so that a unit has whole ones.
        kind: what the parameters are, one of `_code_loops.KINDS`.
        codes: numpy's uint8 [rows / 64, units, 4, bits, 64], see `_code_loops`.
        parameters: three of numpy's, as bytes, of the kind's arrays: [rows / 64, groups, 64] and what a row has,
            or what all groups or all rows share.
        sparse: outliers that are added, of numpy: int32 [n + 1], where those of each row start, or [0] if there are
            none; their columns, uint16 or int32, and values, float32.
        shape: n and k.
    """

    bits: int
    fours: int
    size: int
    groups: int
    kind: str
    codes: Any
    parameters: tuple[Any, Any, Any]
    sparse: tuple[Any, Any, Any]
    shape: tuple[int, int]
    small: ClassVar[int] = 1 << 19

    @cached_property
    def given(self) -> tuple[Any, ...]:
        """See `LaidOut`."""
        starts, columns, values = self.sparse
        widths = (0,) * self.bits, (0,) * self.fours, (0,) * columns.itemsize
        numbers = (
            *self.shape, self.codes.ctypes.data, *self.codes.shape[:2], _NUMBERS[self.kind], self.groups, self.size,
            *(values.ctypes.data for values in self.parameters), *SIZES[self.kind], starts.ctypes.data, starts.size,
            columns.ctypes.data, values.ctypes.data, values.size,
        )  # fmt: skip
        return by_one, by_all, widths, numbers

    def joined(self, others: Sequence[Any]) -> "tuple[Codes, list[Codes]] | None":
        """See `Joinable`."""
        return _joined([self, *others])


def obstacle(group_size: int, k: int) -> str | None:
    """Why weights in such groups can't be laid out, or this processor can't multiply by them; or None."""
    if size_of(group_size, k) > _LONGEST:
        return f"groups of {size_of(group_size, k)} columns; the CPU's kernel reads up to {_LONGEST}"
    if small := too_small(group_size, k):
        return small
    return None if fast() else "this processor lacks AVX-512 VNNI, which the CPU's kernel multiplies with"


def prepare(
    codes: Tensor,
    parameters: tuple[Tensor, ...],
    kind: str,
    bits: int,
    group_size: int,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Codes:
    """Lay a weight out.

    Args:
        codes: uint8 [n, k].
        parameters: two or three that the kind reads, [n, groups] each; of `"shared"` and `"powers"` the second is one
            number, of `"levels"` the third is [n / 16, groups, 4], of `"powers"` [n].
        kind: one of `_code_loops.KINDS`.
        bits: of a code.
        group_size: columns of a group, -1 for one a row.
        sparse: outliers as in `Codes`; None if there are none.
    """
    n, k = codes.shape
    size = size_of(group_size, k)
    wide, fours = in_units(codes, size, ROWS)
    groups = -(-k // size)
    missing = -groups % (STEPS // fours)
    own = [_by_blocks(t, wide.shape[0], missing) if t.ndim > 1 else F.pad(t, (0, -n % ROWS)) for t in parameters]
    own += [torch.zeros(1)] * (3 - len(own))
    given = tuple(placed(t.flatten().view(torch.uint8).numpy()) for t in own)
    rows, columns, values = sparse or (torch.zeros(0, dtype=torch.int32),) * 2 + (torch.zeros(0),)
    beside = (rows.int(), columns.to(torch.uint16 if k <= 1 << 16 else torch.int32), values.float())
    outliers = tuple(placed(t.contiguous().numpy()) for t in beside)
    tiles = placed(_tiles(wide, bits).numpy())
    return Codes(bits, fours, size, groups + missing, kind, tiles, given, outliers, (n, k))


def _by_blocks(values: Tensor, rows: int, missing: int) -> Tensor:
    """Parameters [n, groups] or [n / 16, groups, 4] in the order of the loops, filled up with zeros."""
    each = ROWS // 16 if values.ndim == 3 else ROWS
    out = values.new_zeros(rows // ROWS * each, values.shape[1] + missing, *values.shape[2:])
    out[: values.shape[0], : values.shape[1]] = values
    return out.unflatten(0, (-1, each)).transpose(1, 2).contiguous()


def _tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] in the order of the loops, their bits apart by `parts_of`."""
    rows, columns = codes.shape
    own = codes.view(rows // ROWS, ROWS // 16, 16, columns // 32, STEPS, 4).permute(0, 3, 1, 4, 2, 5).flatten(4)
    out, low = torch.empty(*own.shape[:3], bits, 64, dtype=torch.uint8), 0
    for width in parts_of(bits):
        part = (own >> low & 2**width - 1).unflatten(3, (width, 8 // width))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(1)
        out[..., low : low + width, :] = (part << shifts).sum(4, dtype=torch.uint8)
        low += width
    return out


def _joined(weights: list[Any]) -> tuple[Codes, list[Codes]] | None:
    """See `Joinable`: blocks of rows lie one behind the other, so one weight is the arrays of all, end to end."""
    first = weights[0]
    if not all(_alike(first, w) for w in weights) or any(w.shape[0] % ROWS for w in weights[:-1]):
        return None
    codes, own = _end_to_end([w.codes for w in weights])
    arrays = zip(*(w.parameters for w in weights), strict=True)
    found = [_end_to_end(a) if rows else (a[0], a) for a, rows in zip(arrays, _of_rows(first.kind), strict=True)]
    whole = replace(first, codes=codes, parameters=tuple(a for a, _ in found))
    parts = [
        replace(w, codes=c, parameters=tuple(parts[i] for _, parts in found))
        for i, (w, c) in enumerate(zip(weights, own, strict=True))
    ]
    return replace(whole, shape=(sum(w.shape[0] for w in weights), first.shape[1])), parts


def _end_to_end(arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """One array, and the given ones as views of it."""
    whole = placed(np.concatenate(arrays))
    return whole, np.split(whole, np.cumsum([len(a) for a in arrays])[:-1])


def _alike(a: Codes, b: Any) -> bool:
    """Whether two weights differ in nothing but rows: in what they are made of, and in what all rows share."""
    if not isinstance(b, Codes) or a.sparse[0].size or b.sparse[0].size:
        return False
    facts = [(w.bits, w.fours, w.size, w.groups, w.kind, w.shape[1]) for w in (a, b)]
    return facts[0] == facts[1] and all(
        rows or np.array_equal(own[:4], other[:4])  # one number, and what it may be filled up with
        for own, other, rows in zip(a.parameters, b.parameters, _of_rows(a.kind), strict=True)
    )


def _of_rows(kind: str) -> tuple[bool, bool, bool]:
    """Which of a kind's arrays hold something for each row; the others are the same for all."""
    one, two, three, row = SIZES[kind]
    return one > 0, two > 0, three + row > 0
