"""The weights of one decoder layer as its transforms leave them, and what else of the layer they change.

A transform decides on the model's own weights. Its scale then goes into the producer of the input where the plan has a
fold for it: the producer's rows or gain are divided, once and for all, and the linears' columns multiplied. Otherwise
the linears treat their input themselves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qexport.blocks.base import BlockMethod
from qexport.formats.base import rounded
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.methods.rtn import Rtn
from qexport.models import Fold, Skeleton, Source, WeightView
from qexport.plan import ModulePlan, Plan, transforms_of
from qexport.schema import Tensors
from qexport.statistics import FeatureRange, Statistic
from qexport.transforms.base import Change, Site

Loss = Callable[[Sequence[Tensor], Change], float]
"""(weights W', change of their input) -> mean squared change of the layer's output; see `Site`."""
Found = dict[type[Statistic], Tensor]
Tried = tuple[Sequence[ModulePlan], Found, Sequence[Tensor], Change]
"""Linears that share an input, its statistics as the model has it, W' [n_i, k] for the changed input, the change."""


@dataclass
class Layer:
    """Weights of one layer.

    Attributes:
        plan: what is done.
        source: of the weights.
        device: where they are wanted.
        rows: factors of the rows of linears that produce a scaled input, by module, float32 [n].
        columns: factors of columns whose scale was folded, by module, float32 [k].
        dense: tensors that stay dense and were changed, by state-dict name, in their stored dtype.
    """

    plan: Plan
    source: Source
    device: torch.device

    def __post_init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}

    def weight(self, view: WeightView) -> Tensor:
        """A weight as it is to be quantized, up to what happens to its input when it runs; float32 [n, k]."""
        w = self.source.view(view).to(self.device)
        if view.name in self.rows:
            w = w * self.rows[view.name].unsqueeze(1)
        return w * self.columns[view.name] if view.name in self.columns else w

    def transform(
        self, members: Sequence[ModulePlan], stats: Found, loss: Loss, rng: torch.Generator
    ) -> tuple[Found, Change]:
        """Decide on linears that share an input, and fold what can be folded.

        Args:
            members: all that is quantized of the linears.
            stats: of their input, as the model has it.
            loss: see `Site`.
            rng: for whatever is random.

        Returns:
            The statistics of the input that they get from now on, and what they do to it when they run.
        """
        fold, change = self.plan.folds.get(members[0].view.name), self.decided(members, stats, loss, rng)
        if fold is None or change.scale is None:
            return stats, change
        folded = Change(scale=self._fold(fold, change.scale))
        for member in members:
            self.columns[member.view.name] = folded.scale  # type: ignore[assignment]
        return folded.statistics(stats), Change(signs=change.signs)

    def decided(self, members: Sequence[ModulePlan], stats: Found, loss: Loss, rng: torch.Generator) -> Change:
        """What the transforms do to the input of linears that share it, before any of it is folded."""
        fold = self.plan.folds.get(members[0].view.name)
        views, fmts = [m.view for m in members], [m.spec.weight for m in members]
        change = Change()
        for transform in transforms_of(views[0], self.plan.transforms, self.plan.stream).values():
            weights = [change.weight(self.source.view(v).to(self.device)) for v in views]
            ties = None if fold is None else fold.features.to(self.device)
            site = Site(weights, fmts, change.statistics(stats), ties, _after(change, loss), rng)
            change = change.then(transform.decide(site))
        return change

    def _fold(self, fold: Fold, scale: Tensor) -> Tensor:
        """Divide a producer's output by a scale [k]; returns the scale that its stored values amount to."""
        features = fold.features.to(scale.device)
        own = torch.ones(int(features.max()) + 1, device=scale.device)
        own[features] = scale
        weight, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
        if fold.linear:
            self.rows[fold.producer] = own.reciprocal()
        else:
            # What rounding the gain to its stored dtype does to it, the scale of the columns takes back.
            gain = self._dense(weight).float().to(own.device) + fold.unit
            stored = (gain / own - fold.unit).to(self.source.meta(weight)[0])
            reached = stored.float() + fold.unit
            own = torch.where(reached == 0, torch.ones_like(own), gain / reached)
            self.dense[weight] = stored.cpu()
        if bias in self.plan.anatomy.parameters:
            self.dense[bias] = (self._dense(bias).float().to(own.device) / own).to(self.source.meta(bias)[0]).cpu()
        return own[features]

    def _dense(self, name: str) -> Tensor:
        return self.dense[name] if name in self.dense else self.source.read(name)


# ---- trying other weights ----------------------------------------------------------------------


