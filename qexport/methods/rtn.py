"""RTN: each weight goes to the nearest value of its group's grid. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import Format
from qexport.methods._clip import check_clip, fit_clipped, fit_effort
from qexport.methods._columns import refuse_unless_scalar, scalar
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Hessian, Statistic


@dataclass(frozen=True)
class Rtn:
    """Round to nearest.

    Attributes:
        clip: how many shrunk ranges to try for each group, keeping the one with the lowest squared error; 0 is plain
            min-max. Step i takes away i/40 of the range.
        weighted: the search judges by the error of the group's share of the layer's output, d H d^T with the group's
            block of the Hessian, as AWQ's clip search does (Lin et al., arXiv:2306.00978); this needs data.
    """

    source: ClassVar[str] = "the baseline of every paper; clip search as in Frantar et al., arXiv:2210.17323, appendix"

    clip: int = 0
    weighted: bool = False

    def __post_init__(self) -> None:
        check_clip("rtn", self.clip)
        if self.weighted and not self.clip:
            raise UsageError("method 'rtn': weighted=true weighs the clip search; set clip too, for example clip=20.")

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Hessian, if the clip search is weighted."""
        return frozenset({Hessian}) if self.weighted else frozenset()

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
        flops = 2.0 * n * k * (k if size == -1 else size) * self.clip if self.weighted else 0.0
        return Effort(flops, n * k * (fit.touched + 4), groups * (fit.calls + 8))

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """Round w, float32 [n, k]; of `stats` the Hessian is used if the search is weighted."""
        grid = scalar(fmt)
        state = grid.begin(w)
        k = w.shape[1]
        size = k if grid.group_size == -1 else grid.group_size
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        params = []
        for j in range(0, k, size):
            part = w[:, j : j + size]
            weight = stats[Hessian][j : j + size, j : j + size] if self.weighted else None
            found = fit_clipped(part, weight, grid, state, j, self.clip)
            codes[:, j : j + size] = grid.nearest(part, found)
            params.append({name: p for name, p in found.items() if not name.startswith("_")})
        return Result({"codes": codes, **{name: torch.cat([p[name] for p in params], 1) for name in params[0]}})

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Members one by one."""
        return [self.quantize(w, stats, fmt, rng) for w, fmt in zip(weights, fmts, strict=True)]


plugin = Rtn
