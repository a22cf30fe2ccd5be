"""GPTQ: round one column at a time and let the columns not yet rounded make up for its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.formats.base import Format, ScalarFormat
from qexport.methods._clip import fit_clipped, fit_effort
from qexport.methods._columns import (
    Visit,
    by_format,
    check_options,
    column_loop,
    factor,
    loop_effort,
    plan_visit,
    refuse_unless_scalar,
    result,
    scalar,
    stack,
    unstack,
)
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Hessian, Statistic


@dataclass(frozen=True)
class Gptq:
    """Frantar et al., GPTQ, arXiv:2210.17323, Algorithm 1.

    Our Hessian is half of theirs, which changes nothing, since `damp` is relative.

    The authors' code either goes left to right or sorts all columns by importance ("act-order"), which costs a gather
    of the input at run time. The default here visits whole groups by importance and the columns of a group by
    importance, and stores everything where it was: nearly the accuracy of the sort, at no run-time cost.

    Attributes:
        damp: fraction of the Hessian's mean diagonal added to its diagonal; raised tenfold while it can't be factored.
        order: `"group"`, `"act"` or `"none"`; see `plan_visit`.
        clip: as in RTN, with errors weighted by how much a column's error costs, 1 / U_jj^2.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Hessian})
    source: ClassVar[str] = "Frantar et al., GPTQ, arXiv:2210.17323, Algorithm 1"

    damp: float = 0.01
    order: str = "group"
    clip: int = 0

    def __post_init__(self) -> None:
        check_options("gptq", self.damp, self.order, self.clip)

    @property
    def permutes(self) -> bool:
        """Only the full sort stores columns in another order."""
        return self.order == "act"

    def reject(self, fmt: Format) -> str | None:
        """Any scalar grid will do."""
        return refuse_unless_scalar(fmt)

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """It keeps no outliers apart."""
        return dict.fromkeys(fmt.expected_extents(n, k), 0)

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """One column loop."""
        code = Effort(touched=8.0, calls=5.0)
        return loop_effort(n, k, scalar(fmt).group_size, fit=fit_effort(self.clip), code=code)

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
            fmts: any scalar grids.
            rng: not used.

        Raises:
            CalibrationError: the damped Hessian is not positive definite.

        Cost: O(n k^2) time; 8 k^2 bytes beside the inputs.
        """
        hessian = stats[Hessian]
        results: list[Result] = [Result({})] * len(weights)
        for fmt, members in by_format(fmts):
            visit = plan_visit(hessian.diagonal(), fmt.group_size, self.order)
            inverse = factor(hessian, visit, self.damp)
            w, ranges = stack([weights[i] for i in members], fmt.row_block)
            dead = visit.columns[inverse.dead]
            if dead.numel():
                w = w.clone()
                w[:, dead] = 0.0
            codes, params, _ = self._loop(w, visit, inverse.upper, fmt)
            raised = {} if inverse.damp == self.damp else {"damp": inverse.damp}
            for i, fields in zip(members, unstack(codes, params, ranges, fmt.row_block), strict=True):
                results[i] = result(fields, visit, dead_columns=float(dead.numel()), **raised)
        return results

    def _loop(
        self, w: Tensor, visit: Visit, upper: Tensor, fmt: ScalarFormat
    ) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
        stored = w[:, visit.columns] if visit.stored else w
        costs = upper.diagonal().square().reciprocal()
        natural = costs
        if not visit.stored:
            natural = torch.empty_like(costs)
            natural[visit.columns] = costs
        state = fmt.begin(stored, natural)
        first = {start: number for start, _, number in visit.groups}
        size = w.shape[1] if fmt.group_size == -1 else fmt.group_size

        def fit(part: Tensor, pivots: Tensor, step: int) -> dict[str, Tensor]:
            cost = pivots.square().reciprocal()
            return fit_clipped(part, cost, fmt, state, first[step] * size, self.clip)

        def code(column: Tensor, _pivot: Tensor, params: dict[str, Tensor], _step: int) -> tuple[Tensor, Tensor]:
            codes = fmt.nearest(column, params)
            return codes, fmt.value(codes, params)

        return column_loop(w, visit, upper, fit, code)


plugin = Gptq
