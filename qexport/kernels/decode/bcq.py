"""The decoder of the `bcq` format."""

from typing import Any

import torch

from qexport.kernels.decode import _rows
from qexport.schema import Tensors


class BcqDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        alpha = packed["alpha"].to(torch.float32)
        offsets = alpha.new_zeros(alpha.shape[:2]) if fmt.offset == "none" else packed["offset"].to(torch.float32)
        size = k if fmt.group_size == -1 else fmt.group_size
        return _rows.planes(packed["binary"], size, alpha, offsets, (n, k))


plugin = BcqDecoder()
