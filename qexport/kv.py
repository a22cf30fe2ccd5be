"""Giving a packed checkpoint a quantized cache, another one, or none. Files of weights stay as they are.

    tokens -> the packed model, a few sequences at a time -> what a format needs -> cache.safetensors, config, manifest

Whenever it is killed, the folder loads as before or as after: the new tensors are written beside the old ones, the
config is renamed into place, then they are. What is left undone `qexport verify` names and a repeated call does.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qexport import caching, kvfile
from qexport.calibration import Calibration, Tokens, ids_sha256, tokens_of
from qexport.checkpoint import Journal, Reader, dump_json, read_json, sha256, sync_folder, write_tensors, write_text
from qexport.container import METADATA_KEY, parse
from qexport.errors import CheckpointError, UsageError
from qexport.events import Advanced, Note, Observer, Started, ignore
from qexport.finish import MANIFEST, Outcome, outcome_of, peak_rss_bytes
from qexport.formats.kv.base import KVFormat, kv_json
from qexport.integrations.transformers import load_model
from qexport.kvfile import FILE, PENDING, WORK, Heads, Statics, calibrates
from qexport.models import heads_of
from qexport.models.auto import read_tokenizer
from qexport.output import claimed
from qexport.plan import CACHE_BATCH_TOKENS, method_for
from qexport.schema import Tensors

CALIBRATION_FILE = "calibration.safetensors"
PHASE = "calibrate the cache"
_STATE = "state."


@dataclass(frozen=True)
class Job:
    """What a cache's calibration is made of.

    Attributes:
        calibration: where tokens come from if the folder's own aren't used, and how many are used at most.
        own_tokens: use those of the folder's `calibration.safetensors`, if there is one.
        device: where to compute.
        dtype: what to compute in.
        restart: forget what an interrupted job has so far.
    """

    calibration: Calibration = field(default_factory=Calibration)
    own_tokens: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    restart: bool = False


def is_packed(folder: Path) -> bool:
    """Whether a path is a folder that names qexport in its config."""
    try:
        found = read_json(folder / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == "qexport"


def change(folder: Path, fmt: KVFormat | None, job: Job | None = None, *, observer: Observer = ignore) -> Outcome:
    """Give a packed folder a cache of its own in place, another one, or with None none.

    Args:
        folder: that qexport packed.
        fmt: of the cache.
        job: how to calibrate, where the format needs it; see `calibrates`.
        observer: is told of progress.

    Returns:
        The folder's sizes, and time and memory of this change.

    Raises:
        UsageError: it is no folder that qexport packed.
        CheckpointError: it is not finished or damaged, or its model has no cache that could be quantized.
        ResumeError: another job is writing to it, or it can't be written to.
        CalibrationError: too little text, or the model's keys and values are not finite.
    """
    start = time.perf_counter()
    if not is_packed(folder):
        raise UsageError(
            f"{folder}: is not a folder that qexport packed, and --kv alone changes the cache of one. Name a recipe "
            "too, --method NAME, to pack the weights first."
        )
    with claimed(folder):
        found = put(folder, fmt, job or Job(), observer=observer)
        outcome = outcome_of(folder)
    took = time.perf_counter() - start
    return replace(outcome, kv=found, seconds=took, peak_rss_bytes=peak_rss_bytes())


def put(folder: Path, fmt: KVFormat | None, job: Job, *, observer: Observer = ignore) -> dict[str, Any] | None:
    """As `change`, for who has claimed the folder; returns the figures of the cache."""
    _check_finished(folder)
    if fmt is None:
        _commit(folder, None, {}, None)
        return None
    heads = heads_of(folder)
    facts = {**kv_json(fmt), **kvfile.figures(fmt, heads), "layers": sorted(heads)}
    found: Statics = {}
    if calibrates(fmt):
        request = _request(folder, job)
        if _is_done(folder, fmt, request) and not job.restart:
            observer(Note(f"{folder} has this cache already; nothing to do. `qexport verify` checks its files."))
            return kvfile.figures(fmt, heads)
        found, origin = _calibrated(folder, fmt, job, request, heads, observer)
        facts |= {"calibration": origin, "request": request}
    _commit(folder, fmt, found, facts)
    return kvfile.figures(fmt, heads)


def _check_finished(folder: Path) -> None:
    parse(read_json(folder / "config.json").get("quantization_config"), str(folder / "config.json"))
    if Journal.lines(folder) or not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, or weights that are not finished. Repeat the command that packs it; a copy "
            "that `save_pretrained` wrote can't be changed."
        )
    if not isinstance(read_json(folder / MANIFEST).get("files"), dict):
        raise CheckpointError(f"{MANIFEST}: expected a table of files with their sha256.")


# ---- writing -----------------------------------------------------------------------------------


def _commit(folder: Path, fmt: KVFormat | None, found: Statics, facts: Mapping[str, Any] | None) -> None:
    """Exchange the cache. The order is what makes a kill harmless; see `kvfile.stored`."""
    files = {}
    if fmt is not None and found:
        written = kvfile.write(folder / PENDING, fmt, found)
        files[FILE] = written.sha256
    config = read_json(folder / "config.json")
    config["quantization_config"]["kv"] = None if fmt is None else kv_json(fmt)
    files["config.json"] = write_text(folder / "config.json", dump_json(config, indent=1) + "\n").sha256
    if found:
        os.replace(folder / PENDING, folder / FILE)
        sync_folder(folder)
    manifest = read_json(folder / MANIFEST)
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if name != FILE} | files
    manifest.pop("kv", None)
    if facts is not None:
        manifest["kv"] = facts
    write_text(folder / MANIFEST, dump_json(manifest, indent=1) + "\n")
    for name in (PENDING, WORK, *(() if found else (FILE,))):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def _is_done(folder: Path, fmt: KVFormat, request: Mapping[str, Any]) -> bool:
    """Whether the folder has the cache that is asked for, complete and with its hashes."""
    manifest = read_json(folder / MANIFEST)
    facts, files = manifest.get("kv") or {}, manifest["files"]
    own = parse(read_json(folder / "config.json").get("quantization_config")).kv
    same = all(facts.get(key) == value for key, value in {**kv_json(fmt), "request": dict(request)}.items())
    if not (same and own == fmt) or (folder / PENDING).exists():
        return False
    return all((folder / name).is_file() and sha256(folder / name) == files.get(name) for name in (FILE, "config.json"))


# ---- calibration -------------------------------------------------------------------------------


def _request(folder: Path, job: Job) -> dict[str, Any]:
    """Where tokens come from, in words that don't change from run to run, without the folders they lie in."""
    spec = job.calibration
    amounts = {"samples": spec.samples, "seqlen": spec.seqlen, "dtype": job.dtype}
    if job.own_tokens and (folder / CALIBRATION_FILE).is_file():
        return {"source": CALIBRATION_FILE, **amounts}
    digest = spec.file_sha256()
    named = spec.source if digest is None else Path(spec.source).name
    return {**asdict(spec), **amounts, "source": named, "text_sha256": digest}


