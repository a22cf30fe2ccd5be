"""Numbers on a line: exact percentiles of a stream, and the best few levels for a weighted histogram."""

from math import floor

import torch
from torch import Tensor


def extremes_for(tokens: int, part: float) -> int:
    """How many of the least of a stream have to be kept to know its quantile `part`, at most one half."""
    return floor(part * max(tokens - 1, 0)) + 2


def keep_least(kept: Tensor, new: Tensor) -> Tensor:
    """The least numbers of each column, sorted: kept [m, c] and new [t, c] to [m, c]. Infinity fills what is empty."""
    return torch.cat([kept, new]).topk(kept.shape[0], 0, largest=False).values


def quantile(least: Tensor, seen: int, part: float) -> Tensor:
    """Quantile of each column of `seen` numbers, linear between neighbours, from the least of them, sorted [m, c]."""
    at = part * max(seen - 1, 0)
    below = min(floor(at), least.shape[0] - 1)
    above = min(below + 1, max(seen - 1, 0), least.shape[0] - 1)
    return torch.lerp(least[below], least[above], at - below)


def middles(bins: int) -> Tensor:
    """Middles of equal bins from -1 to 1, float64."""
    return (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 / bins) - 1


def add_to(histogram: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """A histogram [bins] over -1 to 1 with more numbers; those outside of -1 to 1 are left out.

    Args:
        histogram: float64.
        x: float32, any shape.
        weight: like x; 1 each by default.
    """
    bins = histogram.shape[0]
    inside = x.abs() <= 1
    at = ((x[inside] + 1) * (bins / 2)).to(torch.int64).clamp_(0, bins - 1)
    mass = None if weight is None else weight[inside].to(torch.float64).cpu()
    # On an accelerator the order of sums would change from run to run.
    return histogram + torch.bincount(at.cpu(), mass, bins).to(histogram)


def levels(points: Tensor, weight: Tensor, count: int) -> Tensor:
    """The numbers that bring the weighted sum of squared distances to the nearest of them to its least.

    k-means on a line, solved exactly: clusters are runs of neighbours, so the best cut of the first j points into q
    runs follows from those into q - 1 (Wang and Song, Ckmeans.1d.dp, The R Journal 3/2, 2011).

    Args:
        points: float64 [n], sorted.
        weight: float64 [n], not negative.
        count: of levels.

    Returns:
        float64 [count], sorted; with fewer points that weigh something, evenly spaced numbers stand for the rest.

    Cost: n^2 count.
    """
    own = weight > 0
    x, w = points[own], weight[own] / weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
    if x.numel() <= count:
        spare = torch.linspace(-1, 1, count - x.numel() + 2, dtype=torch.float64)[1:-1]
        return torch.cat([x, spare]).sort().values
    start = torch.zeros(1, dtype=torch.float64)
    s0, s1, s2 = (torch.cat([start, part.cumsum(0)]) for part in (w, w * x, w * x * x))
    # Row j, column i: of the run [i, j), which holds something where i < j.
    mass = s0[:, None] - s0
    cost = (s2[:, None] - s2) - (s1[:, None] - s1).square_().div_(mass)
    empty = torch.ones(cost.shape, dtype=torch.bool).triu_()
    cost = cost.clamp_(min=0).masked_fill_(empty, torch.inf)
    best, cuts = cost[:, 0], []
    for _ in range(1, count):
        best, at = (cost + best).min(1)
        cuts.append(at)
    edges = [x.numel()]
    for at in reversed(cuts):
        edges.append(int(at[edges[-1]]))
    edges = [0, *reversed(edges)]
    ends = torch.tensor(edges)
    return (s1[ends[1:]] - s1[ends[:-1]]) / (s0[ends[1:]] - s0[ends[:-1]])
