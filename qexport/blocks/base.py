"""The contract of a method that works on one decoder layer as a whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qexport.formats.base import Format

Run = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(numbers, hidden states [b, L, d]) -> the output of the layer whose weights these numbers make; differentiable."""


@dataclass(frozen=True)
class Outcome:
    """What became of a layer.

    Attributes:
        numbers: those to store.
        before: loss with the numbers that came in.
        after: loss with the numbers to store, never more than `before`.
    """

    numbers: list[Tensor]
    before: float
    after: float


class BlockMethod(Protocol):
    """A frozen dataclass whose fields are its hyperparameters."""

    source: ClassVar[str]
    trains: ClassVar[str]
    """`"numbers"`: those that a layer stores as floats, codes stay; `"weights"`: what codes are the nearest to."""

    def reject(self, method: str, options: Mapping[str, Any], fmt: Format) -> str | None:
        """Why it can't work on a linear that a method coded in a format, or None."""
        ...

    @property
    def passes(self) -> float:
        """How many sequences it runs through a layer, forward and back; 0: it does nothing."""
        ...

    def tune(
        self,
        run: Run,
        numbers: Sequence[Tensor],
        stored: Callable[[Sequence[Tensor]], list[Tensor]],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        rng: torch.Generator,
    ) -> Outcome:
        """Change the numbers of a layer so that its output comes closer to the original's.

        Args:
            run: the layer; weights are rounded in there, and let the gradient pass as if they were not.
            numbers: float32 tensors: scales, codebooks and the like, or weights; see `trains`.
            stored: rounds numbers to what can be stored; weights stay, for they are rounded anyway.
            inputs: hidden states that enter the layer, [b, L, d] each.
            targets: what the original layer makes of them.
            rng: for the order of sequences.
        """
        ...
