"""Where text comes from: what every Python installation carries, files, and data sets."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from qexport.errors import SourceError, UsageError

Part = Literal["calibration", "evaluation"]

SEPARATOR = "\n\n"
# id, configuration, file pattern, split: the usual text of each name
_KNOWN: dict[str, tuple[str, str | None, str | None, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train"),
    "c4": ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train"),
    "pile": ("mit-han-lab/pile-val-backup", None, None, "validation"),
}
DATASETS = tuple(_KNOWN)


def builtin_text(part: Part = "calibration") -> str:
    """English prose and Python code in equal parts: the interpreter's documentation topics and its library's sources.

    Documents are taken in the order of their names, a topic and then code of the same length. One document in four,
    chosen by the hash of its name, is kept for evaluation. Topics quote each other, so calibration also leaves out
    every paragraph that occurs in an evaluation document.

    Args:
        part: `"calibration"` or `"evaluation"`.

    Raises:
        SourceError: this Python carries neither.
    """
    kept = _woven("evaluation", frozenset())
    text = (
        kept
        if part == "evaluation"
        else _woven("calibration", frozenset(p.strip() for p in _paragraphs(SEPARATOR.join(kept))))
    )
    if not text:
        raise SourceError(
            "builtin text: this Python has neither pydoc topics nor library sources. Use --calibration self or a file."
        )
    return SEPARATOR.join(text)


def _woven(part: Part, without: frozenset[str]) -> list[str]:
    """A topic and then code of the same length, again and again; where there are no topics, all code."""

    def mine(documents: Iterable[tuple[str, str]]) -> Iterator[str]:
        for name, text in documents:
            if _part_of(name) == part:
                yield SEPARATOR.join(p for p in _paragraphs(text) if p.strip() not in without)

    prose = list(mine((f"topic {name}", text) for name, text in sorted(_topics().items())))
    code = mine(_sources())
    out: list[str] = []
    behind = 0
    for text in prose:
        out.append(text)
        behind += len(text)
        while behind > 0 and (piece := next(code, None)) is not None:
            out.append(piece)
            behind -= len(piece)
    return out if prose else list(code)


def _paragraphs(text: str) -> list[str]:
    return [p.rstrip() for p in text.split(SEPARATOR) if p.strip()]


def _part_of(name: str) -> Part:
    return "evaluation" if hashlib.sha256(name.encode()).digest()[0] % 4 == 0 else "calibration"


def _topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return topics


def _sources() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def file_text(path: Path) -> str:
    """Text of a file; of a `.jsonl` file, the `text` of every line, separated by empty lines.

    Raises:
        SourceError: the file can't be read, or a line has no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: can't be read as UTF-8 text: {error}.") from error
    if path.suffix.lower() != ".jsonl":
        return content
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would split strings with U+2028 in them
        if not line.strip():
            continue
        try:
            documents.append(_text_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(f"{path}, line {number}: expected a JSON object with a string under 'text'.") from error
    return SEPARATOR.join(documents)


def _text_of(row: Any) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError(type(text).__name__)
    return text


def dataset_documents(name: str) -> Iterator[str]:
    """Documents of a data set on the Hub, streamed in their order.

    Args:
        name: `wikitext2`, `c4`, `pile`, or `hf:ID` with optional `:configuration` and `:split` (default `train`).

    Raises:
        SourceError: the data set can't be reached, or has no text column.
        UsageError: the name is malformed.
    """
    where, config, files, split = _KNOWN.get(name) or _parse(name)
    hint = "Use --calibration self or builtin, or a text file: none of them needs a connection."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SourceError(
            f"{name}: reading data sets needs the package datasets: pip install datasets. {hint}"
        ) from error
    try:
        rows = iter(load_dataset(where, config, data_files=files, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SourceError(f"{name}: the data set {where} can't be read ({reason}). {hint}") from error
    if first is None or not isinstance(first.get("text"), str):
        raise SourceError(f"{name}: expected rows with a string under 'text', found {sorted(first or {})}. {hint}")
    for row in chain([first], rows):
        if row["text"].strip():
            yield row["text"]


def _parse(name: str) -> tuple[str, str | None, str | None, str]:
    parts = name.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UsageError(f"calibration {name!r}: expected hf:ID, hf:ID:CONFIGURATION or hf:ID:CONFIGURATION:SPLIT.")
    return parts[0], (parts[1] or None) if len(parts) > 1 else None, None, parts[2] if len(parts) > 2 else "train"
