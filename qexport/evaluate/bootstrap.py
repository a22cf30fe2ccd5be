"""How far a figure may be from its true value: bootstrap intervals, and paired ones for differences.

What is drawn again and again, with replacement, are observations: windows of a text, or parts of them where there are
few windows, and documents of a task. Two models that were measured on the same observations are drawn together, so that
the noise of the text, which both meet, drops out of their difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

LEAST = 32  # observations of a text: fewer windows are cut into parts
DRAWS = 4000
_PART = 250  # draws at a time: 1e5 observations then take 200 MB
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Stratum:
    """Observations that are drawn among themselves: a text, or one of several tasks.

    Attributes:
        values: means of the observations.
        counts: how many predictions each is the mean of.
    """

    values: Values
    counts: Values

    def __post_init__(self) -> None:
        assert self.values.shape == self.counts.shape


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def of(self, function: Callable[[float], float]) -> "Interval":
        """The same of a function that grows, such as exp."""
        return Interval(function(self.value), function(self.low), function(self.high))

    @property
    def holds_zero(self) -> bool:
        """Whether a difference can't be told from none."""
        return self.low <= 0 <= self.high


def stratum(values: Sequence[float], counts: Sequence[float] | None = None) -> Stratum:
    """One from plain numbers; without counts all weigh the same."""
    own = np.asarray(values, np.float64)
    return Stratum(own, np.ones_like(own) if counts is None else np.asarray(counts, np.float64))


def parts_of(windows: int) -> int:
    """Into how many parts of equal length each window is cut, so that there are at least `LEAST` observations."""
    return ceil(LEAST / windows)


def mean(strata: Sequence[Stratum]) -> float:
    """The mean over strata of their means over predictions."""
    return float(np.mean([np.average(s.values, weights=s.counts) for s in strata]))


def interval(strata: Sequence[Stratum]) -> Interval | None:
    """The mean with its interval; None where some stratum has a single observation.

    Percentiles of the bootstrap lie too close together when observations are few, n of them by sqrt(1 - 1 / n); that
    is put right for each stratum.
    """
    if any(len(s.values) < 2 for s in strata):
        return None
    drawn = np.zeros(DRAWS)
    for i, s in enumerate(strata):
        own = np.average(s.values, weights=s.counts)
        size = len(s.values)
        drawn += (_draws(s, seed=i) - own) * (size / (size - 1)) ** 0.5 / len(strata)
    value = mean(strata)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high))


def difference(ours: Sequence[Stratum], theirs: Sequence[Stratum]) -> Interval | None:
    """Ours less theirs, observation by observation; both must be of the same observations."""
    return interval([Stratum(a.values - b.values, a.counts) for a, b in zip(ours, theirs, strict=True)])


def _draws(s: Stratum, seed: int) -> Values:
    """Means of `DRAWS` samples of the observations; the same numbers for every model, so that pairs stay pairs."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(DRAWS // _PART):
        index = rng.integers(0, len(s.values), (_PART, len(s.values)))
        counts = s.counts[index]
        out.append((s.values[index] * counts).sum(1) / counts.sum(1))
    return np.concatenate(out)
