"""`results.jsonl`: what was measured of a model, a line for each figure. `docs/measuring.md` states the format.

The file lies in a packed folder. What was measured of other models, dense ones and downloads, lies in qexport's cache,
under the hash of their weights: their folders are not ours to write to.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint import Reader, dump_json, read_json, sha256, write_text
from qexport.errors import CheckpointError
from qexport.events import Note, Observer, ignore
from qexport.finish import MANIFEST, RESULTS
from qexport.folders import cache_folder
from qexport.kvfile import FILE as CACHE

Line = dict[str, Any]
_SHAPE: Mapping[str, type | tuple[type, ...]] = {
    "what": str, "name": str, "figure": (int, float, type(None)), "se": (int, float, type(None)),
    "protocol": dict, "setting": dict, "details": dict,
}  # fmt: skip
# What the details of a kind hold at least, for who draws tables relies on it; a name within a name by a dot.
_DETAILS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "perplexity": {"tokens": int, "losses": list, "observations": dict},
    "fidelity": {
        "kl.mean": float, "top1.value": float, "ln_ppl_ratio.value": float, "tokens": int, "against": str,
        "observations": dict,
    },
    "task": {"metrics": dict, "metric": (str, type(None)), "documents": dict},
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        what: kind of the figure: `perplexity`, `fidelity`, `task`, `needle` or `speed`.
        name: the text or task that it is of.
        figure: perplexity, KL in nats, the task's score, the needles' score, tokens per second.
        se: its standard error, where there is one.
        protocol: what two figures must share to be compared.
        setting: what else they depend on, and the hash of the weights.
        details: the other figures of the measurement, and its observations.
    """

    what: str
    name: str
    figure: float | None
    se: float | None
    protocol: Mapping[str, Any]
    setting: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)


# ---- where -------------------------------------------------------------------------------------


def weights_id(folder: Path) -> str:
    """Hash of configuration, weights and calibrated cache; files that a packed folder's manifest lists are not read."""
    listed = read_json(folder / MANIFEST).get("files") if (folder / MANIFEST).is_file() else None
    known: Mapping[str, Any] = listed if isinstance(listed, dict) else {}
    files = [*Reader(folder).files, "config.json", *([CACHE] if (folder / CACHE).is_file() else [])]
    lines = [f"{name}:{known.get(name) or _sha256(folder / name)}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """Hash of a file; the Hub's cache has large ones under their own."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and len(target.name) == 64 else sha256(path)


def is_packed(folder: Path) -> bool:
    """Whether a folder is one of `qexport quantize`."""
    try:
        config = read_json(folder / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(config, dict) and config.get("quant_method") == "qexport"


def results_path(folder: Path, weights: str, *, own: bool) -> Path:
    """The file that a model's figures go to; `own` says that its folder is packed and the user's."""
    return folder / RESULTS if own else cache_folder() / "results" / weights / RESULTS


# ---- lines -------------------------------------------------------------------------------------


def circumstances(command: str | None) -> Line:
    """When, by what, where and with which versions."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "command": command,
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("qexport", "transformers", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def append(path: Path, records: Sequence[Record], *, command: str | None, observer: Observer = ignore) -> None:
    """Add lines: all of them or none, whoever else writes and whenever it is killed.

    A folder that can't be written to is no reason to lose a result: that is a note.
    """
    if not records:
        return
    made = circumstances(command)
    lines = "".join(dump_json(_finite({**asdict(record), **made})) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            # A line that something cut short must not swallow the next.
            text = old + ("\n" if old and not old.endswith("\n") else "") + lines
            write_text(path, text)
    except OSError as error:
        observer(Note(f"{path} was not written: {error.strerror}", "warning"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that add lines to a file of this folder waiting."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_lines(path: Path) -> tuple[list[Line], list[int]]:
    """The lines of a file, oldest first, and the numbers of those that are damaged or of another shape."""
    if not path.is_file():
        return [], []
    found, damaged = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            entry = None
        if _is_sound(entry):
            found.append(entry)
        else:
            damaged.append(number)
    return found, damaged


def _is_sound(entry: Any) -> bool:
    if not (
        isinstance(entry, dict) and _has(entry, _SHAPE) and _has(entry["details"], _DETAILS.get(entry["what"], {}))
    ):
        return False
    details = entry["details"]
    if entry["what"] == "task":
        documents = [list(map(int, d)) if _is_binary(d) else d for d in details["documents"].values()]
        return all(isinstance(row, dict) for row in details["metrics"].values()) and all(map(_are_numbers, documents))
    observed = details.get("observations", {}) if entry["what"] in _DETAILS else {}
    if not all(map(_are_numbers, observed.values())):
        return False
    alike = len({len(values) for values in observed.values()}) < 2
    return alike and all(count > 0 for count in observed.get("predictions", ()))


def _is_binary(value: Any) -> bool:
    return isinstance(value, str) and set(value) <= {"0", "1"}


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in values)


def _has(entry: Any, shape: Mapping[str, type | tuple[type, ...]]) -> bool:
    """Whether an object has these keys with values of these types; a whole number is a float too."""
    for path, kind in shape.items():
        value = entry
        for key in path.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            return False
    return True


_ABSENT = object()


def read_results(path: Path, observer: Observer = ignore) -> list[Line]:
    """The sound lines of a folder's `results.jsonl`, or of such a file, oldest first; others are told by number."""
    path = path / RESULTS if path.is_dir() else path
    found, damaged = read_lines(path)
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        observer(
            Note(f"{path.parent.name}/{path.name}: passed over what can't be understood in line {numbers}", "warning")
        )
    return found


def newest(lines: Sequence[Line], record: Record) -> Line | None:
    """The newest line that measures the same in the same way with the same versions; None if there is none."""
    wanted = _finite({key: value for key, value in asdict(record).items() if key in _KEY}), versions()
    alike = [line for line in lines if ({key: line[key] for key in _KEY}, line.get("versions")) == wanted]
    return alike[-1] if alike else None


_KEY = ("what", "name", "protocol", "setting")
