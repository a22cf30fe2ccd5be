"""The decoder of the `uniform` format."""

from typing import Any

import torch

from qexport.kernels.decode import _rows
from qexport.schema import Tensors


class UniformDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        scales = packed["scales"].to(torch.float32)
        if fmt.symmetric:
            zeros = torch.full_like(scales, 2 ** (fmt.bits - 1))
        else:
            zeros = _rows.across(packed["qzeros"], _rows.numbers(fmt.bits), n)
        size = k if fmt.group_size == -1 else fmt.group_size
        return _rows.affine(packed["qweight"], fmt.bits, size, zeros, scales, None, (n, k))


plugin = UniformDecoder()
