"""The CPU's kernel of the `bcq` format: four bits of a plane pick the sum of four neighbours of x, signed by them."""

from typing import Any

import torch

from qexport.kernels.cpu import _tables
from qexport.schema import Tensors

_COLUMNS = 4  # of a sum


class BcqKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _tables.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _tables.Tables:
        """See `Kernel`."""
        fields, columns = fmt.unpack(packed, n, k), torch.arange(_COLUMNS, dtype=torch.uint8).unsqueeze(1)
        wide = _tables.filled(fields["codes"], fmt.group_size, _COLUMNS).view(n, -1, _COLUMNS)
        codes = torch.stack([((wide >> p & 1) << columns[:, 0]).sum(2, dtype=torch.uint8) for p in range(fmt.bits)])
        signs = (torch.arange(16) >> columns & 1) * 2.0 - 1
        scales = [fields["alpha"], *(fields[name].unsqueeze(2) for name in ("offset",) if name in fields)]
        return _tables.prepare(codes, torch.cat(scales, 2), 1, signs, (n, k), fmt.group_size)


plugin = BcqKernel()
