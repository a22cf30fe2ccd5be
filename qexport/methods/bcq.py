"""BCQ: choose signs and their sizes in turn, for the weights as they are or with the layer's input in mind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import Format, ScalarFormat
from qexport.formats.bcq import EARLY
from qexport.formats.bcq import Bcq as BcqFormat
from qexport.methods._columns import check_options, loop_effort, solve
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Hessian, Statistic


@dataclass(frozen=True)
class Bcq:
    """Xu et al., Alternating multi-bit quantization, arXiv:1802.00150, as LUT-GEMM (arXiv:2206.09557) uses it.

    The papers fit each group of weights as it is. Three things are added, each an option: a constant in the least
    squares (an option of the format), errors weighted by what they cost at the layer's output, and error feedback over
    columns as in GPTQ, each group fitted when it is entered, to weights that carry the earlier errors.

    Attributes:
        rounds: 0 keeps the greedy start, 1 refines it once, more alternate.
        evenly: also starts from evenly spaced levels; each row of a group keeps the better result. Papers don't.
        weighted: weighs squared errors by the Hessian's diagonal; with feedback, by 1 / U_jj^2 as the loop counts them.
        feedback: moves each column's error onto the columns not yet coded.
        damp: as in GPTQ.
        order: as in GPTQ.
    """

    source: ClassVar[str] = "Xu et al., arXiv:1802.00150; Park et al., LUT-GEMM, arXiv:2206.09557"

    rounds: int = 15
    evenly: bool = True
    weighted: bool = True
    feedback: bool = True
    damp: float = 0.01
    order: str = "group"

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= 1000:
            raise UsageError(f"method 'bcq': rounds must be 0 to 1000, got {self.rounds}.")
        check_options("bcq", self.damp, self.order, 0)
        if self.order == "act" and not self.feedback:
            raise UsageError("method 'bcq': order act sorts columns for feedback; without it use order=group.")

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Hessian, unless weights are fitted as they are."""
        return frozenset({Hessian}) if self.weighted or self.feedback else frozenset()

    @property
    def permutes(self) -> bool:
        """Only the full sort stores columns in another order."""
        return self.order == "act"

    def reject(self, fmt: Format) -> str | None:
        """Only bit planes will do."""
        return None if isinstance(fmt, BcqFormat) else "it chooses signs for bit planes, which this format has not"

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """It keeps no outliers apart."""
        return {}

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """Rounds of assignment and least squares for each group, and the loop."""
        assert isinstance(fmt, BcqFormat)
        bits, size = fmt.bits, k if fmt.group_size == -1 else fmt.group_size
        turns = self.rounds + 0.7 + self.evenly * (min(self.rounds, EARLY) + 0.7)
        fit = Effort(touched=turns * (4 + 50 * 2**bits / size), calls=turns * (11 * bits**2 + 10 * bits + 30))
        # The search for a weight's level and the sums by code take as long as so many multiplications.
        searched = Effort(flops=800 * bits * turns * n * k)
        if self.feedback:
            return searched + loop_effort(n, k, fmt.group_size, fit=fit, code=Effort(touched=6.0, calls=4.0))
        return searched + Effort(touched=n * k * fit.touched, calls=-(-k // size) * fit.calls)

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """One linear, float32 [n, k]."""
        return self.quantize_group([w], stats, [fmt], rng)[0]

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Linears that share an input.

        Args:
            weights: float32 [n_i, k].
            stats: `Hessian`, float32 [k, k], if it is needed.
            fmts: `bcq` formats.
            rng: not used.

        Raises:
            CalibrationError: the damped Hessian is not positive definite.
        """
        if self.feedback:
            return solve(weights, stats[Hessian], fmts, damp=self.damp, order=self.order, fit=self._fit)
        diagonal = stats[Hessian].diagonal() if self.weighted else None
        return [self._alone(w, diagonal, fmt) for w, fmt in zip(weights, fmts, strict=True)]

    def _fit(self, fmt: ScalarFormat, w: Tensor, cost: Tensor, state: object, j0: int) -> dict[str, Tensor]:
        assert isinstance(fmt, BcqFormat)
        return fmt.alternated(w, cost if self.weighted else None, self.rounds, evenly=self.evenly)

    def _alone(self, w: Tensor, diagonal: Tensor | None, fmt: Format) -> Result:
        assert isinstance(fmt, BcqFormat)
        size = w.shape[1] if fmt.group_size == -1 else fmt.group_size
        codes, params = [], []
        for j in range(0, w.shape[1], size):
            part = w[:, j : j + size]
            weight = None if diagonal is None else diagonal[j : j + size].clamp(min=1e-8 * float(diagonal.max()) or 1.0)
            params.append(fmt.alternated(part, weight, self.rounds, evenly=self.evenly))
            codes.append(fmt.nearest(part, params[-1]))
        kept = [name for name in params[0] if not name.startswith("_")]
        return Result({"codes": torch.cat(codes, 1), **{p: torch.cat([q[p] for q in params], 1) for p in kept}})


plugin = Bcq
