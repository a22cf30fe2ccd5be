"""The contract of a method that works on one decoder layer as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

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
        """Change the numbers that a layer stores as floats so that its output comes closer to the original's.

        Args:
            run: the layer.
            numbers: float32 tensors: scales, codebooks and the like.
            stored: rounds numbers to what can be stored.
            inputs: hidden states that enter the layer, [b, L, d] each.
            targets: what the original layer makes of them.
            rng: for the order of sequences.
        """
        ...
