"""Where a factor of a linear's input can go instead: into the norm or the linear that the input comes from.

Found by trying it out on one decoder layer with random weights, so that no table of architectures is needed: what is
listed here leaves the layer's output as it was.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexport.models.chain import Call
from qexport.models.parts import Anatomy, Block, LinearGroup
from qexport.models.source import Source
from qexport.models.structure import PROBE, text_calls

_CLOSE = 1e-4  # of the largest value; norms compute in float32


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
    outer, modules, calls, _ = text_calls(source)
    known: dict[tuple[Any, ...], dict[int, Fold]] = {}
    found: dict[str, Fold] = {}
    for block, module, call in zip(anatomy.blocks, modules, calls, strict=True):
        shape = tuple((v.name.removeprefix(block.name), v.n, v.k) for v in block.views)
        if shape not in known:
            known[shape] = _Probe(block, module, call, anatomy.hidden).folds()
        for number, fold in known[shape].items():
            path = f"{block.name}.{fold.producer}"
            found[block.groups[number].members[0].name] = Fold(path, fold.linear, fold.unit, fold.features)
    del outer
    return found


_Seen: TypeAlias = tuple[Tensor, list[Tensor | None], dict[str, Any]]


class _Probe:
    """One layer with random weights, run again and again with something changed."""

    def __init__(self, block: Block, module: nn.Module, call: Call, hidden: int) -> None:
        self.block, self.rng = block, torch.Generator().manual_seed(0)
        self.module = _with_random_weights(module, self.rng)
        wide: dict[str, Any] = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, {"args": call.args, "kwargs": call.kwargs}
        )
        self.call = Call(wide["args"], wide["kwargs"], call.keyword, call.entries)
        self.x = torch.randn(*PROBE, hidden, dtype=torch.float64, generator=self.rng)
        self.linears = {v.name: v.name.removeprefix(block.name + ".") for g in block.groups for v in g.members}

    def folds(self) -> dict[int, Fold]:
        """Folds by the number of the group, producers as paths inside the layer."""
        try:
            base, inputs, outputs = self.run()
        except Exception:  # noqa: BLE001  the code of any model, on weights that it was not made for
            return {}
        out: dict[int, Fold] = {}
        for number, group in enumerate(self.block.groups):
            for fold in self.candidates(number, inputs, outputs):
                if self.holds(group, fold, base):
                    out[number] = fold
                    break
        return out

    def run(
        self, scaled: str = "", factors: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
        """The layer's output, each group's input, and the outputs of small modules; one linear's output scaled."""
        inputs: list[Tensor | None] = [None] * len(self.block.groups)
        outputs: dict[str, Any] = {}
        with torch.no_grad(), _hooked(self._hooks(inputs, outputs, scaled, factors)):
            y = self.call.run(self.module, self.x)
        return y, inputs, outputs

    def _hooks(
        self, inputs: list[Tensor | None], outputs: dict[str, Any], scaled: str, factors: Tensor | None
    ) -> Iterator[Any]:
        def take(number: int) -> Callable[..., None]:
            return lambda _module, args, number=number: inputs.__setitem__(number, args[0])

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, out, name=name: outputs.__setitem__(name, out)

        if scaled:
            module = self.module.get_submodule(scaled)
            yield module.register_forward_hook(lambda _module, _args, out: out * factors)
        for number, group in enumerate(self.block.groups):
            first = self.module.get_submodule(self.linears[group.members[0].name])
            yield first.register_forward_pre_hook(take(number))
        for name, module in self.module.named_modules():
            if _is_norm(module):
                yield module.register_forward_hook(keep(name))

    def candidates(self, number: int, inputs: list[Tensor | None], outputs: dict[str, Any]) -> Iterator[Fold]:
        """What may produce a group's input: a norm whose very output it is, or a linear that scales it."""
        x = inputs[number]
        if x is None:
            return
        for name, out in outputs.items():
            if out is x:
                for unit in (0.0, 1.0):
                    yield Fold(name, False, unit, torch.arange(x.shape[-1]))
        for name in [self.linears[v.name] for g in self.block.groups[:number] for v in g.members]:
            n = self.module.get_submodule(name)
            factors = 1 + torch.randperm(_width(n), generator=self.rng).double() / _width(n)
            seen = self.run(name, factors)[1][number]
            features = None if seen is None else _features(x, seen, factors)
            if features is not None:
                yield Fold(name, True, 0.0, features)

    def holds(self, group: LinearGroup, fold: Fold, base: Tensor) -> bool:
        """Whether the layer's output stays the same when a fold is made."""
        producer: Any = self.module.get_submodule(fold.producer)
        kept = copy.deepcopy(self.module.state_dict())
        factors = torch.rand(int(fold.features.max()) + 1, dtype=torch.float64, generator=self.rng) + 0.5
        if fold.linear and factors.numel() != _width(producer):
            return False
        with torch.no_grad():
            if fold.linear:
                rows = 0 if isinstance(producer, nn.Linear) else 1
                producer.weight.div_(factors.unsqueeze(1 - rows))
            else:
                producer.weight.copy_((producer.weight + fold.unit) / factors - fold.unit)
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(factors)
            for view in group.members:
                weight = self.module.get_submodule(self.linears[view.name]).get_parameter("weight")
                across = factors[fold.features]
                weight.mul_(across.unsqueeze(1) if view.transposed else across)
        y = self.run()[0]
        self.module.load_state_dict(kept)
        return bool((y - base).abs().max() < _CLOSE * base.abs().max())


def _features(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """Which factor each feature was multiplied by; None unless that is one and the same for all tokens."""
    ratio = (after / before).flatten(0, -2)  # 0 / 0 is NaN: an activation may have taken the feature of some tokens
    mean = ratio.nanmedian(0).values
    if torch.isnan(mean).any() or not ((ratio - mean).abs().nan_to_num(0) < _CLOSE).all():
        return None
    found = (mean.unsqueeze(1) - factors).abs().min(1)
    return found.indices if float(found.values.max()) < 0.2 / factors.numel() else None


def _width(linear: nn.Module) -> int:
    weight = linear.get_parameter("weight")
    return weight.shape[0 if isinstance(linear, nn.Linear) else 1]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(True for _ in module.children())


def _with_random_weights(module: nn.Module, rng: torch.Generator) -> nn.Module:
    """A copy in float64 whose matrices keep the size of what they multiply, and whose gains lie around 1."""
    module = copy.deepcopy(module)
    for owner in module.modules():
        config: Any = getattr(owner, "config", None)
        if config is not None:
            config._experts_implementation = "eager"  # the faster ones know no float64
        for name, param in owner._parameters.items():
            if param is not None:
                noise = torch.randn(param.shape, dtype=torch.float64, generator=rng)
                value = noise * param.shape[-1] ** -0.5 if param.ndim > 1 else 0.1 * noise + (name == "weight")
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = buffer.double()
    return module


@contextmanager
def _hooked(hooks: Iterator[Any]) -> Iterator[None]:
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
