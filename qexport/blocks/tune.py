"""Tuning: fit scales, codebooks and offsets of a layer to its output by gradient descent; codes stay as they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.blocks._descent import better, descend, held_out
from qexport.blocks.base import Outcome, Run
from qexport.errors import UsageError
from qexport.formats.base import Format


@dataclass(frozen=True)
class Tune:
    """Layer-wise tuning as VPTQ has it for codebooks (Liu et al., arXiv:2409.17066, section 3.4), for every format.

    Adam on all numbers that a format stores as floats, with steps in proportion to their mean size; see `_descent`.
    One sequence in eight, eight or nine at most, is held out; the outcome is kept only if it is better there.

    Attributes:
        steps: of Adam, one sequence each; 0 leaves everything as it is.
        rate: size of a step, relative to the mean size of entries of one kind; falls to 0 along a cosine.
    """

    source: ClassVar[str] = "Liu et al., VPTQ, arXiv:2409.17066, layer-wise finetuning"
    trains: ClassVar[str] = "numbers"

    steps: int = 0
    rate: float = 0.003

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 100_000:
            raise UsageError(f"tune: steps must be 0 to 100000, got {self.steps}.")
        if not 0 < self.rate <= 1:
            raise UsageError(f"tune: rate must be above 0 and at most 1, got {self.rate}.")

    @property
    def passes(self) -> float:
        """Sequences, forward and back; what is held out comes on top."""
        return float(self.steps)

    def reject(self, method: str, options: Mapping[str, Any], fmt: Format) -> str | None:
        """Whatever chose the codes, and whatever they mean."""
        return None

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
        return better(run, numbers, descend(run, numbers, seen, self.steps, self.rate, rng), stored, held)


plugin = Tune
