"""`evaluate`: one model, everything that was asked for, one JSON document."""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qexport.calibration import bos_id, encode
from qexport.checkpoint import dump_json, read_json
from qexport.errors import CheckpointError, QExportError, UsageError
from qexport.evaluate.fidelity import compare, summary
from qexport.evaluate.harness import Tasks, find_tasks, run_tasks
from qexport.evaluate.needle import needle as needles
from qexport.evaluate.needle import usual_lengths
from qexport.evaluate.perplexity import Perplexity, perplexity
from qexport.evaluate.size import Sizes, measure
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Text, Windows, cut, read_text
from qexport.events import Note, Observer, ignore
from qexport.formats.kv.base import kv_name
from qexport.pictures import heat_map
from qexport.runtime.cache import chosen, forgo, keep

RESULTS = "results.jsonl"
DEFAULT_SEQLEN = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Loader = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """How a measurement is made; the part of it that is stored beside every result.

    Attributes:
        seqlen: tokens of a window; default 2048, or the model's context if that is shorter.
        stride: text tokens between the starts of windows; default `seqlen`.
        windows: at most so many windows of each text.
        bos: `auto`, `always` or `never`.
        limit: at most so many documents of each task.
        backend: of the packed model.
        dtype: compute dtype; by default float32 on a CPU and the checkpoint's own elsewhere.
        device: by default a GPU if there is one.
    """

    seqlen: int | None = None
    stride: int | None = None
    windows: int | None = None
    bos: str = "auto"
    limit: int | None = None
    backend: str = "auto"
    dtype: str | None = None
    device: str | None = None

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
    against: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    cache_gb: float = 0.0,
    kv: str | None = None,
    kv_options: Mapping[str, Any] | None = None,
    needle: bool = False,
    revision: str | None = None,
    token: str | None = None,
    loader: Loader | None = None,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Measure a packed or dense model; also adds a line to `results.jsonl` of a local packed directory.

    Args:
        target: directory or Hub id.
        texts: files or names of texts; default `builtin`, unless only tasks are asked for.
        seqlen: see `Setting`, as are stride, windows, bos, limit, backend, dtype and device.
        stride: as above.
        windows: as above.
        bos: as above.
        tasks: tasks of lm-eval.
        include_path: folder with task files of your own.
        limit: as above.
        against: the original model: a directory, a Hub id or a `.gguf` file.
        backend: see `Setting`.
        dtype: see `Setting`.
        device: see `Setting`.
        cache_gb: memory for decoded weights, in 1e9 bytes.
        kv: cache to read through, `"none"` for the model's own; default: that of the checkpoint.
        kv_options: of its format.
        needle: also ask for needles; draws a picture into a local packed directory, else into the current one.
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
    setting = Setting(seqlen, stride, windows, bos, limit, backend, dtype, device)
    sources = _distinct(texts or (() if (tasks or needle) and against is None else ("builtin",)))
    contents = [read_text(source) for source in sources]
    wanted = find_tasks(tasks, include_path) if tasks else None
    folder, local = _folder(target, revision, token)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = _Load(loader or _load, where, _dtype(dtype, where), backend, cache_gb, token)
    model, tokenizer = load.packed(folder), _tokenizer(folder)
    through = _through(model, kv, kv_options or {})
    cuts = _cut(contents, model, tokenizer, setting, observer)
    original = None if against is None else load.original(against, observer)
    found, fidelity = _measure(model, cuts, original, through, observer)
    scores, failure = _scores(model, tokenizer, wanted, setting, through, observer)
    result = _document(measure(folder, model), found, fidelity, scores)
    own = local and _is_packed(folder)
    if needle:
        result["needle"] = _needle(model, tokenizer, contents, setting, through, folder if own else Path(), observer)
    if through is not None:
        result["kv"] = through.to_json()
    if own and (found or scores or needle):
        _record(folder / RESULTS, _protocol(setting, contents, against, model, where), result, observer)
    if failure is not None:
        _tell(found, observer)
        raise failure
    return result


def _tell(found: Sequence[Perplexity], observer: Observer) -> None:
    """Say what was measured before something failed."""
    for measured in found:
        observer(Note(f"measured before the tasks failed: perplexity of {measured.windows.name} {measured.value:.4f}"))


def _document(
    sizes: Sizes, found: Sequence[Perplexity], fidelity: dict[str, Any] | None, scores: dict[str, Any]
) -> dict[str, Any]:
    return {
        "bits_per_weight": sizes.bits_per_weight,
        "bits_per_parameter": sizes.bits_per_parameter,
        "bytes": sizes.nbytes,
        "perplexity": {p.windows.name: p.to_json() for p in found},
        "fidelity": fidelity,
        "tasks": scores,
    }


# ---- models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Load:
    """How the models of one evaluation are loaded."""

    loader: Loader
    device: torch.device
    dtype: torch.dtype | None
    backend: str
    cache_gb: float
    token: str | None

    def packed(self, folder: Path) -> Any:
        """A directory, packed or dense."""
        place = None if self.device.type == "cpu" else str(self.device)
        return self.loader(
            str(folder), backend=self.backend, dtype=self.dtype, device_map=place, cache_gb=self.cache_gb
        ).eval()

    def original(self, name: str | Path, observer: Observer) -> Any:
        """The model to compare with: dense from anywhere, or another packed directory."""
        if Path(name).is_dir() and _is_packed(Path(name)):
            return self.packed(Path(name))
        from qexport.models import load_dense, open_source

        source = open_source(str(name), token=self.token, observer=observer)
        dtype = self.dtype or getattr(source.config, "dtype", None) or torch.float32
        return load_dense(source, dtype=dtype, device=self.device).eval()