class Trial:
    """A decoder layer and a few hidden states, to see what other weights would do to its output.

    Args:
        bones: of the model.
        index: of the layer.
        hidden: [b, L, d].
    """

    def __init__(self, bones: Skeleton, index: int, hidden: Tensor) -> None:
        self.bones, self.index, self.hidden = bones, index, hidden
        self.module = bones.block(index)
        self.wanted = bones.run(index, self.module, hidden)

    @property
    def added(self) -> float:
        """Mean square of what the layer adds to the hidden states."""
        return float((self.wanted - self.hidden).float().square().mean())

    def loss(self, members: Sequence[ModulePlan], stats: Found, weights: Sequence[Tensor], change: Change) -> float:
        """The error when only linears that share an input have other weights; the arguments are those of `Tried`."""
        return self.error([(members, stats, weights, change)])

    def error(self, tried: Iterable[Tried]) -> float:
        """Mean squared change of the layer's output when linears have other weights, and round their input."""
        kept: list[tuple[ModulePlan, Tensor]] = []
        hooks: list[RemovableHandle] = []
        for members, stats, weights, change in tried:
            for member, w in zip(members, weights, strict=True):
                linear = self.bones.submodule(self.index, self.module, member.view)
                kept.append((member, linear.get_parameter("weight").clone()))
                steps, tensors = _treatment(member, stats, change)
                self.bones.put(self.index, self.module, member.view, steps.undone(w, tensors))
                hooks += rounding(linear, steps, tensors)
        found = self.bones.run(self.index, self.module, self.hidden)
        for hook in hooks:
            hook.remove()
        for member, w in kept:
            self.bones.put(self.index, self.module, member.view, w.T if member.view.transposed else w)
        return float((found - self.wanted).float().square().mean())


def output_change(
    x: Tensor, w: Tensor, member: ModulePlan, stats: Found, weights: Sequence[Tensor], change: Change
) -> float:
    """Mean squared change of one linear's output for rows x when it has another weight; see `Trial.loss`."""
    steps, tensors = _treatment(member, stats, change)
    found = steps.rounded(x, tensors) @ steps.undone(weights[0], tensors).T
    return float((found - x @ w.T).square().mean())


def no_loss(_weights: Sequence[Tensor], _change: Change) -> float:
    """Of linears that no calibration data reaches: no transform that asks for it may see them."""
    raise AssertionError("a transform asked for a loss where there is no data")


def _after(change: Change, loss: Loss) -> Loss:
    """The loss for what is changed further."""
    return lambda weights, later: loss(weights, change.then(later))


def _treatment(member: ModulePlan, stats: Found, change: Change) -> tuple[InputSpec, Tensors]:
    """What a linear would do to its input after a change, and the tensors that this takes."""
    steps = InputSpec(change.scale is not None, change.signs is not None, quant=member.spec.input.quant)
    return steps, steps.pack({**change.stored, **calibrated(member, change.statistics(stats))})


def calibrated(member: ModulePlan, stats: Found, perm: Tensor | None = None) -> dict[str, Tensor]:
    """What the rounding of a linear's input stores.

    Args:
        member: the linear.
        stats: of what is rounded, in the order of the input features.
        perm: int64 [k], the feature that each stored column meets; None: the same.
    """
    quant = member.spec.input.quant
    if quant is None or not quant.calibrated:
        return {}
    low, high = stats[FeatureRange]
    return quant.calibrate(low, high) if perm is None else quant.calibrate(low[perm], high[perm])


