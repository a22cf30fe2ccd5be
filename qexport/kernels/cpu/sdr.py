"""The CPU's kernel of the `sdr` format: a group's factor is the row's scale * 2^flag."""

from typing import Any

import torch

from qexport.kernels.cpu import _codes
from qexport.schema import Tensors


class SdrKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _codes.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _codes.Codes:
        """See `Kernel`."""
        fields, half = fmt.unpack(packed, n, k), 2 ** (fmt.bits - 1)
        raised = fmt.signed(fields["codes"]).add_(half).byte()
        parameters = (fields["flags"].byte(), torch.tensor([float(half)]), fields["scales"][:, 0])
        return _codes.prepare(raised, parameters, "powers", fmt.bits, fmt.group_size)


plugin = SdrKernel()
