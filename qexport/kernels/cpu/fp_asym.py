"""The CPU's kernel of the `fp_asym` format: levels times x are looked up, see `_level_loops`.

x meets the levels as integers: the largest product of a piece of a group gets 24 bits, the others what is left for
them. That error is that of a float32 sum of the piece, or less; sums are exact, and pieces are added in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats.fp_asym import TABLES
from qexport.kernels._threads import many
from qexport.kernels.cpu._groups import pieces_of, size_of, too_small
from qexport.kernels.cpu._level_loops import LONGEST, ROWS, SIDE, by_all, by_one, fast
from qexport.schema import Tensors

_SMALL = 1 << 18  # products that one thread works off before others would have started


@dataclass(frozen=True, eq=False)
class Levels:
    """A weight [n, k], its rows filled up to a multiple of `ROWS`, its groups to whole eights of columns.

    Attributes:
        codes: numpy's uint8 [rows / 32, words, 2, 16, 4]: of eight columns, the second four in the upper halves.
        scales: numpy's float32 [rows / 32, groups, 2, 32]: of levels above 0, and of the others; or one for both.
        levels: by these codes, float32 [16].
        pieces: of groups, see `pieces_of`; a unit is a word of `codes`.
        shape: n and k.
    """

    codes: Any
    scales: Any
    levels: Any
    pieces: Any
    shape: tuple[int, int]

    def product(self, x: Tensor) -> Tensor:
        """See `Weight`."""
        n, k = self.shape
        y = torch.empty(x.shape[0], n)
        run = by_all if many(x.shape[0] * n * k, _SMALL) else by_one
        each = (0,) * self.scales.shape[2]
        run(each, x.numpy(), self.codes, self.scales, self.levels, self.pieces, y.numpy())
        return y


class FpAsymKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        if small := too_small(fmt.group_size, k):
            return small
        lacks = "this processor lacks AVX-512 VBMI or VNNI, which the CPU's kernel looks levels up with"
        return None if fast() else lacks

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> Levels:
        """See `Kernel`."""
        fields = fmt.unpack(packed, n, k)
        size, more = size_of(fmt.group_size, k), -n % ROWS
        groups = -(-k // size)
        codes, levels = _sided(fields["codes"], TABLES[fmt.code])
        wide = F.pad(codes, (0, groups * size - k, 0, more)).view(n + more, groups, size)
        wide = F.pad(wide, (0, -size % 8)).view(-1, ROWS // 16, 16, groups * -(-size // 8), 2, 4)
        low, high = wide.permute(4, 0, 3, 1, 2, 5)
        names = ("scales_pos", "scales_neg")[: 1 + fmt.two_scales]
        scales = F.pad(torch.stack([fields[name] for name in names], 2), (0, 0, 0, 0, 0, more))
        scales = scales.view(-1, ROWS, groups, len(names)).permute(0, 2, 3, 1).contiguous()
        words = (low | high << 4).contiguous()
        return Levels(words.numpy(), scales.numpy(), levels.numpy(), pieces_of(k, size, LONGEST, 8), (n, k))


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
