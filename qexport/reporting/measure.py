"""What no file says and the original has to be asked: outputs, weights and activations before and after.

Original and checkpoint run layer by layer over the same text, each on its own hidden states; one layer of each is in
memory. A linear's error is taken on the *original's* input, so it is the error of this linear alone; the error of
the hidden states is what all layers so far have added up to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexport.calibration import bos_id, encode
from qexport.checkpoint import Reader
from qexport.errors import UsageError
from qexport.evaluate.size import packed_modules
from qexport.evaluate.windows import cut, read_text
from qexport.events import Advanced, Observer, Started
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.models import Anatomy, Block, LinearGroup, Skeleton, Source, WeightView, anatomy, skeleton
from qexport.reporting.facts import place
from qexport.schema import Tensors
from qexport.stored import stored_block, stored_tensors

WEIGHT_RANGE, WEIGHT_BINS = 6.0, 241  # multiples of the root mean square; odd: 0 has a bin of its own
INPUT_RANGE, INPUT_BINS = (-2.0, 3.0), 100  # powers of ten of the same
_ALIKE = 0.5  # squared error over squares; of unrelated embeddings it is 2
FEATURE_BINS = 160  # of outlier maps: the largest of the features in each

_FOLDED = (
    "Norms or biases of the layers are not the original's, or the hidden states are rotated: transforms moved factors "
    "or a rotation into them. Single linears then have no counterpart in the original, and the errors shown are those "
    "that the job noted, against the transformed weights."
)
_OTHER_BASIS = "The hidden states are in another basis, and the token embedding does not tell in which."


@dataclass(frozen=True)
class Sample:
    """The text that both models read.

    Attributes:
        text: a file, `builtin`, or another name that `qexport eval` knows.
        sequences: how many.
        seqlen: tokens of each, at most what the model's context holds.
    """

    text: str = "builtin"
    sequences: int = 4
    seqlen: int = 256


@dataclass
class Measured:
    """Figures by module, by layer and by kind; plain data.

    Attributes:
        original: the model that was compared with.
        text: name of the text, with `sequences` and `seqlen`.
        outputs: by module `mse` and `relative`, the mean squared error of outputs and its ratio to their mean square.
        states: by layer `mse` and `relative` of the hidden states after it.
        weights: by kind `before` and `after`, shares of weights in bins of multiples of their root mean square.
        inputs: by kind `before` and `after`, shares of |x| in bins of powers of ten of its root mean square.
        outliers: by kind `before` and `after`, for each layer the largest |x| of features over the root mean square.
        notes: why something is not there.
    """

    original: str
    text: Mapping[str, Any]
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outliers: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def measure(folder: Path, source: Source, sample: Sample, *, device: str, observer: Observer) -> Measured:
    """Compare a checkpoint with its original, streaming both.

    Raises:
        SourceError: the text can't be had.
        PlanError: the original can't be streamed.
        UsageError: it has not the modules that were packed.
    """
    parts, reader = anatomy(source), Reader(folder)
    modules = packed_modules(reader)
    _refuse_another(source.name, parts, {name: (n, k) for name, (_, n, k) in modules.items()})
    context = parts.context or sample.seqlen
    tokenizer = source.tokenizer()
    windows = cut(
        sample.text, encode(tokenizer, read_text(sample.text).content),
        seqlen=min(sample.seqlen, context), limit=sample.sequences, bos=bos_id(tokenizer, "auto"), observer=observer,
    )  # fmt: skip
    ids = windows.ids
    text = {"name": Path(sample.text).name, "sequences": ids.shape[0], "seqlen": ids.shape[1]}
    found = Measured(Path(source.name).name if Path(source.name).exists() else source.name, text)
    where = torch.device(device)
    bones = skeleton(source, parts, dtype=torch.float32, device=where, seqlen=ids.shape[1])
    specs = {name: spec for name, (spec, _, _) in modules.items()}
    run = _Run(source, parts, reader, specs, bones, where, found)
    with torch.no_grad():
        run.all(ids, observer)
    return replace(found, weights=_shares(found.weights), inputs=_shares(found.inputs))


def _refuse_another(name: str, parts: Anatomy, packed: Mapping[str, tuple[int, int]]) -> None:
    heads = [view for view in (parts.head, parts.embedding_view) if view is not None]
    there = {view.name: (view.n, view.k) for view in [*heads, *(v for b in parts.blocks for v in b.views)]}
    for module, shape in packed.items():
        if there.get(module) != shape:
            found = "none of that name" if module not in there else f"{there[module][0]} x {there[module][1]}"
            raise UsageError(
                f"--original {name}: expected {module} of {shape[0]} x {shape[1]}, found {found}. Name the model "
                "that the checkpoint was made from."
            )


@dataclass
class _Run:
    """One comparison; its state is the two streams of hidden states and the figures so far."""

    source: Source
    parts: Anatomy
    reader: Reader
    specs: Mapping[str, LinearSpec]
    bones: Skeleton
    device: torch.device
    found: Measured

    def all(self, ids: Tensor, observer: Observer) -> None:
        """Every layer; ids int64 [sequences, tokens]."""
        ours, theirs, same, back = self.embedded(ids)
        if not same and back is None:
            self.note(_OTHER_BASIS)
        dense = {block: self.dense(block) for block in self.parts.blocks}
        single = same and all(self.equal(name) for names in dense.values() for name in names)
        if not single:
            self.note(_FOLDED)
        observer(Started("report", len(self.parts.blocks), "layer"))
        for index, block in enumerate(self.parts.blocks):
            ours = self.original(index, block, ours, single=single)
            theirs = self.packed(index, block, theirs, dense[block])
            if same or back is not None:
                self.state(block, ours, theirs if back is None else theirs @ back.to(theirs))
            observer(Advanced("report", index + 1, block.name))

    def embedded(self, ids: Tensor) -> tuple[Tensor, Tensor, bool, Tensor | None]:
        """Hidden states of both before the first layer, whether they have one basis, and else the rotation back."""
        ours, table = self.bones.embed(ids), self.embedding()
        before = self.source.read(self.parts.embedding).float()
        same = alike(before, table)
        back = None if same else rotation_back(before, table)
        self.bones.put_embedding(table)
        theirs = self.bones.embed(ids)
        self.bones.forget_embedding()
        return ours, theirs, same, back

    def note(self, text: str) -> None:
        """Why something is not there."""
        self.found.notes.append(text)

    def dense(self, block: Block) -> list[str]:
        """Tensors of a layer that the checkpoint has as they are: norms, biases."""
        return [n for n in self.reader.names if n.startswith(f"{block.name}.") and n in self.parts.parameters]

    def equal(self, name: str) -> bool:
        """Whether a tensor is the original's."""
        return torch.equal(self.reader.read(name).float(), self.source.read(name).float())

    def embedding(self) -> Tensor:
        """The checkpoint's token embedding, float32 [vocab, d]."""
        name = self.parts.embedding.removesuffix(".weight")
        if name not in self.specs:
            return self.reader.read(self.parts.embedding).float()
        view = self.parts.embedding_view
        assert view is not None
        tensors = stored_tensors(self.reader, self.specs[name], name, view.n, view.k)
        return self.specs[name].decoded(tensors, view.n, view.k)

    def state(self, block: Block, ours: Tensor, theirs: Tensor) -> None:
        """Note how far the hidden states are apart after a layer."""
        mse = float((ours - theirs).square().mean())
        layer = place(block.name)[0]
        self.found.states.append({"layer": layer, "mse": mse, "relative": mse / float(ours.square().mean())})

    def original(self, index: int, block: Block, hidden: Tensor, *, single: bool) -> Tensor:
        """Run a layer of the original and compare each linear; returns its output."""
        module = self.bones.block(index)
        kept: dict[str, list[Tensor]] = {}
        hooks = []
        for view in block.views:
            if view.name in self.specs:
                own = self.stored(view)
                self.weigh(view, own, self.source.view(view))
                if view.index is None and single:
                    linear = self.bones.submodule(index, module, view)
                    hooks.append(linear.register_forward_hook(partial(self.compare, view, own)))
        for group in self.groups(block):
            linear = self.bones.submodule(index, module, group.members[0])
            hooks.append(linear.register_forward_pre_hook(partial(_keep, kept.setdefault(_label(group), []))))
        out = self.bones.run(index, module, hidden)
        for hook in hooks:
            hook.remove()
        self.look("before", kept)
        return out

    def packed(self, index: int, block: Block, hidden: Tensor, dense: Sequence[str]) -> Tensor:
        """Run a layer of the checkpoint and look at what its linears multiply; returns its output."""
        module = stored_block(self.bones, index, block, self.reader, self.specs, dense=dense, device=self.device)
        kept: dict[str, list[Tensor]] = {}
        for group in self.groups(block):
            first = group.members[0]
            linear = self.bones.submodule(index, module, first)
            steps, tensors = self.specs[first.name].input, self.stored(first)
            keep = partial(_keep_met, kept.setdefault(_label(group), []), steps, tensors)
            linear.register_forward_pre_hook(keep, prepend=True)  # before the hook that rounds
        out = self.bones.run(index, module, hidden)
        self.look("after", kept)
        return out

    def groups(self, block: Block) -> list[LinearGroup]:
        """Linears with one input whose first member is packed."""
        return [group for group in block.groups if group.members[0].name in self.specs]

    def stored(self, view: WeightView) -> Tensors:
        """Packed tensors of a module, on the device."""
        tensors = stored_tensors(self.reader, self.specs[view.name], view.name, view.n, view.k)
        return {name: t.to(self.device) for name, t in tensors.items()}

    def weigh(self, view: WeightView, tensors: Tensors, w: Tensor) -> None:
        """Distributions of a weight and of what is stored for it."""
        fmt = self.specs[view.name].weight
        stored = fmt.decode(fmt.unpack(tensors, view.n, view.k))
        entry = self.found.weights.setdefault(place(view.name)[1], {})
        for side, values in (("before", w), ("after", stored)):
            _add(entry, side, _histogram(values / _rms(values), -WEIGHT_RANGE, WEIGHT_RANGE, WEIGHT_BINS))

    def compare(self, view: WeightView, tensors: Tensors, linear: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        """A linear's output against what the packed one makes of the same input; as a forward hook."""
        spec = self.specs[view.name]
        w = spec.decoded(tensors, view.n, view.k)
        packed = F.linear(spec.input.rounded(args[0], tensors), w, linear.bias)
        mse = float((packed - out).square().mean())
        signal = float(out.square().mean())
        self.found.outputs[view.name] = {"mse": mse, "relative": mse / max(signal, 1e-30)}

    def look(self, side: str, kept: Mapping[str, Sequence[Tensor]]) -> None:
        """Distribution and outliers of inputs, rows [tokens, k] of each kind."""
        for kind, parts in kept.items():
            if parts:
                x = torch.cat(list(parts))
                x = x.abs() / _rms(x)
                powers = x.clamp(min=10 ** INPUT_RANGE[0]).log10()
                _add(self.found.inputs.setdefault(kind, {}), side, _histogram(powers, *INPUT_RANGE, INPUT_BINS))
                largest = F.adaptive_max_pool1d(x.amax(0)[None], min(FEATURE_BINS, x.shape[1]))[0]
                self.found.outliers.setdefault(kind, {}).setdefault(side, []).append(largest.tolist())


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two embeddings [vocab, d] differ by no more than rounding to few bits does."""
    return float((ours - theirs).norm()) ** 2 < _ALIKE * float(ours.norm()) ** 2


def rotation_back(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """The rotation float32 [d, d] that turns the embedding of a checkpoint into the original's; None if none does."""
    rows = torch.arange(0, ours.shape[0], max(ours.shape[0] // (4 * ours.shape[1]), 1))
    u, _, v = torch.linalg.svd(theirs[rows].T @ ours[rows])  # orthogonal Procrustes
    return u @ v if alike(ours[rows], theirs[rows] @ u @ v) else None


def _label(group: LinearGroup) -> str:
    """The kinds that read one input, the common start said once: `self_attn.q_proj, k_proj, v_proj`."""
    names = [place(view.name)[1] for view in group.members]
    return ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _keep(kept: list[Tensor], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    kept.append(args[0].reshape(-1, args[0].shape[-1]))


def _keep_met(
    kept: list[Tensor], steps: InputSpec, tensors: Tensors, _module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    """Keep what the stored weight is multiplied by: scaled, rotated, permuted and rounded."""
    x = steps.prepared(args[0].reshape(-1, args[0].shape[-1]), tensors)
    kept.append(x if steps.quant is None else steps.quant.encode(x, tensors).values(x))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt().clamp(min=1e-30)


def _histogram(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Counts in equal bins, float32 [bins]; what lies outside counts in the outermost."""
    return torch.histc(x.float().clamp(low, high), bins, low, high).cpu()


def _add(entry: dict[str, Any], side: str, counts: Tensor) -> None:
    entry[side] = counts + entry.get(side, 0)


def _shares(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Counts as shares, as plain lists."""
    return {
        kind: {side: (counts / counts.sum()).tolist() for side, counts in sides.items()}
        for kind, sides in table.items()
    }
