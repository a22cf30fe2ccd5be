"""RTN: each weight goes to the nearest value of its group's grid. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.formats.base import Format
from qexport.methods._clip import check_clip, fit_clipped, fit_effort
from qexport.methods._columns import refuse_unless_scalar, scalar
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Statistic


@dataclass(frozen=True)
class Rtn:
    """Round to nearest.

    Attributes:
        clip: how many shrunk ranges to try for each group, keeping the one with the lowest squared error; 0 is plain
            min-max. Step i takes away i/40 of the range.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    source: ClassVar[str] = "the baseline of every paper; clip search as in Frantar et al., arXiv:2210.17323, appendix"

    clip: int = 0

    def __post_init__(self) -> None:
        check_clip("rtn", self.clip)

    @property
    def permutes(self) -> bool:
        """RTN keeps the columns where they are."""
        return False

    def reject(self, fmt: Format) -> str | None:
        """Any scalar grid will do."""
        return refuse_unless_scalar(fmt)

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """It keeps no outliers apart."""
        return dict.fromkeys(fmt.expected_extents(n, k), 0)

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """A fit and a rounding for each group."""
        size = scalar(fmt).group_size
        fit = fit_effort(self.clip)
        groups = 1 if size == -1 else -(-k // size)
        return Effort(touched=n * k * (fit.touched + 4), calls=groups * (fit.calls + 8))

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """Round w, float32 [n, k]; `stats` and `rng` are not used."""
        grid = scalar(fmt)
        state = grid.begin(w)
        k = w.shape[1]
        size = k if grid.group_size == -1 else grid.group_size
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        params = []
        for j in range(0, k, size):
            part = w[:, j : j + size]
            found = fit_clipped(part, None, grid, state, j, self.clip)
            codes[:, j : j + size] = grid.nearest(part, found)
            params.append({name: p for name, p in found.items() if not name.startswith("_")})
        return Result({"codes": codes, **{name: torch.cat([p[name] for p in params], 1) for name in params[0]}})

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Members one by one."""
        return [self.quantize(w, stats, fmt, rng) for w, fmt in zip(weights, fmts, strict=True)]


plugin = Rtn
