"""AWQ: make the columns that large activations meet larger before they are rounded, and those activations smaller."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats._bits import grouped
from qexport.formats.base import Format, ScalarGrid, rounded
from qexport.formats.specs import InputSpec
from qexport.statistics import AbsMean, Statistic
from qexport.transforms.base import Change, Site, tied

_LEAST = 1e-4


@dataclass(frozen=True)
class Awq:
    """Lin et al., AWQ, arXiv:2306.00978: scale = mean |x|^r / mean |w|^(1 - r), with the r that serves the layer best.

    The mean of |w| is taken relative to the largest weight of each group. Candidates are rounded to nearest in the
    format at hand and judged by the output of the whole decoder layer, for every group of linears. The authors' search
    judges by the output of the attention, of the MLP, or of the linear alone. Their clip search is an option of method
    `rtn`.

    Attributes:
        grid: how many ratios r are tried: 0, 1/grid, 2/grid ... Leaving everything as it is is always tried too.
        weights: take the mean of |w| into account; otherwise scale = mean |x|^r.
    """

    source: ClassVar[str] = "Lin et al., AWQ, arXiv:2306.00978"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({AbsMean})
    steps: ClassVar[InputSpec] = InputSpec(scale=True)
    turns: ClassVar[bool] = False
    judges: ClassVar[int] = 1
    variants: ClassVar[tuple[()]] = ()

    grid: int = 20
    weights: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= 1000:
            raise UsageError(f"transform 'awq': grid must be 1 to 1000, got {self.grid}.")

    @property
    def trials(self) -> int:
        """One for each ratio, and one for no change."""
        return self.grid + 1

    def reject(self, fmt: Format) -> str | None:
        """The search rounds weights one by one."""
        return None if isinstance(fmt, ScalarGrid) else "its search rounds weights one by one, and this codes vectors"

    def decide(self, site: Site) -> Change:
        """The scale of least loss, positive float32 [k]."""
        x = tied(site.stats[AbsMean], site.ties).clamp(min=_LEAST)
        w = tied(_relative(site.weights, site.fmts), site.ties) if self.weights else torch.ones_like(x)
        best, lowest = torch.ones_like(x), _loss(site, torch.ones_like(x))
        for step in range(self.grid):
            ratio = step / self.grid
            scale = x**ratio / ((w ** (1 - ratio) if self.weights else w) + _LEAST)
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(min=_LEAST)
            found = _loss(site, scale)
            if found < lowest:
                best, lowest = scale, found
        return Change(scale=best)


def _relative(weights: Sequence[Tensor], fmts: Sequence[Format]) -> Tensor:
    """Mean over all rows of |w| over the largest of its group, float32 [k]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for w, fmt in zip(weights, fmts, strict=True):
        assert isinstance(fmt, ScalarGrid)
        size = w.abs()
        for part, _ in grouped(size, fmt.group_size):
            part.div_(part.amax(-1, keepdim=True).clamp(min=1e-12))
        total += size.sum(0)
    return total / sum(w.shape[0] for w in weights)


def _loss(site: Site, scale: Tensor) -> float:
    """What rounding the weights under a scale does to the layer's output."""
    tried = [rounded(fmt, w * scale) for w, fmt in zip(site.weights, site.fmts, strict=True)]  # type: ignore[arg-type]
    return site.loss(tried, Change(scale=scale))


plugin = Awq
