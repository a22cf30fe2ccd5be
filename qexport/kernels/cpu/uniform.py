"""The CPU's kernel of the `uniform` format."""

from typing import Any

import torch

from qexport.kernels.cpu import _codes
from qexport.schema import Tensors


class UniformKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _codes.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _codes.Codes:
        """See `Kernel`."""
        fields = fmt.unpack(packed, n, k)
        zeros, kind = torch.tensor([2.0 ** (fmt.bits - 1)]), "shared"
        if not fmt.symmetric:
            zeros, kind = fields["zeros"].to(torch.uint8), "bytes"
        return _codes.prepare(fields["codes"], (fields["scales"], zeros), kind, fmt.bits, fmt.group_size)


plugin = UniformKernel()