def _calibrated(
    folder: Path, fmt: KVFormat, job: Job, request: Mapping[str, Any], heads: Heads, observer: Observer
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Run tokens through the packed model, from where an interrupted job stopped; returns tensors and their origin."""
    method = method_for(fmt)
    model = load_model(
        str(folder), backend="reference", dtype=job.dtype, device_map=_device_map(job.device), own_cache=False
    )
    work = None if job.restart else _Work.read(folder, fmt, request, observer)
    if work is None:
        made = _tokens(folder, job, request, model, heads, observer)
        state = caching.start(model, fmt, method, tokens=made.ids.numel())
        work = _Work(made, _digest(folder, fmt, made.origin), 0, state)
        work.write(folder, request)
    steps = [(name, part) for name in method.passes for part in _parts(work.tokens.ids)]
    observer(Started(PHASE, len(steps), "batch"))
    for index, (name, part) in enumerate(steps):
        if index >= work.done:
            state = caching.step(model, fmt, method, work.state, name=name, ids=part)
            work = replace(work, done=index + 1, state=state)
            work.write(folder, request)
        observer(Advanced(PHASE, index + 1, f"{name}, {part.shape[0]} x {part.shape[1]} tokens"))
    found = caching.finish(fmt, method, work.state)
    kvfile.check(found, fmt, heads)
    return found, work.tokens.origin


def _parts(ids: Tensor) -> tuple[Tensor, ...]:
    """Sequences that run together."""
    parts: tuple[Tensor, ...] = ids.split(max(CACHE_BATCH_TOKENS // ids.shape[1], 1))
    return parts


def _device_map(device: str) -> str | None:
    return None if device == "cpu" else device


def _tokens(folder: Path, job: Job, request: Mapping[str, Any], model: Any, heads: Heads, observer: Observer) -> Tokens:
    spec = job.calibration
    if request["source"] != CALIBRATION_FILE:
        advice = "Put tokenizer.json and tokenizer_config.json beside the weights."
        tokenizer = read_tokenizer(folder, name=str(folder), advice=advice)
        width = sum(2 * count * dim for count, dim in heads.values())
        return tokens_of(model, tokenizer, spec, name=str(folder), cache_width=width, observer=observer)
    ids = Reader(folder, [CALIBRATION_FILE]).read("input_ids").long()[: spec.samples, : spec.seqlen].contiguous()
    vocab = model.config.get_text_config().vocab_size
    if ids.ndim != 2 or ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise CheckpointError(f"{CALIBRATION_FILE}: expected token ids below {vocab}. Name another --calibration.")
    observer(Note(f"The cache is calibrated on {ids.shape[0]} x {ids.shape[1]} tokens of {CALIBRATION_FILE}."))
    origin = {"source": CALIBRATION_FILE, "samples": ids.shape[0], "seqlen": ids.shape[1], "sha256": ids_sha256(ids)}
    return Tokens(ids, origin)


def _digest(folder: Path, fmt: KVFormat, origin: Mapping[str, Any]) -> str:
    """Of all that decides what calibration finds."""
    files = read_json(folder / MANIFEST)["files"]
    weights = {name: digest for name, digest in files.items() if name.startswith("model") and name != FILE}
    whole = {"weights": weights, "kv": kv_json(fmt), "tokens": origin["sha256"]}
    return hashlib.sha256(dump_json(whole).encode()).hexdigest()


@dataclass(frozen=True)
class _Work:
    """A job that calibrates, between two batches."""

    tokens: Tokens
    digest: str
    done: int
    state: Tensors

    def write(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Keep it for who goes on."""
        about = {"digest": self.digest, "done": self.done, "origin": self.tokens.origin, "request": dict(request)}
        tensors = {f"{_STATE}{name}": t for name, t in self.state.items()}
        write_tensors(folder / WORK, {**tensors, "tokens": self.tokens.ids}, about)

    @classmethod
    def read(cls, folder: Path, fmt: KVFormat, request: Mapping[str, Any], observer: Observer) -> "_Work | None":
        """What an earlier run of the same job has left, or None."""
        if not (folder / WORK).is_file():
            return None
        try:
            reader = Reader(folder, [WORK])
            about = json.loads(reader.metadata[WORK][METADATA_KEY])
            ids = reader.read("tokens")
            origin, done = about["origin"], int(about["done"])
            same = about["request"] == request and origin["sha256"] == ids_sha256(ids)
            if not same or about["digest"] != _digest(folder, fmt, origin):
                observer(Note("An interrupted job calibrated another cache; this one begins anew."))
                return None
            state = {n.removeprefix(_STATE): reader.read(n) for n in reader.names if n.startswith(_STATE)}
        except (CheckpointError, KeyError, TypeError, ValueError, RecursionError):
            return None
        observer(Note(f"{done} batches were calibrated before; going on from there."))
        return cls(Tokens(ids, origin), about["digest"], done, state)
