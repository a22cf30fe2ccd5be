"""Tuning: fit scales, codebooks and offsets of a layer to its output by gradient descent; codes stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.blocks.base import Outcome, Run
from qexport.errors import UsageError

_LEAST = 1e-6


@dataclass(frozen=True)
class Tune:
    """Layer-wise tuning as VPTQ has it for codebooks (Liu et al., arXiv:2409.17066, section 3.4), for every format.

    Adam on all numbers that a format stores as floats, with steps in proportion to their mean size. The loss is the
    squared error of the layer's output relative to each token's squared size, so that the few tokens with huge
    hidden states do not decide alone. One sequence in eight, eight or nine at most, is held out; the outcome is
    kept only if it is better there.

    Attributes:
        steps: of Adam, one sequence each; 0 leaves everything as it is.
        rate: size of a step, relative to the mean size of entries of one kind; falls to 0 along a cosine.
    """

    source: ClassVar[str] = "Liu et al., VPTQ, arXiv:2409.17066, layer-wise finetuning"

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
        pairs = list(_sequences(inputs, targets))
        stride = max(8, len(pairs) // 8)
        held, seen = pairs[::stride], [p for i, p in enumerate(pairs) if i % stride] or pairs
        before = _mean_loss(run, numbers, held)
        with torch.enable_grad():
            moves = [torch.zeros_like(p).requires_grad_() for p in numbers]
            optimizer = torch.optim.Adam(moves, lr=self.rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
            order: list[int] = []
            for _ in range(self.steps):
                order = order or torch.randperm(len(seen), generator=rng).tolist()
                x, wanted = seen[order.pop()]
                loss = _loss(run(_moved(numbers, moves), x), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        found = stored([p.detach() for p in _moved(numbers, moves)])
        after = _mean_loss(run, found, held)
        return Outcome(found, before, after) if after < before else Outcome(list(numbers), before, before)


def _sequences(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in zip(inputs, targets, strict=True):
        yield from zip(x.split(1), y.split(1), strict=True)


def _moved(numbers: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    """Numbers after moves that are relative to the mean size of the entries that share a place on the last axis."""
    out = []
    for p, move in zip(numbers, moves, strict=True):
        size = p.abs().flatten(0, -2).mean(0) if p.ndim > 1 else p.abs().mean()
        out.append(p + size.clamp(min=_LEAST) * move)
    return out


def _loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2."""
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=_LEAST)).mean()


def _mean_loss(run: Run, numbers: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(_loss(run(numbers, x), y)) for x, y in pairs) / len(pairs)


plugin = Tune
