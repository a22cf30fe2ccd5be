"""One decoder layer with random weights, to try what leaves its output as it is; so no table of models is needed."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexport.models.chain import Call
from qexport.models.parts import Anatomy, Block
from qexport.models.source import Source
from qexport.models.structure import PROBE, text_calls

CLOSE = 1e-4  # of the largest value; norms compute in float32


class Probe:
    """A layer in float64, run again and again with something changed.

    Attributes:
        block: what is known of the layer.
        module: it; the user may change its weights, and puts them back.
        linears: paths inside the layer, by the name of the view.
        x: a hidden state that enters it.
        hidden: its width.
        rng: for whatever is random.
    """

    def __init__(self, block: Block, module: nn.Module, call: Call, hidden: int) -> None:
        self.block, self.hidden, self.rng = block, hidden, torch.Generator().manual_seed(0)
        self.module = _with_random_weights(module, self.rng)
        wide: dict[str, Any] = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, {"args": call.args, "kwargs": call.kwargs}
        )
        self._call = Call(wide["args"], wide["kwargs"], call.keyword, call.entries)
        self.x = torch.randn(*PROBE, hidden, dtype=torch.float64, generator=self.rng)
        self.linears = {v.name: v.name.removeprefix(block.name + ".") for g in block.groups for v in g.members}

    def run(
        self, x: Tensor | None = None, scaled: str = "", factors: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
        """The layer's output, each group's input, and the outputs of small modules.

        Args:
            x: instead of the probe's own.
            scaled: path of a linear whose output is multiplied.
            factors: by what.
        """
        inputs: list[Tensor | None] = [None] * len(self.block.groups)
        outputs: dict[str, Any] = {}
        with torch.no_grad(), _hooked(self._hooks(inputs, outputs, scaled, factors)):
            y = self._call.run(self.module, self.x if x is None else x)
        return y, inputs, outputs

    @contextmanager
    def changed(self) -> Iterator[nn.Module]:
        """The layer, to be changed in place; it is put back afterwards."""
        kept = copy.deepcopy(self.module.state_dict())
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.load_state_dict(kept)

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
            if is_norm(module):
                yield module.register_forward_hook(keep(name))


def probes(source: Source, anatomy: Anatomy) -> Iterator[tuple[list[Block], Probe]]:
    """Layers of one structure with a probe of the first of them; takes one layer of memory, in float64."""
    outer, modules, calls, _ = text_calls(source)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, block in enumerate(anatomy.blocks):
        shape = tuple((v.name.removeprefix(block.name), v.n, v.k) for v in block.views)
        kinds.setdefault(shape, []).append(index)
    for alike in kinds.values():
        first = alike[0]
        yield (
            [anatomy.blocks[i] for i in alike],
            Probe(anatomy.blocks[first], modules[first], calls[first], anatomy.hidden),
        )
    del outer


def is_norm(module: nn.Module) -> bool:
    """Whether a module's own weight is a vector, and nothing is inside of it."""
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
