"""Checkpoints side by side: what `results.jsonl` says of each, and which differences are more than noise.

Two figures stand in one column only if they were measured by one protocol: the same windows of the same text, the same
documents of the same tasks. Whatever else there is is named with what is different about it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np

from qexport.errors import CheckpointError, UsageError
from qexport.evaluate import loading, record
from qexport.evaluate.bootstrap import Interval, Stratum, difference, interval, stratum
from qexport.evaluate.perplexity import EXP_LIMIT
from qexport.evaluate.record import Line
from qexport.evaluate.size import measure
from qexport.events import Note, Observer, ignore
from qexport.finish import RESULTS

SORTS = ("bits", "size", "perplexity", "kl", "top1", "tasks", "speed")


@dataclass(frozen=True)
class Kind:
    """What a column shows.

    Attributes:
        key: its name for `--sort`.
        what: kind of the lines that it is from.
        observed: which of their observations; None where there are none to draw.
        label: of the column, before the name of the text.
        lower: whether less is better.
        ratio: whether the means are logarithms, so that figures are their exponentials and differences are ratios.
        of_original: whether the original has such a figure too.
    """

    key: str
    what: str
    observed: str | None
    label: str
    lower: bool
    ratio: bool = False
    of_original: bool = True


KINDS = (
    Kind("perplexity", "perplexity", "loss", "perplexity", True, ratio=True),
    Kind("kl", "fidelity", "kl", "KL", True, of_original=False),
    Kind("top1", "fidelity", "top1", "top-1", False, of_original=False),
    Kind("tasks", "task", "documents", "tasks", False),
    Kind("speed", "speed", None, "tokens/s", False),
)


@dataclass(frozen=True)
class Entry:
    """One model: a row.

    Attributes:
        name: for people.
        weights: hash of its weights.
        sizes: `bits_per_weight`, `bits_per_parameter`, `bytes`; None where its files are not at hand.
        lines: what was measured of it, oldest first.
        original: whether others were compared with it.
    """

    name: str
    weights: str
    sizes: Mapping[str, float] | None
    lines: Sequence[Line]
    original: bool = False


@dataclass(frozen=True)
class Cell:
    """A figure of a row.

    Attributes:
        value: the figure.
        strata: its observations; empty where there are none.
        parts: of a mean over tasks, the figure of each.
    """

    value: float
    strata: Sequence[Stratum] = ()
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """Figures that can be compared.

    Attributes:
        kind: what they are.
        name: of the text; empty for the others.
        cells: by row.
        refused: for rows whose figures are of another protocol, what is different.
        protocol: what the figures share.
    """

    kind: Kind
    name: str
    cells: Mapping[int, Cell]
    refused: Mapping[int, str]
    protocol: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.kind.label}, {self.name}" if self.name else self.kind.label


def compare(targets: Sequence[str], *, sort: str = "perplexity", observer: Observer = ignore) -> dict[str, Any]:
    """Everything that is recorded of some models, comparable figures in one column.

    Args:
        targets: packed or dense directories, or Hub ids.
        sort: one of `SORTS`, or the label of a column; the best comes first.
        observer: is told of damaged lines.

    Returns:
        `{columns, rows, sort}`; docs/measuring.md states the keys.

    Raises:
        UsageError: a name is given twice, or there is nothing to sort by.
        CheckpointError: the files of a model are damaged.
    """
    entries = [read_entry(target, observer) for target in targets]
    if len({entry.weights for entry in entries}) < len(entries):
        raise UsageError("compare: two of the names mean the same model. Name each once.")
    entries = _with_original(entries)
    columns = _columns(entries)
    order = _order(entries, columns, sort)
    bests = {column.label: _best(column, entries) for column in columns}
    rows = [_row(i, entries, columns, bests) for i in order]
    shown = [
        {
            "label": column.label, "kind": column.kind.key, "name": column.name, "protocol": dict(column.protocol),
            "better": "lower" if column.kind.lower else "higher",
            "best": None if (best := bests[column.label]) is None else entries[best].name,
            "front": _front(column, entries),
        }
        for column in columns
    ]  # fmt: skip
    return {"columns": shown, "rows": rows, "sort": sort}


# ---- rows --------------------------------------------------------------------------------------


def read_entry(target: str, observer: Observer = ignore) -> Entry:
    """What is known of one model."""
    folder, local = loading.find_folder(target)
    weights = record.weights_id(folder)
    path = record.results_path(folder, weights, own=local and record.is_packed(folder))
    theirs = [] if local else record.read_results(folder / RESULTS, observer)  # what a download brought along
    found = [*theirs, *record.read_results(path, observer)]
    lines = [line for line in found if line["setting"].get("weights") == weights]
    try:
        sizes = measure(folder)
    except CheckpointError as error:
        observer(Note(f"{target}: its size is left out: {error}", "warning"))
        return Entry(loading.public_name(target), weights, None, lines)
    own = {"bits_per_weight": sizes.bits_per_weight, "bits_per_parameter": sizes.bits_per_parameter}
    return Entry(loading.public_name(target), weights, {**own, "bytes": sizes.nbytes}, lines)


def _with_original(entries: Sequence[Entry]) -> list[Entry]:
    """The rows with each original marked, or added with what its comparisons say of it."""
    seen: dict[str, list[Line]] = {}
    for entry in entries:
        for line in entry.lines:
            if line["what"] == "fidelity":
                seen.setdefault(str(line["protocol"].get("against")), []).append(line)
    out = []
    for entry in entries:
        own = seen.pop(entry.weights, None)
        out.append(entry if own is None else _marked(entry, own))
    return out + [_marked(Entry(str(own[-1]["details"]["against"]), key, None, ()), own) for key, own in seen.items()]


def _marked(entry: Entry, compared: Sequence[Line]) -> Entry:
    lines = []
    for line in compared:
        observed = line["details"]["observations"]
        if "original_loss" in observed:
            protocol = {key: value for key, value in line["protocol"].items() if key != "against"}
            own = {"loss": observed["original_loss"], "predictions": observed["predictions"]}
            figure = _exp(np.average(own["loss"], weights=own["predictions"]))
            details = {"observations": own}
            lines.append({**line, "what": "perplexity", "figure": figure, "protocol": protocol, "details": details})
    return Entry(entry.name, entry.weights, entry.sizes, [*lines, *entry.lines], original=True)


# ---- columns -----------------------------------------------------------------------------------


def _columns(entries: Sequence[Entry]) -> list[Column]:
    out = []
    for kind in KINDS:
        names = list(dict.fromkeys(line["name"] for e in entries for line in e.lines if line["what"] == kind.what))
        found = [_column(kind, name, entries) for name in names]
        out += [_mean(kind, found)] if kind.key == "tasks" and found else found
    return [column for column in out if column.cells]


def _column(kind: Kind, name: str, entries: Sequence[Entry]) -> Column:
    """The figures of the protocol that most rows have; of several such, the newest."""
    own: list[list[Line]] = [
        [line for line in e.lines if (line["what"], line["name"]) == (kind.what, name) and line["figure"] is not None]
        for e in entries
    ]
    known: list[Any] = []
    for line in (line for lines in own for line in lines):
        if line["protocol"] not in known:
            known.append(line["protocol"])
    rated = [
        (sum(any(line["protocol"] == p for line in lines) for lines in own),
         max(str(line.get("time")) for lines in own for line in lines if line["protocol"] == p), i)
        for i, p in enumerate(known)
    ]  # fmt: skip
    if not rated:
        return Column(kind, name, {}, {}, {})
    protocol = known[max(rated)[2]]
    cells, refused = {}, {}
    for i, lines in enumerate(own):
        alike = [line for line in lines if line["protocol"] == protocol]
        if alike:
            cells[i] = _cell(kind, alike[-1])
        elif lines:
            refused[i] = _difference(lines[-1]["protocol"], protocol)
    return Column(kind, "" if kind.what in ("task", "speed") else name, cells, refused, {name: protocol})


def _cell(kind: Kind, line: Line) -> Cell:
    if kind.what == "task":
        scores = [float(x) for own in line["details"]["documents"].values() for x in own]
        # A group whose score is no mean over its documents has no observations.
        mean = sum(scores) / max(len(scores), 1)
        strata = [stratum(scores)] if scores and abs(mean - line["figure"]) < 1e-6 else []
        return Cell(line["figure"], strata, {line["name"]: line["figure"]})
    if kind.observed is None:
        return Cell(line["figure"])
    observed = line["details"]["observations"]
    value = line["details"]["top1"]["value"] if kind.key == "top1" else line["figure"]
    if kind.observed not in observed:
        return Cell(value)
    return Cell(value, [stratum(observed[kind.observed], observed["predictions"])])


def _mean(kind: Kind, tasks: Sequence[Column]) -> Column:
    """The mean over the tasks that every row has which has any; a row that lacks one of them is refused."""
    most = max(len(column.cells) for column in tasks)
    shared = [column for column in tasks if len(column.cells) == most]
    cells: dict[int, Cell] = {}
    refused: dict[int, str] = {}
    for i in sorted({i for column in tasks for i in (*column.cells, *column.refused)}):
        missing = [name for column in shared for name in column.protocol if i not in column.cells]
        if missing:
            why = next((column.refused[i] for column in shared if i in column.refused), "not measured")
            refused[i] = f"{', '.join(missing)}: {why}"
            continue
        own = [column.cells[i] for column in shared]
        strata = [s for cell in own for s in cell.strata] if all(cell.strata for cell in own) else []
        parts = {name: value for cell in own for name, value in cell.parts.items()}
        cells[i] = Cell(sum(cell.value for cell in own) / len(own), strata, parts)
    protocol = {name: own for column in shared for name, own in column.protocol.items()}
    return Column(kind, "", cells, refused, protocol)


_SPELLED = {
    "text": "another text of this name", "ids": "other tokens", "documents": "other documents",
    "config": "other prompts", "against": "another original",
}  # fmt: skip


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is different about a protocol."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    plain = [f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in keys if key not in _SPELLED]
    return ", ".join(plain or [_SPELLED[key] for key in keys if key != "ids" or len(keys) == 1])


# ---- figures -----------------------------------------------------------------------------------


def _best(column: Column, entries: Sequence[Entry]) -> int | None:
    """The row with the best figure; the original does not take part."""
    sign = 1 if column.kind.lower else -1
    found = {i: sign * cell.value for i, cell in column.cells.items() if not entries[i].original}
    return min(found, key=lambda i: found[i]) if found else None


def _front(column: Column, entries: Sequence[Entry]) -> list[str]:
    """Rows, smallest first, that no other beats: by no more bytes and a figure that is better by more than noise.

    The original does not take part, nor does who has no size.
    """
    sign = 1 if column.kind.lower else -1
    sizes = {i: e.sizes["bytes"] for i, e in enumerate(entries) if e.sizes is not None and not e.original}
    rows = sorted((i for i in column.cells if i in sizes), key=lambda i: sign * column.cells[i].value)

    def beats(i: int, other: int) -> bool:
        found = _paired(column.cells[i], column.cells[other], column.kind) if sizes[i] <= sizes[other] else None
        return found is not None and found["verdict"] == "better"

    kept = [i for place, i in enumerate(rows) if not any(beats(better, i) for better in rows[:place])]
    return [entries[i].name for i in sorted(kept, key=lambda i: sizes[i])]


def _order(entries: Sequence[Entry], columns: Sequence[Column], sort: str) -> list[int]:
    sized = {"bits": "bits_per_weight", "size": "bytes"}
    if sort in sized:
        values = {i: e.sizes[sized[sort]] for i, e in enumerate(entries) if e.sizes is not None}
    else:
        found = [column for column in columns if sort in (column.kind.key, column.label)]
        if not found and sort != "perplexity":
            known = ", ".join([*SORTS, *(column.label for column in columns)])
            raise UsageError(f"--sort {sort!r}: no model has such a figure. Known: {known}.")
        sign = 1 if not found or found[0].kind.lower else -1
        values = {i: sign * cell.value for i, cell in found[0].cells.items()} if found else {}
    return sorted(range(len(entries)), key=lambda i: (i not in values, values.get(i, 0.0)))


def _row(
    i: int, entries: Sequence[Entry], columns: Sequence[Column], bests: Mapping[str, int | None]
) -> dict[str, Any]:
    entry = entries[i]
    sizes = entry.sizes or dict.fromkeys(("bits_per_weight", "bits_per_parameter", "bytes"))
    figures = {}
    for column in columns:
        if i in column.cells:
            figures[column.label] = _figure(i, column, entries, bests[column.label])
        elif i in column.refused:
            figures[column.label] = {"value": None, "reason": f"not comparable: {column.refused[i]}"}
    return {"name": entry.name, "original": entry.original, **sizes, "figures": figures}


def _figure(i: int, column: Column, entries: Sequence[Entry], best: int | None) -> dict[str, Any]:
    kind, cell = column.kind, column.cells[i]
    own = interval(cell.strata) if cell.strata else None
    grown: Callable[[float], float] = _exp if kind.ratio else float
    out: dict[str, Any] = {
        "value": cell.value, "interval": None if own is None else _bounds(own.of(grown)),
        "observations": sum(len(s.values) for s in cell.strata), "is_best": i == best,
    }  # fmt: skip
    if cell.parts:
        out["tasks"] = dict(cell.parts)
    originals = [j for j in column.cells if entries[j].original] if kind.of_original else []
    beside = (("to_original", originals[0] if originals else None), ("to_best", None if entries[i].original else best))
    for name, other in beside:
        out[name] = None if other is None or other == i else _paired(cell, column.cells[other], kind)
    return out


def _paired(ours: Cell, theirs: Cell, kind: Kind) -> dict[str, Any] | None:
    """Ours beside theirs, with the interval of the paired difference, or ratio; None without shared observations."""
    counts = [[s.counts for s in cell.strata] for cell in (ours, theirs)]
    if not ours.strata or len(counts[0]) != len(counts[1]) or not all(map(np.array_equal, *counts)):
        return None
    found = difference(ours.strata, theirs.strata)
    if found is None:
        return None
    spelled = found.of(_exp) if kind.ratio else found
    better = None if found.holds_zero else (found.value < 0) == kind.lower
    verdict = "not distinguishable" if better is None else "better" if better else "worse"
    return {"kind": "ratio" if kind.ratio else "difference", "value": spelled.value, "interval": _bounds(spelled),
            "verdict": verdict}  # fmt: skip


def _exp(value: float) -> float:
    return exp(min(value, EXP_LIMIT))


def _bounds(own: Interval) -> list[float]:
    return [own.low, own.high]
