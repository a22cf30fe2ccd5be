"""The CPU's kernel of the `fp_asym` format: levels times x are looked up."""

from typing import Any

import torch
from torch import Tensor

from qexport.formats.fp_asym import TABLES
from qexport.kernels.cpu import _tables
from qexport.kernels.cpu._table_loops import SIDE
from qexport.schema import Tensors


class FpAsymKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _tables.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _tables.Tables:
        """See `Kernel`."""
        fields = fmt.unpack(packed, n, k)
        codes, levels = _sided(fields["codes"], TABLES[fmt.code])
        wide = _tables.filled(codes, fmt.group_size, 1).unsqueeze(0)
        names = ("scales_pos", "scales_neg")[: 1 + fmt.two_scales]
        scales = torch.stack([fields[name] for name in names], 2)
        return _tables.prepare(wide, scales, len(names), levels.unsqueeze(0), (n, k), fmt.group_size)


def _sided(codes: Tensor, table: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Codes with the bit `SIDE` where levels lie above 0, a level 0 wherever, and the sixteen levels by these codes."""
    half = len(table) // 2
    order = sorted(range(len(table)), key=lambda code: table[code])  # no table has more than half on a side
    new, levels = torch.empty(len(table), dtype=torch.uint8), torch.zeros(16)
    for i, code in enumerate(order):
        new[code] = i if i < half else SIDE + i - half
        levels[new[code].int()] = table[code]
    return new[codes.int()], levels


plugin = FpAsymKernel()
