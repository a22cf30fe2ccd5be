"""Who writes and who reads the hidden states between the layers, so that all of them can be rotated at once.

An orthogonal matrix Q may multiply these states if embedding and linears that write them are multiplied by it, linears
that read them by its inverse, and nothing else happens to them: an RMSNorm commutes with Q once its gain is 1, the gain
moving into its readers (Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.2). Whether a model is like that is
tried on one layer of each structure with random weights, and on what comes before and after the layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qexport.errors import PlanError
from qexport.formats._rotation import rotate
from qexport.models.chain import Stop, forward, head_module, replaced
from qexport.models.folds import Fold, layer_folds
from qexport.models.parts import Anatomy, LinearGroup
from qexport.models.probe import CLOSE, Probe, is_norm, probes
from qexport.models.source import Source
from qexport.models.structure import PROBE, text_calls


@dataclass(frozen=True)
class Norm:
    """A norm's gain.

    Attributes:
        weight: state-dict name.
        unit: what the norm adds to it before it multiplies (Gemma's add 1).
    """

    weight: str
    unit: float


@dataclass(frozen=True)
class Stream:
    """What has to do with the hidden states; tensors by state-dict name, of tied ones each under its own.

    Attributes:
        readers: module names of linears that read the states through a norm, and the norm. Head included.
        writers: module names of linears whose output is added to the states.
        vectors: tensors whose last axis is one of states: the embedding, biases of writers.
    """

    readers: Mapping[str, Norm]
    writers: frozenset[str]
    vectors: frozenset[str]

    @property
    def norms(self) -> Mapping[str, float]:
        """Units of all norms by the name of their gain."""
        return {norm.weight: norm.unit for norm in self.readers.values()}


def turn(states: Tensor, signs: Tensor) -> Tensor:
    """Q times every vector of states [.., d]: signs [d], then `formats._rotation`'s matrix; float32."""
    return rotate(states.to(torch.float32) * signs)


def find_stream(source: Source, anatomy: Anatomy) -> Stream:
    """Readers and writers of a model's hidden states.

    Raises:
        PlanError: rotating the states would change what the model computes; says where.
    """
    head = anatomy.head
    if head is None:
        _refuse(anatomy, "it has no output layer that is a linear")
    if anatomy.embedding_obstacle is not None:
        _refuse(anatomy, f"of its token embedding: {anatomy.embedding_obstacle}")
    readers: dict[str, Norm] = {}
    writers: list[str] = []
    vectors = [anatomy.embedding]
    for blocks, probe in probes(source, anatomy):
        gains, sums = _roles(anatomy, probe)
        for block in blocks:
            for number, group in enumerate(block.groups):
                for index, view in enumerate(group.members):
                    if number in gains:
                        fold = gains[number]
                        readers[view.name] = Norm(f"{block.name}.{fold.producer}.weight", fold.unit)
                    elif (number, index) in sums:
                        writers.append(view.name)
                        vectors += [f"{view.name}.bias"] if view.bias else []
    readers[head.name] = _around(source, anatomy)
    return Stream(readers, frozenset(writers), frozenset(vectors))


def _refuse(anatomy: Anatomy, why: str) -> NoReturn:
    raise PlanError(
        f"{anatomy.architecture}: the hidden states between its layers can't be rotated in the weights: {why}. "
        "Leave out transform.rotation.fold: then each linear rotates its own input when it runs."
    )


def _roles(anatomy: Anatomy, probe: Probe) -> tuple[dict[int, Fold], set[tuple[int, int]]]:
    """Reading groups of a layer, by number, with their norms; and its writers, by number of group and of member."""
    d = probe.hidden
    if any(v.transposed for v in probe.block.views) or probe.block.experts:
        _refuse(anatomy, f"{probe.block.name} has experts, or weights stored as [k, n]")
    gains = {n: f for n, f in layer_folds(probe).items() if not f.linear and probe.block.groups[n].k == d}
    rest = [(n, g) for n, g in enumerate(probe.block.groups) if n not in gains]
    sums = {(n, i) for n, g in rest for i, view in enumerate(g.members) if view.n == d}
    signs = torch.randint(0, 2, (d,), generator=probe.rng).float() * 2 - 1
    base = probe.run()[0]
    with probe.changed():
        for number, fold in gains.items():
            _turn_readers(probe, probe.block.groups[number], fold, signs)
        for number, index in sums:
            view = probe.block.groups[number].members[index]
            linear = probe.module.get_submodule(probe.linears[view.name])
            weight: Any = linear.weight
            weight.copy_(turn(weight.T, signs).T)
            if view.bias:
                bias: Any = linear.bias
                bias.copy_(turn(bias, signs))
        y = probe.run(turn(probe.x, signs).double())[0]
    if not gains or not sums or not (y - turn(base, signs)).abs().max() < CLOSE * base.abs().max():
        _refuse(anatomy, f"{probe.block.name} does more with them than read them through RMSNorms and add to them")
    return gains, sums


def _turn_readers(probe: Probe, group: LinearGroup, fold: Fold, signs: Tensor) -> None:
    norm: Any = probe.module.get_submodule(fold.producer)
    gain = norm.weight + fold.unit
    for view in group.members:
        weight = probe.module.get_submodule(probe.linears[view.name]).get_parameter("weight")
        weight.copy_(turn(weight * gain, signs))
    norm.weight.fill_(1 - fold.unit)


def _around(source: Source, anatomy: Anatomy) -> Norm:
    """The norm between the last layer and the head, once it is known that nothing else is around the layers."""
    outer, modules, calls, _ = text_calls(source)
    blocks = list(modules)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*PROBE, anatomy.hidden, generator=rng)
    signs = torch.randint(0, 2, (anatomy.hidden,), generator=rng).float() * 2 - 1
    tokens = torch.zeros(PROBE, dtype=torch.int64)

    def entering(states: Tensor) -> Tensor:
        table = outer.get_input_embeddings()
        handle = table.register_forward_hook(lambda *_: states)
        try:
            with replaced(blocks[:1], [_stop]):
                return _stopped(lambda: forward(outer, tokens))
        finally:
            handle.remove()

    def leaving(states: Tensor) -> tuple[Tensor, list[str]]:
        given = [lambda *_, c=call, **__: c.output(states) for call in calls]
        with _watched(outer) as seen, replaced(blocks, given):
            found = _stopped(lambda: forward(outer, tokens))
        return found, [name for name, out in seen.items() if torch.equal(out, found)]  # the head gets a view of it

    if not _close(entering(turn(x, signs)), turn(entering(x), signs)):
        _refuse(anatomy, "something other than a factor lies between the token embedding and the first layer")
    plain, names = leaving(x)
    for name in names:
        norm: Any = outer.get_submodule(name)
        kept = norm.weight
        for unit in (0.0, 1.0):
            norm.weight = nn.Parameter(torch.full_like(kept, 1 - unit), requires_grad=False)
            turned = leaving(turn(x, signs))[0]
            norm.weight = kept
            if _close(turned, turn(plain / (kept + unit), signs)):
                return Norm(f"{name}.weight", unit)
    _refuse(anatomy, "its head does not read them through an RMSNorm")


def _stop(*args: Any, **kwargs: Any) -> NoReturn:
    raise Stop(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _stopped(run: Callable[[], Any]) -> Tensor:
    try:
        run()
    except Stop as stop:
        return stop.value
    raise AssertionError("the model never got there")


@contextmanager
def _watched(outer: Any) -> Iterator[dict[str, Any]]:
    """Outputs of norms by path, while the model runs up to its head."""
    seen: dict[str, Any] = {}
    head = head_module(outer)
    assert head is not None
    handles = [head.register_forward_pre_hook(lambda _module, args: _stop(args[0]))]
    for name, module in outer.named_modules():
        if is_norm(module):
            handles.append(
                module.register_forward_hook(lambda _module, _args, out, name=name: seen.__setitem__(name, out))
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < CLOSE * b.abs().max())
