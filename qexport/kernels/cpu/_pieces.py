"""Groups of columns, long ones cut up."""

from typing import Any

import numpy as np


def pieces_of(k: int, group_size: int, longest: int, unit: int = 1) -> Any:
    """Numpy's int64 [pieces, 4]: first column, how many, first unit, group.

    Args:
        k: columns.
        group_size: of them, -1 for one group.
        longest: columns of a piece, whole units.
        unit: columns that are stored together; a group begins a new one.
    """
    size = k if group_size == -1 else min(group_size, k)
    units = -(-size // unit)
    out = [
        (j, min(longest, g + size - j, k - j), g // size * units + (j - g) // unit, g // size)
        for g in range(0, k, size)
        for j in range(g, min(g + size, k), longest)
    ]
    return np.array(out, np.int64)