def rounding(linear: nn.Module, steps: InputSpec, tensors: Tensors) -> list[RemovableHandle]:
    """Make a linear that has its decoded weight round its input as the packed one does; the hook, if there is one."""
    if steps.quant is None:
        return []

    def rounded(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (steps.rounded(args[0], tensors), *args[1:])

    return [linear.register_forward_pre_hook(rounded)]


# ---- tuning ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """What a method decided for one linear, not packed yet.

    Attributes:
        planned: the linear.
        spec: what it stores.
        fields: of the format.
        inputs: of the treatment of its input; see `InputSpec.pack`.
        w: the weight that was coded, float32 [n, k], up to what happens to its input when it runs.
        hessian: of the input that w meets, float32 [k, k]; None without data.
        facts: numbers for the report.
    """

    planned: ModulePlan
    spec: LinearSpec
    fields: Tensors
    inputs: Tensors
    w: Tensor
    hessian: Tensor | None
    facts: Mapping[str, float]

    @property
    def floats(self) -> list[str]:
        """Names of the fields that are stored as floats just as they are."""
        layout = self.spec.weight.layout(self.planned.view.n, self.planned.view.k)
        return [
            name
            for name, field in layout.items()
            if field.dtype.is_floating_point
            and name in self.fields
            and len(field.shape) == self.fields[name].ndim
            and all(isinstance(a, str) or a == b for a, b in zip(field.shape, self.fields[name].shape, strict=True))
            and self.fields[name].numel()
        ]

    def decoded(self, numbers: Tensors) -> Tensor:
        """The weight with other numbers in some fields, differentiable in them; float32 [n, k]."""
        w = self.spec.weight.decode({**self.fields, **numbers})
        return self.spec.input.undone(w, self.spec.input.pack(self.inputs))

    def stored(self, numbers: Tensors) -> "Solved":
        """The same with other numbers in some fields, rounded to what can be stored."""
        fmt, view = self.spec.weight, self.planned.view
        return replace(self, fields=fmt.unpack(fmt.pack({**self.fields, **numbers}), view.n, view.k))

    def rounded(self, w: Tensor) -> Tensor:
        """Another weight [n, k] as it comes back when it is rounded to nearest; the gradient passes unchanged."""
        with torch.no_grad():
            tensors = self.spec.input.pack(self.inputs)
            met = self.spec.input.met(w, tensors)
            found = self.spec.input.undone(rounded(self.spec.weight.resolve(met), met), tensors)  # type: ignore[arg-type]
        return w + (found - w).detach()

    def renewed(self, w: Tensor) -> "Solved":
        """The same for another weight [n, k], rounded to nearest."""
        met = self.spec.input.met(w, self.spec.input.pack(self.inputs))
        fmt = self.spec.weight.resolve(met)
        fields = Rtn().quantize(met, {}, fmt, torch.Generator()).fields
        return replace(self, spec=replace(self.spec, weight=fmt), fields=fields)


def tuned(
    block: BlockMethod,
    bones: Skeleton,
    index: int,
    solved: Sequence[Solved],
    dense: Tensors,
    hidden: Sequence[Tensor],
    rng: torch.Generator,
) -> list[Solved]:
    """A layer's linears after a block method has worked on the numbers that they store as floats.

    Args:
        block: the method.
        bones: of the model.
        index: of the layer.
        solved: its linears.
        dense: other tensors of the layer that were changed.
        hidden: states that enter the layer, [b, L, d] each.
        rng: for whatever is random.
    """
    device = solved[0].w.device
    module = bones.block(index)
    targets = [bones.run(index, module, part.to(device)).cpu() for part in hidden]
    for name, tensor in dense.items():
        bones.put_tensor(index, module, name, tensor)
    members = [s for s in solved if s.planned.view.index is None]
    linears = [bones.submodule(index, module, s.planned.view) for s in members]
    for s, linear in zip(members, linears, strict=True):
        rounding(linear, s.spec.input, s.spec.input.pack(s.inputs))
    dtypes = [linear._parameters.pop("weight").dtype for linear in linears]  # type: ignore[union-attr]

    codec = _Weights(members) if block.trains == "weights" else _Numbers(members)

    def run(numbers: Sequence[Tensor], x: Tensor) -> Tensor:
        for s, w, linear, dtype in zip(members, codec.decoded(numbers), linears, dtypes, strict=True):
            linear.weight = (w.T if s.planned.view.transposed else w).to(dtype)
        return bones.run(index, module, x.to(device)).to(x.device)

    numbers = codec.numbers
    if not numbers:
        return list(solved)
    outcome = block.tune(run, numbers, codec.stored, hidden, targets, rng)
    facts = {"layer_loss_before": outcome.before, "layer_loss": outcome.after}
    new = {s.planned.view.name: replace(s, facts={**s.facts, **facts}) for s in codec.solved(outcome.numbers)}
    return [new.get(s.planned.view.name, s) for s in solved]


class _Numbers:
    """Linears by what they store as floats, flat; see `BlockMethod.trains`."""

    def __init__(self, members: Sequence[Solved]) -> None:
        self.members = members
        self.numbers = [s.fields[name] for s in members for name in s.floats]

    def decoded(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Their weights, differentiable in the numbers, float32 [n, k]."""
        return [s.decoded(own) for s, own in zip(self.members, self._split(numbers), strict=True)]

    def stored(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Numbers as they can be stored."""
        return [s.fields[name] for s in self.solved(numbers) for name in s.floats]

    def solved(self, numbers: Sequence[Tensor]) -> list[Solved]:
        """Linears with these numbers."""
        return [s.stored(own) for s, own in zip(self.members, self._split(numbers), strict=True)]

    def _split(self, numbers: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        rest = iter(numbers)
        return [{name: next(rest) for name in s.floats} for s in self.members]


class _Weights:
    """Linears by the weights that are rounded to nearest."""

    def __init__(self, members: Sequence[Solved]) -> None:
        self.members = members
        self.numbers = [s.w for s in members]

    def decoded(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """The weights rounded, float32 [n, k]."""
        return [s.rounded(w) for s, w in zip(self.members, numbers, strict=True)]

    def stored(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Weights as they are: they are rounded anyway."""
        return list(numbers)

    def solved(self, numbers: Sequence[Tensor]) -> list[Solved]:
        """Linears with these weights; one that did not change stays as it is."""
        return [s if w is s.w else s.renewed(w) for s, w in zip(self.members, numbers, strict=True)]
