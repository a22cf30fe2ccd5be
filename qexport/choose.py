"""What transforms search for the whole model, settled before the first layer is packed.

Every way to take one variant of each transform is tried on every layer in turn: all its linears rounded to nearest,
their inputs rounded as they will be, on hidden states of the model as it is. The way with the least error over all
layers is taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qexport.collect import Collected, collect, judges
from qexport.events import Advanced, Observer, Started
from qexport.formats.base import rounded
from qexport.layer import Layer, Trial, Tried
from qexport.models import Block, Skeleton, Source
from qexport.plan import Plan
from qexport.transforms.base import Transform

CHOICE_FILE = "choice.json"

Way: TypeAlias = Mapping[str, Transform]


def candidates(transforms: Way) -> list[Way]:
    """Every way to take one variant of each transform; a transform without variants stands for itself."""
    found = product(*(t.variants or (t,) for t in transforms.values()))
    return [dict(zip(transforms, own, strict=True)) for own in found]


def as_json(way: Way) -> list[dict[str, Any]]:
    """Names and options, as a plan gives them."""
    return [{"name": name, **asdict(t)} for name, t in way.items()]  # type: ignore[call-overload]


def described(way: Way) -> str:
    """One way in words: `smoothquant with alpha 0.7`."""
    parts = [(entry.pop("name"), entry) for entry in as_json(way)]
    return ", ".join(f"{name} with {', '.join(f'{k} {v}' for k, v in own.items())}" for name, own in parts)


def total_errors(
    plan: Plan, source: Source, bones: Skeleton, hidden: Sequence[Tensor], device: torch.device, observer: Observer
) -> list[float]:
    """The error of each candidate: the squared change of a layer's output over what it adds, summed over the layers.

    Args:
        plan: what is done; its transforms have variants.
        source: of the weights.
        bones: of the model.
        hidden: states that enter the first layer, [b, L, d] each; they are left as they are.
        device: where to compute.
        observer: is told of progress.
    """
    ways, blocks = candidates(plan.transforms), plan.anatomy.blocks
    totals = [0.0] * len(ways)
    hidden = list(hidden)
    observer(Started("choose", len(blocks), "layer"))
    with torch.no_grad():
        for index, block in enumerate(blocks):
            stats = collect(plan, bones, index, block, hidden, device, observer)
            trial = Trial(bones, index, judges(plan, hidden).to(device))
            for number, way in enumerate(ways):
                own = Layer(replace(plan, transforms=way), source, device)
                totals[number] += trial.error(_tried(own, block, stats, trial)) / trial.added
            module = bones.block(index)
            for i, part in enumerate(hidden):
                hidden[i] = bones.run(index, module, part.to(device)).cpu()
            observer(Advanced("choose", index + 1, block.name))
    return totals


def _tried(own: Layer, block: Block, stats: Collected, trial: Trial) -> Iterator[Tried]:
    """A layer's linears as the transforms of a plan leave them, rounded to nearest."""
    modules = own.plan.modules
    decided = []
    for group in block.groups:
        members = [modules[v.name] for v in group.members if v.name in modules]
        if members:
            found = stats.get(group, {})
            rng = torch.Generator().manual_seed(own.plan.seed)
            decided.append((members, found, own.decided(members, found, partial(trial.loss, members, found), rng)))
    for members, found, change in decided:
        weights = [change.weight(own.weight(m.view)) for m in members]
        coded = [rounded(m.spec.weight.resolve(w), w) for m, w in zip(members, weights, strict=True)]  # type: ignore[arg-type]
        yield members, found, coded, change
