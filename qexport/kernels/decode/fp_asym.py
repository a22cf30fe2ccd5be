"""The decoder of the `fp_asym` format."""

from typing import Any

import torch

from qexport.formats.fp_asym import TABLES
from qexport.kernels.decode import _rows
from qexport.schema import Tensors


class FpAsymDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        above = packed["scales_pos"].to(torch.float32)
        levels = above.new_tensor(TABLES[fmt.code])
        below = packed["scales_neg"].to(torch.float32) if fmt.two_scales else above
        size = k if fmt.group_size == -1 else fmt.group_size
        return _rows.levels(packed["qweight"], fmt.bits, size, levels, above, below, above.new_ones(n), (n, k))


plugin = FpAsymDecoder()
