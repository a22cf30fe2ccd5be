"""SmoothQuant: divide features with large values by factors that the weights take over, so that rows round better."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qexport.errors import UsageError
from qexport.formats.base import Format, ScalarGrid
from qexport.formats.specs import InputSpec
from qexport.statistics import FeatureRange, Statistic
from qexport.transforms.base import Change, Site, tied_max

_LEAST = 1e-5
_TRIED = tuple(a / 100 for a in range(35, 95, 5))


@dataclass(frozen=True)
class SmoothQuant:
    """Xiao et al., SmoothQuant, arXiv:2211.10438: scale_j = max |x_j|^alpha / max |w_j|^(1 - alpha).

    The maximum of |w_j| is taken over all linears that share the input, that of |x_j| over the calibration tokens. The
    authors scale what norms give; here every input is scaled, in its producer where that can be done.

    Attributes:
        alpha: how much of the difficulty moves from the input to the weights, 0 to 1; `"auto"`: the one of 0.35, 0.40
            ... 0.90 with which the outputs of all decoder layers change least over a few sequences.
    """

    source: ClassVar[str] = "Xiao et al., SmoothQuant, arXiv:2211.10438"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({FeatureRange})
    steps: ClassVar[InputSpec] = InputSpec(scale=True)
    turns: ClassVar[bool] = False
    trials: ClassVar[int] = 0

    alpha: float | str = 0.5

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool) and 0 <= self.alpha <= 1
        if not (number or self.alpha == "auto"):
            raise UsageError(f"transform 'smoothquant': alpha must be 0 to 1 or auto, got {self.alpha!r}.")

    @property
    def variants(self) -> tuple["SmoothQuant", ...]:
        """One for each alpha that the model is tried with."""
        return tuple(SmoothQuant(alpha) for alpha in _TRIED) if self.alpha == "auto" else ()

    @property
    def judges(self) -> int:
        """More than one where alphas are compared: their losses are close."""
        return 4 if isinstance(self.alpha, str) else 1

    def reject(self, fmt: Format) -> str | None:
        """The search rounds weights one by one."""
        if not isinstance(self.alpha, str) or isinstance(fmt, ScalarGrid):
            return None
        return "its search rounds weights one by one, and this codes vectors"

    def decide(self, site: Site) -> Change:
        """The scale, positive float32 [k]."""
        low, high = site.stats[FeatureRange]
        x = tied_max(torch.maximum(high, -low), site.ties).clamp(min=_LEAST)
        w = tied_max(torch.cat([w.abs() for w in site.weights]).amax(0), site.ties).clamp(min=_LEAST)
        assert not isinstance(self.alpha, str), "one of its variants decides"
        return Change(scale=(x**self.alpha / w ** (1 - self.alpha)).clamp(min=_LEAST))


plugin = SmoothQuant
