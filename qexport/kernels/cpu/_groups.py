"""Groups of columns as the CPU's kernels lay them out."""

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

LEAST = 8  # columns of a group, or all there are


def size_of(group_size: int, k: int) -> int:
    """Columns of a group; the last one of a row may have fewer."""
    return k if group_size == -1 else min(group_size, k)


def too_small(group_size: int, k: int) -> str | None:
    """Why groups can't be laid out, or None."""
    size = size_of(group_size, k)
    small = size < LEAST and size != k
    return f"groups of {size} columns; the CPU's kernel reads {LEAST} and more" if small else None


def in_units(codes: Tensor, size: int, rows: int) -> tuple[Tensor, int]:
    """Codes filled up, so that groups lie in units of eight fours of columns, or several in one.

    Args:
        codes: uint8 [n, k].
        size: columns of a group.
        rows: are filled up to a multiple of so many.

    Returns:
        uint8 [rows, units * 32], and the fours of columns that a group has in a unit: 8, 4 or 2.
    """
    n, k = codes.shape
    fours = 8 if size > 16 else 4 if size > 8 else 2
    width = -(-size // 32) * 32 if fours == 8 else 4 * fours
    groups, more = -(-k // size), -n % rows
    wide = F.pad(codes, (0, groups * size - k, 0, more)).view(n + more, groups, size)
    wide = F.pad(wide, (0, width - size)).flatten(1)
    return F.pad(wide, (0, -wide.shape[1] % 32)), fours


def pieces_of(k: int, group_size: int, longest: int, unit: int = 1) -> Any:
    """Long groups cut up: numpy's int64 [pieces, 4], first column, how many, first unit, group.

    Args:
        k: columns.
        group_size: of them, -1 for one group.
        longest: columns of a piece, whole units.
        unit: columns that are stored together; a group begins a new one.
    """
    size = size_of(group_size, k)
    units = -(-size // unit)
    out = [
        (j, min(longest, g + size - j, k - j), g // size * units + (j - g) // unit, g // size)
        for g in range(0, k, size)
        for j in range(g, min(g + size, k), longest)
    ]
    return np.array(out, np.int64)
