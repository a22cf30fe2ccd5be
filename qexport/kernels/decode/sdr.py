"""The decoder of the `sdr` format: signed codes are levels, and what a flag shifts by multiplies both signs alike."""

from typing import Any

import torch

from qexport.kernels.decode import _rows
from qexport.schema import Tensors


class SdrDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        levels = fmt.signed(_rows.numbers(fmt.bits))
        size = k if fmt.group_size == -1 else fmt.group_size
        shifts = packed["scales"].new_ones(n, -(-k // size))
        if fmt.flag_bits:
            shifts = _rows.across(packed["flags"], torch.exp2(_rows.numbers(fmt.flag_bits)), n)
        return _rows.levels(packed["nibbles"], fmt.bits, size, levels, shifts, shifts, packed["scales"], (n, k))


plugin = SdrDecoder()
