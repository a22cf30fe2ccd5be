"""Where a factor of a linear's input can go instead: into the norm or the linear that the input comes from.

Found by trying it out on one decoder layer with random weights; what is listed here leaves the layer's output as it
was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexport.models.parts import Anatomy, LinearGroup
from qexport.models.probe import CLOSE, Probe, probes
from qexport.models.source import Source


@dataclass(frozen=True, eq=False)
class Fold:
    """Dividing the producer's output by a positive factor for each feature divides the input of some linears by them.

    Attributes:
        producer: path of the module.
        linear: it is one of the layer's linears: its rows and its bias are divided; otherwise a norm's gain and bias.
        unit: what a norm adds to its stored gain before it multiplies (Gemma's add 1).
        features: int64 [k], the producer's output feature that each input feature comes from. Several may come from
            one, as where query heads share a value head.
    """

    producer: str
    linear: bool
    unit: float
    features: Tensor


def find_folds(source: Source, anatomy: Anatomy) -> Mapping[str, Fold]:
    """Folds by the name of the first linear of the group whose input they scale; groups that are not here have none.

    Layers of one structure are tried once. Takes one layer of memory, in float64.
    """
    found: dict[str, Fold] = {}
    for blocks, probe in probes(source, anatomy):
        for number, fold in layer_folds(probe).items():
            for block in blocks:
                own = replace(fold, producer=f"{block.name}.{fold.producer}")
                found[block.groups[number].members[0].name] = own
    return found


def layer_folds(probe: Probe) -> dict[int, Fold]:
    """Folds by the number of the group, producers as paths inside the layer."""
    try:
        base, inputs, outputs = probe.run()
    except Exception:  # noqa: BLE001  the code of any model, on weights that it was not made for
        return {}
    out: dict[int, Fold] = {}
    for number, group in enumerate(probe.block.groups):
        for fold in _candidates(probe, number, inputs, outputs):
            if _holds(probe, group, fold, base):
                out[number] = fold
                break
    return out


def _candidates(probe: Probe, number: int, inputs: list[Tensor | None], outputs: Mapping[str, Any]) -> Iterator[Fold]:
    """What may produce a group's input: a norm whose very output it is, or a linear that scales it."""
    x = inputs[number]
    if x is None:
        return
    for name, out in outputs.items():
        if out is x:
            for unit in (0.0, 1.0):
                yield Fold(name, False, unit, torch.arange(x.shape[-1]))
    for name in [probe.linears[v.name] for g in probe.block.groups[:number] for v in g.members]:
        width = _width(probe.module.get_submodule(name))
        factors = 1 + torch.randperm(width, generator=probe.rng).double() / width
        seen = probe.run(scaled=name, factors=factors)[1][number]
        features = None if seen is None else _features(x, seen, factors)
        if features is not None:
            yield Fold(name, True, 0.0, features)


def _holds(probe: Probe, group: LinearGroup, fold: Fold, base: Tensor) -> bool:
    """Whether the layer's output stays the same when a fold is made."""
    factors = torch.rand(int(fold.features.max()) + 1, dtype=torch.float64, generator=probe.rng) + 0.5
    if fold.linear and factors.numel() != _width(probe.module.get_submodule(fold.producer)):
        return False
    with probe.changed() as module:
        producer: Any = module.get_submodule(fold.producer)
        if fold.linear:
            rows = 0 if isinstance(producer, nn.Linear) else 1
            producer.weight.div_(factors.unsqueeze(1 - rows))
        else:
            producer.weight.copy_((producer.weight + fold.unit) / factors - fold.unit)
        if getattr(producer, "bias", None) is not None:
            producer.bias.div_(factors)
        for view in group.members:
            weight = module.get_submodule(probe.linears[view.name]).get_parameter("weight")
            across = factors[fold.features]
            weight.mul_(across.unsqueeze(1) if view.transposed else across)
        y = probe.run()[0]
    return bool((y - base).abs().max() < CLOSE * base.abs().max())


def _features(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """Which factor each feature was multiplied by; None unless that is one and the same for all tokens."""
    ratio = (after / before).flatten(0, -2)  # 0 / 0 is NaN: an activation may have taken the feature of some tokens
    mean = ratio.nanmedian(0).values
    if torch.isnan(mean).any() or not ((ratio - mean).abs().nan_to_num(0) < CLOSE).all():
        return None
    found = (mean.unsqueeze(1) - factors).abs().min(1)
    return found.indices if float(found.values.max()) < 0.2 / factors.numel() else None


def _width(linear: nn.Module) -> int:
    weight = linear.get_parameter("weight")
    return weight.shape[0 if isinstance(linear, nn.Linear) else 1]
