"""The job: stream a model through memory one decoder layer at a time and leave a packed checkpoint.

    tokens -> hidden states -> for each layer: statistics, methods, pack, check, write, run again with what was written

A layer's file is renamed into place before its journal line is written, and a journal line is on disk before the next
layer starts. Whoever kills the job loses one layer; the next run rebuilds the hidden states from the files.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qexport import schema
from qexport.calibration import Calibration, Tokens
from qexport.calibration import tokens as calibration_tokens
from qexport.checkpoint import Journal, Reader, ShardWriter, Written, dump_json, write_tensors, write_text
from qexport.choose import CHOICE_FILE, as_json, candidates, described, total_errors
from qexport.collect import Screen, collect, judges
from qexport.container import read_shard_metadata, shard_metadata
from qexport.errors import CalibrationError, QExportError
from qexport.events import LayerDone, Note, Observer, Started, ignore
from qexport.finish import Outcome, finish, outcome_of, peak_rss_bytes
from qexport.formats.base import Format
from qexport.formats.specs import LinearSpec, to_json
from qexport.kv import CALIBRATION_FILE, Job, put
from qexport.layer import Layer, Loss, Solved, Trial, calibrated, no_loss, output_change, tuned
from qexport.methods.base import LinearMethod, Result
from qexport.models import Block, LinearGroup, Skeleton, Source, Turned, skeleton
from qexport.output import claimed, clear, refuse_full_disk, settle, survey
from qexport.plan import ModulePlan, Plan, dense_tensors, micro_batch
from qexport.predict import predict
from qexport.schema import Tensors
from qexport.statistics import Hessian, Statistic
from qexport.stored import stored_block
from qexport.transforms.base import Change

_Group: TypeAlias = tuple[list[ModulePlan], Mapping[type[Statistic], Tensor], Change]
"""Modules that are solved together, with the statistics of their input, and what they do to it when they run."""


def quantize(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    observer: Observer = ignore,
    restart: bool = False,
    device: str = "cpu",
    command: str | None = None,
    make_tokens: Callable[..., Tokens] = calibration_tokens,
) -> Outcome:
    """Quantize a model into a folder, or go on where an earlier call was interrupted.

    Args:
        plan: what to do.
        source: the opened model that the plan was made for.
        out: a new or empty folder, or one that the same plan left unfinished.
        observer: is told of progress.
        restart: delete what an earlier job left in `out` and start again.
        device: where to compute.
        command: what the user called, for the record of the run.
        make_tokens: makes the calibration tokens, as `calibration.tokens` does; jobs of one model may share theirs.

    Nothing is written or deleted before the calibration tokens are there: a mistake in the options costs nothing.

    Raises:
        ResumeError: `out` holds something else, another job writes to it, or its disk is too full.
        CalibrationError: the data is unfit; names the module.
    """
    start = time.perf_counter()
    with claimed(out):
        found = survey(out)
        anew = restart or found.discarded
        if not anew and settle(out, found, plan):
            observer(Note(f"{out} is complete already; its weights stay. `qexport verify` checks its files."))
            return _with_cache(plan, out, outcome_of(out), device, observer)
        refuse_full_disk(out, predict(plan, flops_per_second=1.0).nbytes)
        made = None
        if plan.calibration is not None and (anew or CALIBRATION_FILE not in found.files):
            made = make_tokens(source, plan.calibration, device=device, observer=observer)
        if anew and found.digest is not None:
            clear(out, found)
        journal = Journal(out, plan.digest, plan.as_json())
        job = _Job(plan, source, out, observer, torch.device(device), journal)
        resumed = job.run(made)
        outcome = finish(
            plan, source, out, journal, seconds=time.perf_counter() - start, resumed=resumed, command=command
        )
        return _with_cache(plan, out, outcome, device, observer)


def _with_cache(plan: Plan, out: Path, outcome: Outcome, device: str, observer: Observer) -> Outcome:
    """Give a finished folder the cache of the plan; where the recipe says nothing of one, what is there stays."""
    if not plan.recipe.kv or (plan.kv is None and outcome.kv is None):
        return outcome
    start = time.perf_counter()
    job = Job(plan.kv_calibration or Calibration(), device=device, dtype=plan.dtype)
    figures = put(out, plan.kv, job, observer=observer)
    took = time.perf_counter() - start
    seconds = None if outcome.seconds is None else outcome.seconds + took
    peak = None if outcome.peak_rss_bytes is None else max(outcome.peak_rss_bytes, peak_rss_bytes())
    return replace(outcome, kv=figures, seconds=seconds, peak_rss_bytes=peak)


def read_tokens(out: Path) -> Tensor:
    """The token ids that an output was calibrated with, int64 [samples, seqlen]."""
    return Reader(out, [CALIBRATION_FILE]).read("input_ids").long()


class _Job:
    """One run of the job; its state is the hidden states, the journal and the shard it is at."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        out: Path,
        observer: Observer,
        device: torch.device,
        journal: Journal,
    ) -> None:
        self.plan, self.out, self.observer = plan, out, observer
        turning = plan.stream
        self.source = source if turning is None else Turned.of(source, turning, self.rng("rotation of the states"))
        self.device, self.dtype, self.journal = device, getattr(torch, plan.dtype), journal
        self.blocks = plan.anatomy.blocks
        self.shards = len(self.blocks) + 1
        self.hidden: list[Tensor] = []
        self.bones: Skeleton | None = None

    def run(self, made: Tokens | None) -> int:
        """All layers and the rest of the model, from new calibration tokens or those of the earlier run.

        Returns:
            How many layers were there already.
        """
        if made is not None:
            ids = {"input_ids": made.ids.int()}
            self.journal.add(write_tensors(self.out / CALIBRATION_FILE, ids, made.origin), origin=made.origin)
        resumed = sum(self.shard_name(i) in self.journal.done for i in range(len(self.blocks)))
        if resumed == len(self.blocks) and self.shard_name(len(self.blocks)) in self.journal.done:
            return resumed
        if self.plan.needs_data:
            self.choose()
            self.start_stream()
        self.observer(Started("quantize", len(self.blocks), "layer"))
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                began = time.perf_counter()
                name = self.shard_name(index)
                if name in self.journal.done:
                    self.replay(index, block)
                    error, known = self.journal.done[name].get("error"), True
                else:
                    error, known = self.layer(index, block), False
                seconds = time.perf_counter() - began
                self.observer(LayerDone(index, len(self.blocks), block.name, error, seconds, resumed=known))
            if self.shard_name(len(self.blocks)) not in self.journal.done:
                self.rest()
        return resumed

    def shard_name(self, index: int) -> str:
        """File of layer `index`; the last one holds all that is outside the layers."""
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def choose(self) -> None:
        """Settle what transforms search for the whole model, or take what the earlier run settled."""
        ways = candidates(self.plan.transforms)
        if len(ways) == 1:
            return
        if CHOICE_FILE not in self.journal.done:
            self.start_stream()
            assert self.bones is not None
            errors = total_errors(self.plan, self.source, self.bones, self.hidden, self.device, self.observer)
            best = errors.index(min(errors))
            facts = {"tried": [as_json(way) for way in ways], "errors": errors, "chosen": as_json(ways[best])}
            written = write_text(self.out / CHOICE_FILE, dump_json(facts, indent=1) + "\n")
            self.journal.add(written, chosen=facts["chosen"])
        taken = self.journal.done[CHOICE_FILE]["chosen"]
        chosen = next(way for way in ways if as_json(way) == taken)
        self.observer(Note(f"Chosen for the whole model: {described(chosen)}."))
        self.plan = replace(self.plan, transforms=chosen)

    # ---- the stream ----

    def start_stream(self) -> None:
        """The hidden states that enter the first layer."""
        ids = read_tokens(self.out)
        self.bones = skeleton(self.source, self.plan.anatomy, dtype=self.dtype, device=self.device, seqlen=ids.shape[1])
        self.observer(Started("embed", ids.shape[0], "sequence"))
        with torch.no_grad():
            self.round_embedding()
            self.hidden = [self.bones.embed(part).cpu() for part in ids.split(micro_batch(self.plan))]
        self.bones.forget_embedding()

    def round_embedding(self) -> None:
        """Give the stream the token embedding that will be written: rounding it twice costs less than keeping it."""
        planned = self.plan.embedding
        if planned is None:
            return
        assert self.bones is not None
        for found in self.solved([([planned], {}, Change())], Layer(self.plan, self.source, self.device)):
            self.bones.put_embedding(found.spec.decoded(found.spec.pack(found.fields, found.inputs), *found.w.shape))

    def replay(self, index: int, block: Block) -> None:
        """Push the hidden states through a layer as its file has it, be it of this run or of an earlier one."""
        if not self.plan.needs_data:
            return
        assert self.bones is not None
        file = self.shard_name(index)
        reader = Reader(self.out, [file])
        specs = {name: spec for name, (spec, _, _) in read_shard_metadata(reader.metadata[file], file).items()}
        # Norms and biases that transforms changed.
        dense = [name for name in reader.names if self.plan.folds and name in self.plan.anatomy.parameters]
        module = stored_block(self.bones, index, block, reader, specs, dense=dense, device=self.device)
        for i, part in enumerate(self.hidden):
            self.hidden[i] = self.bones.run(index, module, part.to(self.device)).cpu()

    # ---- one layer ----

    def layer(self, index: int, block: Block) -> float | None:
        """Quantize, write and advance one layer; returns its mean relative output error, if there is data."""
        stats = {}
        if self.plan.needs_data:
            assert self.bones is not None
            stats = collect(self.plan, self.bones, index, block, self.hidden, self.device, self.observer)
        own = Layer(self.plan, self.source, self.device)
        error = self.pack(index, block.name + ".", self.groups(index, block, stats, own), own)
        self.replay(index, block)
        return error if self.plan.needs_data else None

    def pack(self, index: int, prefix: str, groups: Iterable[_Group], own: Layer) -> float | None:
        """Solve groups, check what comes out, and write it with the dense tensors below `prefix` as one shard.

        Returns:
            The mean relative error over the shard's modules, None if there are none.
        """
        packed: dict[str, dict[str, Tensor]] = {}
        specs: dict[str, LinearSpec] = {}
        facts: dict[str, dict[str, float]] = {}
        solved = self.solved(groups, own)
        if self.bones is not None and self.plan.block.passes and prefix:
            rng = self.rng("tuning of " + prefix)
            solved = iter(tuned(self.plan.block, self.bones, index, list(solved), own.dense, self.hidden, rng))
        for found in solved:
            view = found.planned.view
            tensors = found.spec.pack(found.fields, found.inputs)
            found.spec.check(tensors, view.n, view.k, view.name)
            decoded = found.spec.decoded(tensors, view.n, view.k)
            facts[view.name] = {**found.facts, "error": relative_error(found.w, decoded, found.hessian)}
            packed[view.name] = {name: t.cpu() for name, t in tensors.items()}
            specs[view.name] = found.spec
        written = self.write(self.shard_name(index), prefix, packed, specs, own.dense)
        error = sum(f["error"] for f in facts.values()) / len(facts) if facts else None
        self.journal.add(written, error=error, modules=facts, specs=self.spec_facts(specs, packed))
        return error

    def groups(
        self, index: int, block: Block, stats: dict[LinearGroup, dict[type[Statistic], Tensor]], own: Layer
    ) -> Iterator[_Group]:
        """Planned modules that are solved together, with their statistics, which nobody else keeps.

        All transforms decide first: one may change what a linear solved earlier has to be.
        """
        modules = self.plan.modules
        found = [[modules[v.name] for v in group.members if v.name in modules] for group in block.groups]
        changes: dict[LinearGroup, Change] = {}
        if self.plan.transforms:
            trial = None
            if self.bones is not None:
                trial = Trial(self.bones, index, judges(self.plan, self.hidden).to(self.device))
            for group, planned in zip(block.groups, found, strict=True):
                if planned:
                    rng = self.rng("transforms of " + planned[0].view.name)
                    before = stats.pop(group, {})
                    loss = no_loss if trial is None else partial(trial.loss, planned, before)
                    stats[group], changes[group] = own.transform(planned, before, loss, rng)
                    del before, loss
            del trial
        for group, planned in zip(block.groups, found, strict=True):
            if planned:
                yield planned, stats.pop(group, {}), changes.get(group, Change())
        for view in block.experts:
            if view.name in modules:
                rng = self.rng("transforms of " + view.name)
                yield [modules[view.name]], *own.transform([modules[view.name]], {}, no_loss, rng)

    def rng(self, what: str) -> torch.Generator:
        """Random numbers for something, the same in every run of the job."""
        return torch.Generator().manual_seed(seed_of(self.plan.seed, what))

    def solved(self, groups: Iterable[_Group], own: Layer) -> Iterator[Solved]:
        """Run each method over the members of a group that use it, group by group."""
        for members, stats, change in groups:
            hessian = stats.get(Hessian)
            changed = stats if hessian is None else {**stats, Hessian: change.hessian(hessian)}
            for method in _distinct([m.method for m in members]):
                mine = [m for m in members if m.method == method]
                weights = [own.weight(m.view) for m in mine]
                for member, w in zip(mine, weights, strict=True):
                    if not torch.isfinite(w).all():
                        raise QExportError(
                            f"{member.view.name}: the weight holds NaN or infinity. Check the source model."
                        )
                for member, w, (fmt, result) in zip(
                    mine, weights, self.solve(mine, weights, changed, change), strict=True
                ):
                    perm = {} if result.perm is None else {"perm": result.perm}
                    static = calibrated(member, change.statistics(stats), result.perm)
                    inputs = {**change.stored, **perm, **static}
                    spec = LinearSpec(fmt, member.spec.input)
                    yield Solved(member, spec, result.fields, inputs, w, hessian, result.diagnostics)

    def solve(
        self, members: list[ModulePlan], weights: list[Tensor], stats: Mapping[type[Statistic], Tensor], change: Change
    ) -> list[tuple[Format, Result]]:
        """Run the one method of some linears."""
        weights = [change.weight(w) for w in weights]
        fmts = [m.spec.weight.resolve(w) for m, w in zip(members, weights, strict=True)]
        first = members[0]
        try:
            results = first.method.quantize_group(weights, stats, fmts, self.rng(first.view.name))
        except CalibrationError as error:
            raise CalibrationError(f"{first.view.name}: {error}") from error
        return list(zip(fmts, results, strict=True))

    # ---- the rest of the model ----

    def rest(self) -> None:
        """Everything outside the layers: embeddings, norms, other towers, and the head, packed or not."""
        embedding, head = self.plan.embedding, self.plan.head
        own = Layer(self.plan, self.source, self.device)
        groups: list[_Group] = [] if embedding is None else [([embedding], {}, Change())]
        if head is not None:
            groups.append(self.head_group(head, own))
        self.hidden.clear()
        self.pack(len(self.blocks), "", groups, own)

    def head_group(self, planned: ModulePlan, own: Layer) -> _Group:
        """The head with statistics of its input."""
        stats = self.head_stats(planned)
        loss: Loss = no_loss
        if self.plan.transforms and self.bones is not None:
            x = self.bones.finish(self.hidden[0][:1].to(self.device)).flatten(0, -2).float()
            loss = partial(output_change, x, own.weight(planned.view), planned, stats)
        return [planned], *own.transform([planned], stats, loss, self.rng("transforms of " + planned.view.name))

    def head_stats(self, planned: ModulePlan) -> dict[type[Statistic], Tensor]:
        """Statistics of the head's input."""
        kinds = self.plan.needs(LinearGroup((planned.view,)))
        if not kinds:
            return {}
        assert self.bones is not None
        found = [kind(planned.view.k) for kind in kinds]
        screen = Screen(planned.view.name, found)
        for part in self.hidden:
            screen.take(self.bones.finish(part.to(self.device)))
        screen.report(self.observer)
        return {type(c): c.result() for c in found}

    # ---- files ----

    def write(
        self,
        file: str,
        prefix: str,
        packed: Mapping[str, Mapping[str, Tensor]],
        specs: Mapping[str, LinearSpec],
        changed: Tensors,
    ) -> Written:
        """One shard: packed modules, and the dense tensors below `prefix` ("" means all outside the layers).

        Dense tensors come from `changed` if they are there, otherwise from the source.
        """
        plan = self.plan
        inside = tuple(b.name + "." for b in plan.anatomy.blocks)
        dense = {
            name: meta
            for name, meta in dense_tensors(plan).items()
            if (name.startswith(prefix) if prefix else not name.startswith(inside))
        }
        fields = {f"{module}.{name}": t for module, tensors in packed.items() for name, t in tensors.items()}
        entries = {name: (t.dtype, tuple(t.shape)) for name, t in fields.items()}
        entries |= dense
        described = {name: (spec, plan.modules[name].view.n, plan.modules[name].view.k) for name, spec in specs.items()}
        with ShardWriter(self.out / file, entries, shard_metadata(described)) as writer:
            for name in writer.order:
                found = fields.get(name, changed.get(name))
                writer.write(name, self.source.chunks(name) if found is None else found)
        assert writer.result is not None
        return writer.result

    def spec_facts(
        self, specs: Mapping[str, LinearSpec], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Any]]:
        """What the config must say about each module of a shard."""
        out = {}
        for name, spec in specs.items():
            view = self.plan.modules[name].view
            extents = schema.extents_of(packed[name], spec.layout(view.n, view.k))
            out[name] = {
                "spec": to_json(spec),
                "extents": extents,
                "nbytes": sum(t.nbytes for t in packed[name].values()),
            }
        return out


def _distinct(methods: list[LinearMethod]) -> list[LinearMethod]:
    """Each method once, in order of appearance."""
    return [m for i, m in enumerate(methods) if m not in methods[:i]]


def seed_of(seed: int, path: str) -> int:
    """Seed of a module's random numbers, from the job's seed and the module's path."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little") >> 1


def relative_error(w: Tensor, decoded: Tensor, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - decoded; without a Hessian, H is the identity."""
    d = w - decoded
    if hessian is None:
        return float(d.square().sum() / w.square().sum().clamp(min=1e-30))
    return float(((d @ hessian) * d).sum() / ((w @ hessian) * w).sum().clamp(min=1e-30))
