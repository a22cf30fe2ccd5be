"""LKD: train the weights of a layer, rounded as they are, to give what the original layer gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.blocks._descent import better, descend, held_out, mean_loss
from qexport.blocks.base import Outcome, Run
from qexport.errors import UsageError
from qexport.formats.base import Format, ScalarGrid

_SHORT = 8  # a trial of a rate takes one in so many of the steps
_JUDGES = 4  # sequences that trials are compared on


@dataclass(frozen=True)
class Lkd:
    """Layer-by-layer distillation of Yao et al., ZeroQuant, arXiv:2206.01861, section 4.3.

    The layer's weights are trained through the rounding as if it was the identity. Inputs are the hidden states as the
    layers before leave them, quantized; targets are what the original layer makes of the same. Different from the
    paper: Adam steps are relative to the size of weights, each layer tries three rates for a short while and takes the
    best (one rate for all is reported not to work, and at 135 million parameters did not), and the outcome is kept only
    if it is better on sequences that were held out.

    Attributes:
        lkd: do it at all.
        steps: of Adam, one sequence each.
        rate: the middle one of the three that are tried, relative to the mean size of weights that share a column;
            the others are a third and three times as much.
    """

    source: ClassVar[str] = "Yao et al., ZeroQuant, arXiv:2206.01861, section 4.3"
    trains: ClassVar[str] = "weights"

    lkd: bool = True
    steps: int = 96
    rate: float = 0.003

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000:
            raise UsageError(f"lkd: steps must be 1 to 100000, got {self.steps}.")
        if not 0 < self.rate <= 0.3:
            raise UsageError(f"lkd: rate must be above 0 and at most 0.3, got {self.rate}.")

    def reject(self, method: str, options: Mapping[str, Any], fmt: Format) -> str | None:
        """Weights go to the nearest value of a grid, whatever else a method would choose."""
        if not self.lkd:
            return None
        if method != "rtn" or options.get("clip"):
            chosen = f"method {method!r}{' with a clip search' if options.get('clip') else ''}"
            return f"it rounds the weights that it trains to nearest, and {chosen} does otherwise"
        return None if isinstance(fmt, ScalarGrid) else "it rounds weights one by one, and this codes vectors"

    @property
    def passes(self) -> float:
        """Sequences, forward and back, trials too; what is held out comes on top."""
        return self.steps + 3.0 * self._short if self.lkd else 0.0

    @property
    def _short(self) -> int:
        return -(-self.steps // _SHORT)

    def tune(
        self,
        run: Run,
        numbers: Sequence[Tensor],
        stored: Callable[[Sequence[Tensor]], list[Tensor]],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        rng: torch.Generator,
    ) -> Outcome:
        """See `BlockMethod.tune`."""
        held, seen = held_out(inputs, targets)
        start = rng.get_state()

        def reached(rate: float) -> float:
            found = descend(run, numbers, seen, self._short, rate, rng.set_state(start))
            return mean_loss(run, found, seen[:_JUDGES])

        best = min((self.rate / 3, self.rate, self.rate * 3), key=reached)
        return better(run, numbers, descend(run, numbers, seen, self.steps, best, rng), stored, held)


plugin = Lkd
