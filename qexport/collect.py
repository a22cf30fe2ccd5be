"""What flows into the linears of a decoder layer: statistics of all of it, and a few sequences to try changes on."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qexport.errors import CalibrationError
from qexport.events import Note, Observer
from qexport.models import Block, LinearGroup, Skeleton
from qexport.plan import Plan, micro_batch
from qexport.statistics import Statistic

_WORST_LOSS = 0.1

Collected: TypeAlias = dict[LinearGroup, dict[type[Statistic], Tensor]]


def collect(
    plan: Plan,
    bones: Skeleton,
    index: int,
    block: Block,
    hidden: Sequence[Tensor],
    device: torch.device,
    observer: Observer,
) -> Collected:
    """Run a layer on all hidden states and collect what its methods and transforms need.

    Args:
        plan: what is done.
        bones: of the model.
        index: of the layer.
        block: the layer.
        hidden: states that enter it, [b, L, d] each.
        device: where it runs.
        observer: is told of rows that hold no numbers.

    Raises:
        CalibrationError: too many such rows, or none at all; names the linear.
    """
    module = bones.block(index)
    collectors: dict[LinearGroup, list[Statistic]] = {}
    hooks, screens = [], []
    for group in block.groups:
        kinds = plan.needs(group)
        if kinds:
            k = group.members[0].k
            collectors[group] = [kind(k) for kind in sorted(kinds, key=lambda kind: kind.__name__)]
            screen = Screen(group.members[0].name, collectors[group])
            screens.append(screen)
            linear = bones.submodule(index, module, group.members[0])
            hooks.append(linear.register_forward_pre_hook(screen))
    try:
        for part in hidden:
            bones.run(index, module, part.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    for screen in screens:
        screen.report(observer)
    return {group: {type(c): c.result() for c in found} for group, found in collectors.items()}


def judges(plan: Plan, hidden: Sequence[Tensor]) -> Tensor:
    """Hidden states [b, L, d] of the sequences that transforms try changes on, spread over all of them."""
    ends = list(accumulate(part.shape[0] for part in hidden))
    wanted = max(t.judges for t in plan.transforms.values())
    count = min(wanted, micro_batch(plan), ends[-1])
    places = [i * ends[-1] // count for i in range(count)]
    return torch.stack([hidden[bisect(ends, i)][i - ends[bisect(ends, i)]] for i in places])


class Screen:
    """A forward hook that drops rows with NaN or infinity, counts them and hands on the others."""

    def __init__(self, name: str, collectors: list[Statistic]) -> None:
        self.name, self.collectors = name, collectors
        self.rows = self.dropped = 0

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """As the hook of a linear."""
        self.take(args[0])

    def take(self, x: Tensor) -> None:
        """Hand rows [.., k] to the collectors."""
        x = x.reshape(-1, x.shape[-1])
        self.rows += x.shape[0]
        if not torch.isfinite(x.sum()):
            finite = torch.isfinite(x).all(1)
            self.dropped += int((~finite).sum())
            x = x[finite]
        for collector in self.collectors:
            collector.update(x)

    def report(self, observer: Observer) -> None:
        """Tell of dropped rows; more than 10 %, or no rows at all, are a `CalibrationError`."""
        if not self.rows:
            raise CalibrationError(
                f"{self.name}: no calibration row went through it: the model does not call it as a linear. "
                f"Leave it dense, --ignore '{self.name}', or round it to nearest, --set '{self.name}:method=rtn'."
            )
        if not self.dropped:
            return
        text = f"{self.name}: {self.dropped} of {self.rows} calibration rows hold NaN or infinity"
        if self.dropped > _WORST_LOSS * self.rows:
            raise CalibrationError(f"{text}; more than 10 % can't be trusted. Try --dtype float32 or other text.")
        observer(Note(f"{text} and were dropped", "warning"))
