"""Gradient descent on what a layer is made of, judged by its output: what block methods have in common."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qexport.blocks.base import Outcome, Run

_LEAST = 1e-6

Pair = tuple[Tensor, Tensor]
"""Hidden states of one sequence that enter a layer, [1, L, d], and what the original makes of them."""


def held_out(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[list[Pair], list[Pair]]:
    """One sequence in eight, eight or nine at most, and the others."""
    pairs = list(_sequences(inputs, targets))
    stride = max(8, len(pairs) // 8)
    return pairs[::stride], [p for i, p in enumerate(pairs) if i % stride] or pairs


def descend(
    run: Run, numbers: Sequence[Tensor], seen: Sequence[Pair], steps: int, rate: float, rng: torch.Generator
) -> list[Tensor]:
    """Numbers after `steps` of Adam, one sequence each, in steps relative to the mean size of entries of one kind.

    The rate falls to 0 along a cosine. The loss is the squared error of the layer's output relative to each token's
    squared size, so that the few tokens with huge hidden states do not decide alone.
    """
    with torch.enable_grad():
        moves = [torch.zeros_like(p).requires_grad_() for p in numbers]
        optimizer = torch.optim.Adam(moves, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(seen), generator=rng).tolist()
            x, wanted = seen[order.pop()]
            loss = _loss(run(_moved(numbers, moves), x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [p.detach() for p in _moved(numbers, moves)]


def mean_loss(run: Run, numbers: Sequence[Tensor], pairs: Sequence[Pair]) -> float:
    """Mean over sequences of the loss that `descend` lowers."""
    with torch.no_grad():
        return sum(float(_loss(run(numbers, x), y)) for x, y in pairs) / len(pairs)


def better(
    run: Run,
    numbers: Sequence[Tensor],
    found: Sequence[Tensor],
    stored: Callable[[Sequence[Tensor]], list[Tensor]],
    held: Sequence[Pair],
) -> Outcome:
    """What was found, rounded to what can be stored, if it is better on sequences that were held out."""
    kept = stored(found)
    before, after = mean_loss(run, numbers, held), mean_loss(run, kept, held)
    return Outcome(kept, before, after) if after < before else Outcome(list(numbers), before, before)


def _sequences(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[Pair]:
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