def _load(path: str, **options: Any) -> Any:
    from qexport.integrations.transformers import load_model

    return load_model(path, **options)


def _dtype(name: str | None, place: torch.device) -> torch.dtype | None:
    if name is not None:
        return DTYPES[name]
    return torch.float32 if place.type == "cpu" else None


def _folder(target: str | Path, revision: str | None, token: str | None) -> tuple[Path, bool]:
    """The directory that a target means, and whether it is the user's own rather than a download."""
    if not str(target):
        raise UsageError("expected a directory or a Hub id to evaluate, found an empty name.")
    if Path(target).is_dir():
        return Path(target), True
    if Path(target).exists():
        raise UsageError(f"{target}: expected a directory or a Hub id. A file can be the original: --against {target}.")
    from qexport.models.fetch import fetch

    return fetch(str(target), revision=revision, token=token, weights=True), False


def _is_packed(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(config, dict) and config.get("quant_method") == "qexport"


def _tokenizer(folder: Path) -> Any:
    from qexport.models.auto import read_tokenizer

    return read_tokenizer(folder, name=str(folder), advice="Copy the original's tokenizer files there.")


# ---- windows and measurement -------------------------------------------------------------------


def _distinct(texts: Sequence[str | Path]) -> Sequence[str | Path]:
    names = [Path(text).name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--text {name}: given twice; results go by the base name. Rename one of the files.")
    return texts


def _seqlen(model: Any, setting: Setting) -> int:
    """Tokens of a window; raises `UsageError` where the model's context has fewer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    seqlen = setting.seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if context and seqlen > context:
        raise UsageError(f"--seqlen {seqlen}: the model's context has {context} tokens. Use at most so many.")
    return seqlen


def _cut(texts: Sequence[Text], model: Any, tokenizer: Any, setting: Setting, observer: Observer) -> list[Windows]:
    seqlen = _seqlen(model, setting)
    bos = bos_id(tokenizer, setting.bos)
    return [
        cut(
            text.name, encode(tokenizer, text.content),
            seqlen=seqlen, stride=setting.stride, limit=setting.windows, bos=bos, observer=observer,
        )
        for text in texts
    ]  # fmt: skip


def _through(model: Any, kv: str | None, options: Mapping[str, Any]) -> Through | None:
    """The model with the cache that it is measured through, which its `generate` takes too; None for its own."""
    found = chosen(model, kv, options)
    if found is None:
        forgo(model)
        return None
    through = Through(model, found.fmt, found.statics)
    keep(model, found.fmt, found.statics)
    return through


def _measure(
    model: Any, cuts: Sequence[Windows], original: Any, through: Through | None, observer: Observer
) -> tuple[list[Perplexity], dict[str, Any] | None]:
    if original is None:
        return (perplexity(model, cuts, through=through, observer=observer) if cuts else []), None
    pairs = compare(model, original, cuts, through=through, observer=observer)
    return [pair.perplexity for pair in pairs], summary(pairs)


def _needle(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    setting: Setting,
    through: Through | None,
    folder: Path,
    observer: Observer,
) -> dict[str, Any]:
    """Scores of needles in the first text, or in the built-in one, and their picture."""
    text = texts[0] if texts else read_text("builtin")
    lengths = usual_lengths(tokenizer, _seqlen(model, setting))
    bos = bos_id(tokenizer, setting.bos)
    found = needles(model, tokenizer, text.content, lengths=lengths, bos=bos, through=through, observer=observer)
    name = kv_name(None if through is None else through.fmt)
    path = folder / f"needle-{name}.png"
    heat_map(
        path, found["score"], rows=[str(n) for n in lengths], columns=[f"{d:.0%}" for d in found["depths"]],
        title=f"needle in {text.name}, cache {name}", row_label="tokens", column_label="depth",
    )  # fmt: skip
    return {**found, "text": text.name, "picture": str(path)}


def _scores(
    model: Any, tokenizer: Any, tasks: Tasks | None, setting: Setting, through: Through | None, observer: Observer
) -> tuple[dict[str, Any], BaseException | None]:
    """Scores of the tasks, or what went wrong: what was measured before must be kept first."""
    if tasks is None:
        return {}, None
    try:
        found = run_tasks(
            model, tokenizer, tasks=tasks, limit=setting.limit, bos=setting.bos, through=through, observer=observer
        )
        return found, None
    except (QExportError, KeyboardInterrupt) as error:
        return {}, error


# ---- the record --------------------------------------------------------------------------------


def _protocol(
    setting: Setting, texts: Sequence[Text], against: str | Path | None, model: Any, place: torch.device
) -> dict[str, Any]:
    return {
        "texts": {text.name: text.sha256 for text in texts},
        "windows": setting.windows,
        "bos": setting.bos,
        "limit": setting.limit,
        "against": None if against is None else _public_name(str(against)),
        "backend": setting.backend,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": place.type if place.type == "cpu" else torch.cuda.get_device_name(place),
    }


def _public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _circumstances() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("qexport", "transformers", "lm_eval"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def _record(path: Path, protocol: dict[str, Any], result: dict[str, Any], observer: Observer) -> None:
    """Append one line; a directory that can't be written to is no reason to lose the result."""
    data = dump_json({"protocol": protocol, **_circumstances(), "result": result}) + "\n"
    try:
        with path.open("a+b") as file:
            # A line that a crash cut short must not swallow this one.
            if file.tell() and not _ends_line(path):
                data = "\n" + data
            file.write(data.encode())
    except OSError as error:
        observer(Note(f"{path} was not written: {error.strerror}", "warning"))


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The evaluations recorded in a directory, oldest first; lines that are not complete are passed over."""
    path = folder / RESULTS
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("result"), dict):
            found.append(entry)
    return found
