"""GPTQ: round one column at a time and let the columns not yet rounded make up for its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.formats.base import Format, ScalarFormat
from qexport.methods._clip import fit_clipped, fit_effort
from qexport.methods._columns import check_options, loop_effort, refuse_unless_scalar, scalar, solve
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

        def fit(fmt: ScalarFormat, w: Tensor, cost: Tensor, state: object, j0: int) -> dict[str, Tensor]:
            return fit_clipped(w, cost, fmt, state, j0, self.clip)

        return solve(weights, stats[Hessian], fmts, damp=self.damp, order=self.order, fit=fit)


plugin = Gptq
