"""`evaluate`: one model, everything that was asked for, one JSON document, a line of the record for each figure."""

import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.calibration import bos_id, encode
from qexport.errors import CheckpointError, UsageError
from qexport.evaluate import loading, record
from qexport.evaluate.fidelity import Pairs, compare, mean_and_error, summary
from qexport.evaluate.harness import Score, Tasks, find_tasks, run_tasks
from qexport.evaluate.loading import DTYPES, Load, Loader, Reference
from qexport.evaluate.needle import needle as needles
from qexport.evaluate.needle import usual_lengths
from qexport.evaluate.perplexity import Perplexity, observations, perplexity
from qexport.evaluate.record import Line, Record
from qexport.evaluate.size import Sizes, measure
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Text, Windows, cut, draw, read_text
from qexport.events import Note, Observer, ignore
from qexport.formats.kv.base import kv_name
from qexport.pictures import heat_map
from qexport.runtime.cache import chosen, forgo, keep

DEFAULT_SEQLEN = 2048
ONCE = "once"  # a policy for BOS: in front of the text, as GPTQ's code does


@dataclass(frozen=True)
class Setting:
    """How a measurement is made.

    Attributes:
        seqlen: tokens of a window; default 2048, or the model's context if that is shorter.
        stride: text tokens between the starts of windows; default `seqlen`.
        windows: at most so many windows of each text.
        bos: `auto`, `always`, `never` or `once`.
        limit: at most so many documents of each task.
        fewshot: examples before each question of a task; default: as many as the task says.
        batch: windows that run together.
        backend: of the packed model.
        dtype: compute dtype; by default float32 on a CPU and the checkpoint's own elsewhere.
        device: by default a GPU if there is one.
        kv: cache to read through, `"none"` for the model's own; default: that of the checkpoint.
        kv_options: of its format.
    """

    seqlen: int | None = None
    stride: int | None = None
    windows: int | None = None
    bos: str = "auto"
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 1
    backend: str = "auto"
    dtype: str | None = None
    device: str | None = None
    kv: str | None = None
    kv_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype!r}: expected {', '.join(DTYPES)}.")


