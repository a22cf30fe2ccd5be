"""SpQR: GPTQ over very small groups with quantized statistics, the few weights that hurt most kept apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import Format
from qexport.formats.spqr import Spqr as SpqrFormat
from qexport.methods._columns import (
    Visit,
    by_format,
    check_options,
    column_loop,
    factor,
    loop_effort,
    plan_visit,
    result,
    stack,
    unstack,
)
from qexport.methods._outliers import likely_outliers, to_csr
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Hessian, Statistic

_PROBE_ROWS = 128
_PROBES = 8
_LOWEST, _HIGHEST = 1e-3, 1e2


@dataclass(frozen=True)
class Spqr:
    """Dettmers et al., SpQR, arXiv:2306.03078, Algorithm 1.

    Differs from the authors' code in what it stores: an outlier is its difference from the value that the dense part
    decodes to, because readers add it. Storing the weight itself there costs 10 % more error. Leaving one weight out
    of a group changes its range only if that weight is the smallest or the largest, so three fits a group are exact
    where the paper makes one for each weight.

    Attributes:
        damp: as in GPTQ.
        order: as in GPTQ. `"act"` is the paper's and stores a permutation, 16 / n bits a weight; `"group"` stores none.
        outlier_threshold: a weight is an outlier when keeping it apart saves more than this fraction of the mean
            squared error that dropping a whole weight would cost.
        outlier_rate: if above 0, the fraction of weights to keep apart; the threshold that gives it is searched for
            each set of linears that share an input.
        clip: as in GPTQ: how many shrunk ranges each row of a group tries before its statistics are quantized. The
            authors' code has no such search.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Hessian})
    source: ClassVar[str] = "Dettmers et al., SpQR, arXiv:2306.03078, Algorithm 1"

    damp: float = 0.01
    order: str = "act"
    outlier_threshold: float = 0.2
    outlier_rate: float = 0.0
    clip: int = 0

    def __post_init__(self) -> None:
        check_options("spqr", self.damp, self.order, self.clip)
        if not 0 <= self.outlier_rate < 0.5:
            raise UsageError(f"method 'spqr': outlier_rate must be 0 to 0.5, got {self.outlier_rate}.")
        if not self.outlier_threshold > 0:
            raise UsageError(f"method 'spqr': outlier_threshold must be above 0, got {self.outlier_threshold}.")

    @property
    def permutes(self) -> bool:
        """Only the full sort stores columns in another order."""
        return self.order == "act"

    def reject(self, fmt: Format) -> str | None:
        """Only a format that stores outliers will do."""
        return None if isinstance(fmt, SpqrFormat) else "it keeps outliers apart, which this format can't store"

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """As many outliers as asked for, or what the format expects."""
        return {"nnz": round(self.outlier_rate * n * k)} if self.outlier_rate else fmt.expected_extents(n, k)

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """One column loop, and two on the sample that the threshold is searched with."""
        assert isinstance(fmt, SpqrFormat)
        fit = Effort(touched=40.0 + 11.0 * self.clip, calls=130.0 + 27.0 * self.clip)
        code = Effort(touched=18.0, calls=14.0)
        rows = n + (2 * _PROBES * _PROBE_ROWS if self.outlier_rate else 0)
        loops = 3 if self.outlier_rate else 1
        one = loop_effort(rows, k, fmt.group_size, fit=fit, code=code)
        return Effort(one.flops, one.touched, loops * one.calls)

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """One linear, float32 [n, k]; needs `Hessian`."""
        return self.quantize_group([w], stats, [fmt], rng)[0]

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Linears that share an input, in one loop for each distinct format.

        Args:
            weights: float32 [n_i, k].
            stats: `Hessian`, float32 [k, k].
            fmts: `spqr` formats.
            rng: not used.

        Raises:
            CalibrationError: the damped Hessian is not positive definite.

        Cost: O(n k^2) time; 8 k^2 + 6 n k bytes beside the inputs.
        """
        hessian = stats[Hessian]
        results: list[Result] = [Result({})] * len(weights)
        for fmt, members in by_format(fmts):
            assert isinstance(fmt, SpqrFormat)
            visit = plan_visit(hessian.diagonal(), fmt.group_size, self.order)
            inverse = factor(hessian, visit, self.damp)
            w, ranges = stack([weights[i] for i in members], fmt.row_block)
            dead = visit.columns[inverse.dead]
            if dead.numel():
                w = w.clone()
                w[:, dead] = 0.0
            scale = _tolerance(w, ranges, visit, inverse.upper)
            threshold = self.outlier_threshold
            if self.outlier_rate:
                threshold = _search_threshold(w, scale, visit, inverse.upper, fmt, self.outlier_rate, self.clip)
            codes, params, outliers = _loop(w, scale * threshold, visit, inverse.upper, fmt, self.clip)
            raised = {} if inverse.damp == self.damp else {"damp": inverse.damp}
            rows = unstack(codes, params, ranges, fmt.row_block)
            for i, fields, (start, stop) in zip(members, rows, ranges, strict=True):
                sparse = to_csr(outliers[start:stop])
                rate = sparse["outlier_values"].numel() / weights[i].numel()
                found = {"outlier_threshold": threshold, "outlier_rate": rate}
                results[i] = result({**fields, **sparse}, visit, dead_columns=float(dead.numel()), **found, **raised)
        return results


def _tolerance(w: Tensor, ranges: Sequence[tuple[int, int]], visit: Visit, upper: Tensor) -> Tensor:
    """Mean over columns of var(column) / U_jj^2 for each member, spread over its rows: float32 [n, 1]."""
    out = torch.ones(w.shape[0], 1, device=w.device)
    costs = upper.diagonal().square().reciprocal()
    for start, stop in ranges:
        variance = w[start:stop].var(0, correction=0)[visit.columns]
        out[start:] = (variance * costs).mean()
    return out


def _loop(
    w: Tensor, tolerance: Tensor, visit: Visit, upper: Tensor, fmt: SpqrFormat, clip: int
) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """The column loop with outliers.

    Returns:
        codes, parameters, and outliers [n, k] in their stored dtype, 0 where there is none.
    """
    outliers = torch.zeros(w.shape[1], w.shape[0], dtype=fmt.outlier_dtype, device=w.device)

    def fit(part: Tensor, pivots: Tensor, step: int) -> dict[str, Tensor]:
        likely = likely_outliers(part, pivots, tolerance, fmt)
        kept = ~likely
        mean = (part * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        kept_part = torch.where(likely, mean, part)
        return fmt.fit(shrunk(kept_part, pivots, fmt, clip), None, None, step)

    def code(column: Tensor, pivot: Tensor, params: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        codes = fmt.nearest(column, params)
        value = fmt.value(codes, params)
        rest = column - value
        apart = (rest / pivot).square() > tolerance
        kept = torch.where(apart, rest, 0.0).to(fmt.outlier_dtype)
        outliers[step] = kept.squeeze(1)
        return codes, value + kept

    codes, params, _ = column_loop(w, visit, upper, fit, code)
    if visit.stored:
        return codes, params, outliers.T
    natural = torch.empty_like(outliers)
    natural[visit.columns] = outliers
    return codes, params, natural.T


def shrunk(w: Tensor, pivots: Tensor, fmt: SpqrFormat, steps: int) -> Tensor:
    """A group clamped, row by row, to the range whose unrounded statistics give the lowest weighted error.

    Args:
        w: float32 [n, g].
        pivots: U's diagonal at the group's columns, float32 [g].
        fmt: for its first-level fit.
        steps: how many ranges to try beside the full one: 1 - 1/40, 1 - 2/40 ...
    """
    lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best, lowest = torch.ones_like(lo), torch.full_like(lo, math.inf)
    for i in range(steps + 1 if steps else 0):
        ratio = 1 - i / 40
        params = fmt.spread(lo * ratio, hi * ratio)
        error = ((w - fmt.value(fmt.nearest(w, params), params)) / pivots).square().sum(1, keepdim=True)
        better = error < lowest
        best, lowest = torch.where(better, ratio, best), torch.where(better, error, lowest)
    return torch.minimum(torch.maximum(w, lo * best), hi * best) if steps else w


def _search_threshold(
    w: Tensor, scale: Tensor, visit: Visit, upper: Tensor, fmt: SpqrFormat, rate: float, clip: int
) -> float:
    """The threshold at which `rate` of the weights are outliers, on a sample of rows.

    Rows don't depend on each other, so one pass of the loop tries eight thresholds at once, on copies of the sample.
    A second pass narrows the bracket of the first; inside the last one the logarithms are interpolated.
    """
    block = fmt.row_block
    count = min(-(-_PROBE_ROWS // block), w.shape[0] // block)
    starts = (torch.arange(count) * (w.shape[0] // block) // count * block).tolist()
    rows = torch.cat([torch.arange(s, s + block) for s in starts]).to(w.device)
    sample, tolerance = w[rows].repeat(_PROBES, 1), scale[rows].repeat(_PROBES, 1)
    low, high = _LOWEST, _HIGHEST
    for _ in range(2):
        tried = torch.linspace(math.log(low), math.log(high), _PROBES).exp()
        factors = tried.repeat_interleave(rows.numel()).unsqueeze(1).to(w.device)
        _, _, outliers = _loop(sample, tolerance * factors, visit, upper, fmt, clip)
        rates = (outliers != 0).float().mean(1).view(_PROBES, -1).mean(1).tolist()
        above = sum(r > rate for r in rates)  # rates fall as thresholds grow
        if above in (0, _PROBES):
            return float(tried[0 if above == 0 else -1])
        low, high = float(tried[above - 1]), float(tried[above])
    more, fewer = rates[above - 1], max(rates[above], 1e-9)
    return float(low * (high / low) ** (math.log(more / rate) / math.log(more / fewer)))


plugin = Spqr
