"""From a recipe and a model's anatomy to a plan: every module resolved, every size known, before any work starts."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qexport import plugins
from qexport.blocks.base import BlockMethod
from qexport.blocks.tune import Tune
from qexport.caches.base import CacheMethod
from qexport.calibration import Calibration
from qexport.checkpoint import Reader, dump_json, read_json, sha256
from qexport.errors import PlanError
from qexport.formats.base import Format, IntegerFormat
from qexport.formats.kv.base import NONE, KVFormat, kv_name, make_kv, uncalibrated
from qexport.formats.specs import InputSpec, LinearSpec, make_format, refuse_input, to_json
from qexport.inputs.base import make_input
from qexport.kvfile import Heads, calibrates
from qexport.methods.base import LinearMethod
from qexport.models import (
    Anatomy,
    Attention,
    Fold,
    LinearGroup,
    Source,
    Stream,
    WeightView,
    attention_layers,
    find_folds,
    find_stream,
    other_layers,
)
from qexport.recipe import Choice, Recipe, choose, choose_embedding, choose_head, refuse_idle_patterns
from qexport.statistics import FeatureRange, Statistic
from qexport.transforms.base import Transform

MICRO_BATCH_TOKENS = 4096
CACHE_BATCH_TOKENS = 2048  # while a cache is calibrated, some of it with gradients


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one weight view."""

    view: WeightView
    spec: LinearSpec
    method: LinearMethod
    method_name: str

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What its method and the rounding of its input ask calibration for."""
        quant = self.spec.input.quant
        return self.method.needs | ({FeatureRange} if quant is not None and quant.calibrated else frozenset())

    @property
    def nbytes(self) -> int:
        """Predicted stored bytes, without the bias."""
        view = self.view
        extents = self.method.expected_extents(self.spec.weight, view.n, view.k)
        return self.spec.nbytes(view.n, view.k, extents)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the output.

    Attributes:
        model: as the user named it.
        commit: the Hub's commit, or None.
        fingerprint: of the source; see `fingerprint`.
        recipe: after the command line's changes.
        modules: by module path, linears in the order of the model, then the token embedding; what is not here stays
            dense.
        dense: module paths of linears that stay dense.
        calibration: token source and amounts; None when no method needs data.
        anatomy: of the model.
        seed: of everything random.
        dtype: of activations, and of the weights that they meet, while the job runs.
        text_sha256: of the file that calibration text comes from; None if it comes from elsewhere.
        transforms: by name, in the order in which they are applied.
        folds: where scales of inputs go instead of into the linears, by the first linear of a group.
        stream: what reads and writes the hidden states, if they are rotated in the model's weights.
        block: what works on a whole layer once its linears are coded.
        kv: how keys and values are cached; None as the model's class does it. It decides none of the weights' bytes
            and is no part of the digest.
        attention: layers with keys and values, if there is such a cache.
        kv_calibration: token source and amounts for the cache; None when it needs no data.
    """

    model: str
    commit: str | None
    fingerprint: str
    recipe: Recipe
    modules: Mapping[str, ModulePlan]
    dense: tuple[str, ...]
    calibration: Calibration | None
    anatomy: Anatomy
    seed: int
    dtype: str = "float32"
    text_sha256: str | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    folds: Mapping[str, Fold] = field(default_factory=dict)
    stream: Stream | None = None
    block: BlockMethod = field(default_factory=Tune)
    kv: KVFormat | None = None
    attention: Mapping[int, Attention] = field(default_factory=dict)
    kv_calibration: Calibration | None = None

    @property
    def heads(self) -> Heads:
        """Heads and channels of a head of each layer whose cache is quantized."""
        return {layer: (own.heads, own.dim) for layer, own in self.attention.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the output's bytes: two plans with one digest are one job."""
        return hashlib.sha256(dump_json(self.as_json()).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The resolved plan as it stands in the manifest."""
        methods = {name: {"name": m.method_name, **asdict(m.method)} for name, m in self.modules.items()}  # type: ignore[call-overload]
        specs = {name: to_json(m.spec) for name, m in self.modules.items()}
        return {
            "model": _public_name(self.model),
            "commit": self.commit,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.name,
            "transforms": [{"name": name, **asdict(t)} for name, t in self.transforms.items()],  # type: ignore[call-overload]
            "block": {"name": self.recipe.block, **asdict(self.block)},  # type: ignore[call-overload]
            "modules": _grouped(specs, methods),
            "calibration": self._calibration_json(),
            "seed": self.seed,
            "dtype": self.dtype,
        }

    def _calibration_json(self) -> dict[str, Any] | None:
        if self.calibration is None:
            return None
        found = {**asdict(self.calibration), "source": _public_name(self.calibration.source)}
        return found if self.text_sha256 is None else {**found, "sha256": self.text_sha256}

    def needs(self, group: LinearGroup) -> frozenset[type[Statistic]]:
        """Statistics to collect on the input of a group of linears."""
        found = [self.modules[v.name].needs for v in group.members if v.name in self.modules]
        own = transforms_of(group.members[0], self.transforms, self.stream)
        return frozenset().union(*found, *(t.needs for t in own.values() if found))

    @property
    def embedding(self) -> ModulePlan | None:
        """What happens to the token embedding; None if it stays dense."""
        view = self.anatomy.embedding_view
        return None if view is None else self.modules.get(view.name)

    @property
    def head(self) -> ModulePlan | None:
        """What happens to the output head; None if it stays dense, or there is none."""
        view = self.anatomy.head
        return None if view is None else self.modules.get(view.name)

    @property
    def unties(self) -> bool:
        """Whether head and embedding are one tensor in the model and not in the output."""
        parted = self.embedding is not None or self.head is not None or self.stream is not None
        return self.anatomy.tied and parted

    @property
    def needs_data(self) -> bool:
        """Whether any method, input, transform or block method wants calibration data."""
        parts = [*(m.needs for m in self.modules.values()), *(t.needs for t in self.transforms.values())]
        return any(parts) or self.block.passes > 0


def make_plan(
    source: Source, anatomy: Anatomy, recipe: Recipe, *, calibration: Calibration, seed: int = 0, dtype: str = "float32"
) -> Plan:
    """Resolve a recipe against a model.

    Raises:
        PlanError: a method can't use a format, or a module can't be handled; names the module and what would work.
        UsageError: a pattern matches nothing, or an option or a calibration source does not exist.
        CalibrationError: calibration sequences are longer than the model's context.
    """
    views, kv = linears(anatomy), make_kv(recipe.kv or NONE, recipe.kv_options)
    embedding = anatomy.embedding.removesuffix(".weight")
    refuse_idle_patterns(recipe, [v.name for v in views], anatomy.head.name if anatomy.head else None, embedding)
    modules: dict[str, ModulePlan] = {}
    if recipe.lm_head and anatomy.head is None:
        raise PlanError(f"{anatomy.architecture}: has no output layer that is a linear. Leave out --lm-head.")
    dense: list[str] = []
    transforms = _transforms(recipe)
    stream = find_stream(source, anatomy) if any(t.turns for t in transforms.values()) else None
    experts = {v.name for block in anatomy.blocks for v in block.experts}
    for view in views:
        choice = choose_head(recipe, view.name) if view is anatomy.head else choose(recipe, view.name)
        calibrated = view.name not in experts
        own = transforms_of(view, transforms, stream)
        planned = None if choice is None else _plan_module(view, choice, own, calibrated=calibrated)
        if planned is None:
            dense.append(view.name)
        else:
            modules[view.name] = planned
    _refuse_mixed_stacks(views, modules)
    modules |= _plan_embedding(anatomy, choose_embedding(recipe, embedding))
    if not modules:
        raise PlanError("nothing is left to quantize: every linear is ignored. Drop an --ignore pattern.")
    folds = _folds(source, anatomy, modules, transforms)
    folded = {v.name for block in anatomy.blocks for g in block.groups if g.members[0].name in folds for v in g.members}
    for name in folded:
        spec = modules[name].spec
        modules[name] = replace(modules[name], spec=replace(spec, input=replace(spec.input, scale=False)))
    block: BlockMethod = plugins.get("blocks", recipe.block)(**recipe.block_options)
    _refuse_block(recipe.block, block, modules)
    plan = Plan(
        model=source.name,
        commit=source.commit,
        fingerprint=fingerprint(source),
        recipe=recipe,
        modules=modules,
        dense=tuple(dense),
        calibration=None,
        anatomy=anatomy,
        seed=seed,
        dtype=dtype,
        transforms=transforms,
        folds=folds,
        stream=stream,
        block=block,
        kv=kv,
        attention=_attention(source, kv),
        kv_calibration=calibration if kv is not None and calibrates(kv) and method_for(kv) else None,
    )
    if not plan.needs_data and plan.kv_calibration is None:
        return plan
    calibration.check(anatomy.context)
    return replace(plan, calibration=calibration, text_sha256=calibration.file_sha256()) if plan.needs_data else plan


def method_for(kv: KVFormat) -> CacheMethod:
    """The method that finds what a cache's format needs; raises `PlanError` if there is none."""
    for name in plugins.names("caches"):
        method: CacheMethod = plugins.get("caches", name)()
        if method.reject(kv) is None:
            return method
    there = ", ".join(plugins.names("caches"))
    raise PlanError(f"cache {kv_name(kv)!r}: none of the methods that calibrate caches can use it; there are {there}.")


def _attention(source: Source, kv: KVFormat | None) -> dict[int, Attention]:
    """Layers whose cache is quantized; raises `PlanError` if one is asked for and there are none."""
    found = {} if kv is None else attention_layers(source.config)
    if kv is not None and not found:
        raise PlanError(
            f"{source.name}: has no attention layer whose cache could be quantized. Leave out --kv {kv_name(kv)}."
        )
    if kv is not None and calibrates(kv):
        refuse_other_layers(source.config, kv)
    return found


def refuse_other_layers(config: Any, kv: KVFormat) -> None:
    """Raise `PlanError` where a cache is to be calibrated and a layer keeps another state, which can't run twice."""
    other = other_layers(config)
    if other:
        layer, kind = next(iter(other.items()))
        raise PlanError(
            f"cache {kv_name(kv)!r}: layer {layer} keeps another state than keys and values ({kind}), and a model with "
            f"such layers can't be calibrated. Use a cache that needs none: {uncalibrated()}."
        )


def _refuse_block(name: str, block: BlockMethod, modules: Mapping[str, ModulePlan]) -> None:
    """Raise `PlanError` where a block method can't work on what a layer's linears were made of."""
    for planned in modules.values() if block.passes else ():
        reason = block.reject(planned.method_name, asdict(planned.method), planned.spec.weight)  # type: ignore[call-overload]
        if reason:
            raise PlanError(
                f'{planned.view.name}: block method "{name}": {reason}. Use --method rtn, or another block.'
            )


def _transforms(recipe: Recipe) -> dict[str, Transform]:
    """A recipe's transforms; raises `PlanError` where one can't follow another."""
    out: dict[str, Transform] = {}
    for name, options in recipe.transforms:
        found: Transform = plugins.get("transforms", name)(**options)
        rotated = [other for other, t in out.items() if t.steps.hadamard]
        if found.steps.scale and rotated:
            raise PlanError(
                f'transform "{name}" scales single input features and can\'t follow "{rotated[0]}", which mixes them. '
                f"Put it first: -t {name} -t {rotated[0]}."
            )
        out[name] = found
    return out


def transforms_of(view: WeightView, transforms: Mapping[str, Transform], stream: Stream | None) -> dict[str, Transform]:
    """What is left to do at a linear: what turns the hidden states is done when it reads them."""
    reads = stream is not None and view.name in stream.readers
    return {name: t for name, t in transforms.items() if not (reads and t.turns)}


def _folds(
    source: Source, anatomy: Anatomy, modules: Mapping[str, ModulePlan], transforms: Mapping[str, Transform]
) -> dict[str, Fold]:
    """Folds of the model that touch nothing but what is quantized, and norms; none where no transform scales."""
    if not any(t.steps.scale for t in transforms.values()):
        return {}
    first = {g.members[0].name: g for block in anatomy.blocks for g in block.groups}
    return {
        name: fold
        for name, fold in find_folds(source, anatomy).items()
        if all(v.name in modules for v in first[name].members) and (not fold.linear or fold.producer in modules)
    }


def _refuse_mixed_stacks(views: list[WeightView], modules: Mapping[str, ModulePlan]) -> None:
    """Experts of one stacked parameter are packed together or not at all: the rest would have no tensor to be in."""
    packed = {v.param: v.name for v in views if v.index is not None and v.name in modules}
    for view in views:
        if view.index is not None and view.name not in modules and view.param in packed:
            raise PlanError(
                f"{view.name}: stays dense while {packed[view.param]} of the same stacked parameter is packed. "
                f"Ignore all of it, --ignore '{view.param}.*', or none."
            )


def _public_name(name: str) -> str:
    """A model or text without the local folder it lies in: outputs get published."""
    return Path(name).name if Path(name).expanduser().exists() else name


def fingerprint(source: Source) -> str:
    """SHA-256 over config, tokenizer and side files, and each tensor's name, dtype, shape and, if at hand, first 4 KiB.

    So that a resumed job notices another fine-tune of the same shape.
    """
    digest = hashlib.sha256(dump_json(read_json(source.folder / "config.json")).encode())
    for path in source.companions():
        digest.update(f"{path.name} {sha256(path)}".encode())
    for name in sorted(source.stored.names):
        meta = source.stored.meta(name)
        digest.update(f"{name} {meta.dtype} {meta.shape}".encode())
        if isinstance(source.stored, Reader):
            digest.update(next(source.stored.chunks(name, 4096), b""))
    return digest.hexdigest()


def linears(anatomy: Anatomy) -> list[WeightView]:
    """All weight views of a model in order: blocks, then the head."""
    found = [view for block in anatomy.blocks for view in block.views]
    return found if anatomy.head is None else [*found, anatomy.head]


def _plan_embedding(anatomy: Anatomy, choice: Choice | None) -> dict[str, ModulePlan]:
    if choice is None:
        return {}
    view = anatomy.embedding_view
    if view is None:
        raise PlanError(
            f"{anatomy.embedding.removesuffix('.weight')}: the token embedding can't be quantized: "
            f"{anatomy.embedding_obstacle}. Leave out --embeddings."
        )
    return {view.name: _plan_module(view, choice, {}, calibrated=True)}


def _plan_module(
    view: WeightView, choice: Choice, transforms: Mapping[str, Transform], *, calibrated: bool
) -> ModulePlan:
    method: LinearMethod = plugins.get("methods", choice.method)(**choice.method_options)
    fmt = make_format(choice.format, choice.format_options).sized(view.n, view.k)
    reason = method.reject(fmt)
    if reason:
        raise PlanError(
            f'{view.name}: method "{choice.method}" cannot use format "{choice.format}": {reason}.\n'
            f"  Formats it can use: {', '.join(usable_formats(method)) or 'none'}.{_other_method(choice.method, fmt)}"
        )
    steps = InputSpec(permute=method.permutes)
    for name, transform in transforms.items():
        reason = transform.reject(fmt)
        if reason:
            raise PlanError(f'{view.name}: transform "{name}" can\'t be used with format "{choice.format}": {reason}.')
        steps |= transform.steps
    parts = {f'method "{choice.method}"': method.needs, **{f'transform "{n}"': t.needs for n, t in transforms.items()}}
    quant = make_input(choice.input, choice.input_options) if choice.input else None
    spec = LinearSpec(fmt, replace(steps, quant=quant))
    for part in [] if calibrated else [part for part, needs in parts.items() if needs]:
        raise PlanError(
            f"{view.name}: {part} calibrates, and experts of a mixture are not calibrated yet. "
            f"Use --method rtn, or leave them dense with --ignore '*.experts.*'."
        )
    _refuse_rounding(view, spec)
    if quant is not None and quant.calibrated and not calibrated:
        raise PlanError(
            f'{view.name}: input "{choice.input}" calibrates, and experts of a mixture are not calibrated yet. '
            "Leave their inputs as they are, --set '*.experts.*:input=none'."
        )
    return ModulePlan(view, spec, method, choice.method)


def _refuse_rounding(view: WeightView, spec: LinearSpec) -> None:
    """Raise `PlanError` where an input can't be rounded and multiplied as integers."""
    quant = spec.input.quant
    if quant is None:
        return
    reason = refuse_input(spec)
    if reason:
        usable = [n for n in plugins.names("formats") if isinstance(plugins.get("formats", n)(), IntegerFormat)]
        raise PlanError(f"{view.name}: {reason}. Formats with integers: {', '.join(usable)}.")
    if view.index is not None:
        stack = view.param.split(".")[-2]
        raise PlanError(
            f"{view.name}: experts of a stack are decoded one by one, and their inputs can't be rounded yet. Leave "
            f"those as they are, --set '*.{stack}.*:input=none'."
        )
    if quant.calibrated and spec.input.hadamard:
        raise PlanError(
            f'{view.name}: input "{quant.name}" is calibrated feature by feature, and a rotation mixes features. '
            "Find its scale when it runs: --input token, or -s input.static=false where there is that option."
        )


def usable_formats(method: LinearMethod) -> list[str]:
    """Names of formats that a method accepts with their default options."""
    return [name for name in plugins.names("formats") if method.reject(plugins.get("formats", name)()) is None]


def _other_method(name: str, fmt: Format) -> str:
    for other in plugins.names("methods"):
        if other != name and plugins.get("methods", other)().reject(fmt) is None:
            return f' Did you mean method "{other}"?'
    return ""


def _grouped(*tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Modules with equal entries together, so that a manifest does not repeat itself: [{entries, modules}]."""
    kinds: dict[str, dict[str, Any]] = {}
    for name in tables[0]:
        entry = {"spec": tables[0][name], "method": tables[1][name]}
        kinds.setdefault(dump_json(entry), {**entry, "names": []})["names"].append(name)
    return list(kinds.values())


def dense_tensors(plan: Plan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """State-dict names, dtypes and shapes of what is stored dense: all that no packed tensor replaces.

    Where head and embedding were one tensor, the one that stays dense has it under its own name.
    """
    anatomy = plan.anatomy
    gone = {m.view.param for m in plan.modules.values()}
    kept = {name: meta for name, meta in anatomy.parameters.items() if name not in gone}
    head = anatomy.head
    if head is None:
        return kept
    if plan.unties and plan.embedding is None:
        kept[anatomy.embedding] = anatomy.parameters[head.param]
    if plan.unties and plan.head is None:
        kept[f"{head.name}.weight"] = anatomy.parameters[head.param]
    if anatomy.shared_bias is not None and (plan.unties or plan.head is not None):
        # The config of an untied or packed head ties nothing any more, its bias neither.
        kept[f"{head.name}.bias"] = anatomy.parameters[anatomy.shared_bias]
    return kept


def stored_parameters(plan: Plan) -> int:
    """Parameters of the output, each as often as it is stored."""
    packed = sum(m.view.n * m.view.k for m in plan.modules.values())
    return packed + sum(math.prod(shape) for _, shape in dense_tensors(plan).values())


def micro_batch(plan: Plan) -> int:
    """Sequences that run through a block at a time."""
    assert plan.calibration is not None
    return max(MICRO_BATCH_TOKENS // plan.calibration.seqlen, 1)