def evaluate(
    target: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    seqlen: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    bos: str = "auto",
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    against: str | Path | None = None,
    batch: int = 1,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    cache_gb: float = 0.0,
    kv: str | None = None,
    kv_options: Mapping[str, Any] | None = None,
    needle: bool = False,
    reuse: bool = False,
    keep_logits: bool = True,
    revision: str | None = None,
    token: str | None = None,
    loader: Loader | None = None,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Measure a packed or dense model, and add what was found to its `results.jsonl`; see `evaluate.record`.

    Args:
        target: directory or Hub id.
        texts: files or names of texts; default `builtin`, unless only tasks are asked for.
        seqlen: see `Setting`, as are stride, windows, bos, limit, fewshot, batch, backend, dtype, device, kv and
            kv_options.
        stride: as above.
        windows: as above.
        bos: as above.
        tasks: presets, and tasks of lm-eval.
        include_path: folder with task files of your own.
        limit: as above.
        fewshot: as above.
        against: the original model: a directory, a Hub id or a `.gguf` file.
        batch: as above.
        backend: as above.
        dtype: as above.
        device: as above.
        cache_gb: memory for decoded weights, in 1e9 bytes.
        kv: as above.
        kv_options: as above.
        needle: also ask for needles; draws a picture into a local packed directory, else into the current one.
        reuse: take figures from `results.jsonl` that were measured in the same way with the same versions.
        keep_logits: keep the original's logits on disk, and take them from there.
        revision: of a Hub id in `target`.
        token: for the Hub.
        loader: `qexport.load`, or another function with its signature.
        observer: is told of progress.

    Returns:
        `{bits_per_weight, bits_per_parameter, bytes, perplexity, fidelity, tasks}`; `perplexity` is by text,
        `fidelity` is None without `against`, `tasks` is empty without tasks. Through a quantized cache also `kv`, see
        `Through.to_json`; with `needle` also that, see `evaluate.needle`, and its `picture`, a file.

    Raises:
        UsageError: an option that does not exist or does not fit the model.
        SourceError: a model, text or data set can't be had.
        CheckpointError: a file is damaged, or predictions are not finite.
    """
    cache = kv_options or {}
    setting = Setting(seqlen, stride, windows, bos, limit, fewshot, batch, backend, dtype, device, kv, cache)
    sources = _distinct(texts or (() if (tasks or needle) and against is None else ("builtin",)))
    contents = [read_text(source) for source in sources]
    wanted = find_tasks(tasks, include_path) if tasks else None
    folder, local = loading.find_folder(target, revision, token)
    load = loading.load_of(loader, device=device, dtype=dtype, backend=backend, cache_gb=cache_gb, token=token)
    asked = {"text": [Path(s).name for s in sources], "tasks": ",".join(tasks), "needle": needle, "against": against}
    job = _Job(folder, local and record.is_packed(folder), str(target), setting, load, asked, reuse, observer)
    cuts = [job.cut(text) for text in contents]
    original = None
    if against is not None:
        original = loading.reference(against, load, batch=batch, keep=keep_logits, observer=observer)
    found = _texts(job, contents, cuts, original)
    result = {**_sizes(job), **found, "tasks": _tasks(job, wanted, found["perplexity"])}
    if needle:
        result["needle"] = _needle(job, contents)
    if job.kv:
        result["kv"] = job.kv[-1]
    return result


@dataclass
class _Job:
    """One model and how it is measured; the model is loaded when something has to be measured.

    Attributes:
        folder: where it is.
        own: whether that is a packed folder of the user's.
        name: what the user called it.
        setting: how.
        load: how models are loaded.
        asked: what is measured, as options of the command line.
        reuse: whether recorded figures are taken.
        observer: is told of progress.
        kv: what was read through a quantized cache, newest last.
    """

    folder: Path
    own: bool
    name: str
    setting: Setting
    load: Load
    asked: dict[str, Any]
    reuse: bool
    observer: Observer
    kv: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Any:
        return loading.tokenizer_of(self.folder)

    @cached_property
    def config(self) -> Any:
        return loading.config_of(self.folder)

    @cached_property
    def model(self) -> Any:
        return self.load.folder(self.folder)

    @cached_property
    def through(self) -> Through | None:
        """The model with the cache that it is measured through, which its `generate` takes too; None for its own."""
        found = chosen(self.model, self.setting.kv, self.setting.kv_options)
        if found is None:
            forgo(self.model)
            return None
        through = Through(self.model, found.fmt, found.statics)
        keep(self.model, found.fmt, found.statics)
        return through

    @cached_property
    def weights(self) -> str:
        return record.weights_id(self.folder)

    @cached_property
    def path(self) -> Path:
        return record.results_path(self.folder, self.weights, own=self.own)

    @cached_property
    def lines(self) -> list[Line]:
        return record.read_results(self.path, self.observer) if self.reuse else []

    @property
    def seqlen(self) -> int:
        """Tokens of a window; raises `UsageError` where the model's context has fewer."""
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        seqlen = self.setting.seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
        if context and seqlen > context:
            raise UsageError(f"--seqlen {seqlen}: the model's context has {context} tokens. Use at most so many.")
        return seqlen

    def cut(self, text: Text) -> Windows:
        """The windows of a text."""
        s, once = self.setting, self.setting.bos == ONCE
        bos = bos_id(self.tokenizer, "auto" if once else s.bos)
        front = torch.tensor([bos] if once and bos is not None else [], dtype=torch.int64)

        def tokens(content: str) -> torch.Tensor:
            return torch.cat([front, encode(self.tokenizer, content)])

        each = None if once else bos
        if text.documents:
            if s.stride is not None:
                raise UsageError(f"--stride: the windows of {text.name} are drawn here and there. Leave it out.")
            return draw(text.name, text.documents, tokens, seqlen=self.seqlen, limit=s.windows, bos=each)
        return cut(
            text.name, tokens(text.content),
            seqlen=self.seqlen, stride=s.stride, limit=s.windows, bos=each, observer=self.observer,
        )  # fmt: skip

    def record(
        self, what: str, name: str, protocol: Mapping[str, Any], figure: float | None = None,
        se: float | None = None, details: Mapping[str, Any] | None = None,
    ) -> Record:  # fmt: skip
        """A line for this model, measured as it is."""
        s = self.setting
        how = {
            "weights": self.weights, "backend": s.backend, "device": self.load.place, "batch": s.batch,
            "kv": None if s.kv is None and not s.kv_options else {"name": s.kv, "options": dict(s.kv_options)},
        }  # fmt: skip
        full = {"dtype": self.load.dtype_name(self.config), **protocol}
        return Record(what, name, figure, se, full, how, details or {})

    def known(self, wanted: Record) -> Line | None:
        """The recorded figure, if there is one and it may be taken."""
        found = record.newest(self.lines, wanted)
        if found is not None:
            said = f"{wanted.what} of {wanted.name}: {found['figure']} was measured so on {str(found.get('time'))[:10]}"
            self.observer(Note(f"{said} and is not measured again"))
            self.kv += [found["details"]["kv"]] if found["details"].get("kv") else []
        return found

    def keep(self, *records: Record) -> None:
        """Add lines to the record."""
        s = self.setting
        options = {
            **self.asked, "seqlen": s.seqlen, "stride": s.stride, "windows": s.windows, "limit": s.limit,
            "fewshot": s.fewshot, "kv": s.kv, "dtype": s.dtype, "device": s.device,
            "bos": None if s.bos == "auto" else s.bos, "backend": None if s.backend == "auto" else s.backend,
            "batch": None if s.batch == 1 else s.batch,
        }  # fmt: skip
        settings = [word for key, value in s.kv_options.items() for word in ("-s", f"kv.{key}={value}")]
        against = self.asked["against"]
        options["against"] = None if against is None else loading.public_name(str(against))
        words = ["qexport", "eval", loading.public_name(self.name), *loading.spelled(options), *settings]
        record.append(self.path, records, command=shlex.join(words), observer=self.observer)

    def read_cache(self) -> dict[str, Any]:
        """For the details of a line: what was read through a quantized cache."""
        if self.through is None:
            return {}
        self.kv.append(self.through.to_json())
        return {"kv": self.kv[-1]}


def _distinct(texts: Sequence[str | Path]) -> Sequence[str | Path]:
    names = [Path(text).name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--text {name}: given twice; results go by the base name. Rename one of the files.")
    return texts


def _sizes(job: _Job) -> dict[str, Any]:
    try:
        sizes: Sizes = measure(job.folder)
    except CheckpointError:  # files that don't explain themselves are explained by the model
        sizes = measure(job.folder, job.model)
    return {
        "bits_per_weight": sizes.bits_per_weight,
        "bits_per_parameter": sizes.bits_per_parameter,
        "bytes": sizes.nbytes,
    }


# ---- texts -------------------------------------------------------------------------------------


def _protocol(text: Text, windows: Windows) -> dict[str, Any]:
    ids = hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()
    return {
        "text": text.sha256, "windows": len(windows.scored), "seqlen": windows.seqlen, "stride": windows.stride,
        "bos": windows.bos, "ids": ids,
    }  # fmt: skip


def _texts(job: _Job, texts: Sequence[Text], cuts: Sequence[Windows], original: Reference | None) -> dict[str, Any]:
    """`perplexity` and `fidelity` of the result, from the record or measured."""
    protocols = {w.name: _protocol(text, w) for text, w in zip(texts, cuts, strict=True)}
    lines = {name: job.known(job.record("perplexity", name, own)) for name, own in protocols.items()}
    if original is None:
        missing = [w for w in cuts if lines[w.name] is None]
        if missing:
            found = perplexity(job.model, missing, batch=job.setting.batch, through=job.through, observer=job.observer)
            job.keep(*(_perplexity(job, p, protocols[p.windows.name]) for p in found))
            lines |= {p.windows.name: {"details": p.to_json()} for p in found}
        return {"perplexity": {name: _document(line) for name, line in lines.items()}, "fidelity": None}
    against = {name: {**own, "against": original.weights} for name, own in protocols.items()}
    if len(cuts) > 1:
        against[" + ".join(protocols)] = {"texts": protocols, "against": original.weights}
    pooled = [job.known(job.record("fidelity", name, own)) for name, own in against.items()]
    if all(pooled) and all(lines.values()):
        return {
            "perplexity": {name: _document(line) for name, line in lines.items()}, "fidelity": _document(pooled[-1])
        }  # fmt: skip
    pairs = compare(
        job.model, original.original, cuts, batch=job.setting.batch, through=job.through, observer=job.observer
    )
    records = [_perplexity(job, pair.perplexity, protocols[pair.windows.name]) for pair in pairs]
    groups = [[pair] for pair in pairs] + ([pairs] if len(pairs) > 1 else [])
    for group, (name, own) in zip(groups, against.items(), strict=True):
        records.append(_fidelity(job, group, name, own, original.name))
    job.keep(*records)
    return {"perplexity": {p.windows.name: p.perplexity.to_json() for p in pairs}, "fidelity": summary(pairs)}


def _document(line: Any) -> dict[str, Any]:
    return {key: value for key, value in line["details"].items() if key not in ("observations", "against", "kv")}


def _perplexity(job: _Job, found: Perplexity, protocol: Mapping[str, Any]) -> Record:
    _, se = mean_and_error(found.loss, found.windows.scored)
    details = {**found.to_json(), "observations": observations(found.windows, loss=found.loss), **job.read_cache()}
    return job.record(
        "perplexity", found.windows.name, protocol, found.value, None if se is None else found.value * se, details
    )


def _fidelity(job: _Job, pairs: Sequence[Pairs], name: str, protocol: Mapping[str, Any], original: str) -> Record:
    own = summary(pairs)
    # With several texts, the observations of each stand in its own line.
    seen = pairs[0].observations() if len(pairs) == 1 else {}
    details = {**own, "against": original, "observations": seen, **job.read_cache()}
    return job.record("fidelity", name, protocol, own["kl"]["mean"], own["kl"]["se"], details)


def _needle(job: _Job, texts: Sequence[Text]) -> dict[str, Any]:
    """Scores of needles in the first text, or in the built-in one, and their picture."""
    text = texts[0] if texts else read_text("builtin")
    lengths = usual_lengths(job.tokenizer, job.seqlen)
    bos = bos_id(job.tokenizer, "auto" if job.setting.bos == ONCE else job.setting.bos)
    found = needles(
        job.model, job.tokenizer, text.content, lengths=lengths, bos=bos, through=job.through, observer=job.observer
    )
    name = kv_name(None if job.through is None else job.through.fmt)
    path = (job.folder if job.own else Path()) / f"needle-{name}.png"
    heat_map(
        path, found["score"], rows=[str(n) for n in lengths], columns=[f"{d:.0%}" for d in found["depths"]],
        title=f"needle in {text.name}, cache {name}", row_label="tokens", column_label="depth",
    )  # fmt: skip
    mean = torch.tensor(found["score"]).double().mean().item()
    protocol = {"text": text.sha256, "lengths": list(lengths), "depths": found["depths"], "bos": bos is not None}
    job.keep(job.record("needle", text.name, protocol, mean, None, {**found, **job.read_cache()}))
    return {**found, "text": text.name, "picture": str(path)}


# ---- tasks -------------------------------------------------------------------------------------


def _tasks(job: _Job, tasks: Tasks | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of tasks, from the record or measured; a task that is finished is recorded before the next begins."""
    if tasks is None:
        return {}
    s = job.setting
    keys = {}
    for name in tasks.loaded:
        protocol = {**tasks.hashes(name, s.limit), "limit": s.limit, "fewshot": s.fewshot, "bos": s.bos}
        keys[name] = job.record("task", name, protocol)
    lines = {name: job.known(key) for name, key in keys.items()}
    found: dict[str, Any] = {}
    for line in lines.values():
        found |= line["details"]["metrics"] if line else {}
    missing = [name for name, line in lines.items() if line is None]
    try:
        for score in _run(job, tasks, missing) if missing else ():
            found |= score.metrics
            own = {"metrics": score.metrics, "metric": score.metric, "documents": score.documents, **job.read_cache()}
            job.keep(job.record("task", score.name, keys[score.name].protocol, score.value, score.se, own))
    except BaseException:
        for name, text in measured.items():
            job.observer(Note(f"measured before the tasks failed: perplexity of {name} {text['value']:.4f}"))
        raise
    return dict(sorted(found.items()))


def _run(job: _Job, tasks: Tasks, names: Sequence[str]) -> Iterator[Score]:
    s = job.setting
    return run_tasks(
        job.model, job.tokenizer, tasks=tasks, names=names, limit=s.limit, fewshot=s.fewshot, bos=s.bos,
        through=job.through, observer=job.observer,
    )  # fmt: skip
