"""`report`: facts and measurements of checkpoints become files."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qexport.checkpoint import write_text
from qexport.errors import UsageError
from qexport.events import Note, Observer, ignore
from qexport.models import Source, open_source
from qexport.models.fetch import cached
from qexport.plan import fingerprint
from qexport.reporting import comparison, figures
from qexport.reporting.draw import Picture, png
from qexport.reporting.facts import Checkpoint, read
from qexport.reporting.measure import Measured, Sample, measure
from qexport.reporting.page import labels, render

_ABSENT = "needs the model that this was made from; name it with --original MODEL."
_OTHER = "The original given is not the very model that this was made from: its tensors have another fingerprint."


@dataclass(frozen=True)
class Request:
    """What is reported of.

    Attributes:
        directories: folders of `qexport quantize`.
        out: the page; None: `report.html` in the folder, or in the current one for several.
        original: the model they were made from; None: where the checkpoint names one that lies in the Hub's cache.
        sample: what both read.
        png: write the pictures beside the page too.
        device: where to compute.
        command: what the user called, for the page.
    """

    directories: Sequence[Path]
    out: Path | None = None
    original: str | None = None
    sample: Sample = field(default_factory=Sample)
    png: bool = False
    device: str = "cpu"
    command: str | None = None


def report(request: Request, *, observer: Observer = ignore) -> dict[str, Any]:
    """Write the page, and say what is in it.

    Returns:
        `{out, pictures, checkpoints}`: files, and for each folder what `inspect` says, its modules with bits and
        errors, its results and what was measured against the original, None where it was not at hand.

    Raises:
        UsageError: no folder, one twice, or a page that is not called `.html`.
        CheckpointError: a folder is not ours, or damaged.
        SourceError: the original can't be had.
    """
    folders = list(request.directories)
    if not folders or len({f.resolve() for f in folders}) < len(folders):
        raise UsageError("expected one or more folders, each once.")
    out = request.out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if out.suffix != ".html":
        raise UsageError(f"-o {out}: expected the name of a page, FILE.html.")
    checkpoints = [read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    measured = [_measured(checkpoint, request, observer) for checkpoint in checkpoints]
    made = {
        "version": version("qexport"),
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": request.command,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(checkpoints, measured, made))
    found = _pictures(checkpoints, measured) if request.png else {}
    files = {name: out.with_name(f"{out.stem}-{name}.png") for name in found}
    for name, picture in found.items():
        png(picture, files[name])
    return {
        "out": str(out),
        "pictures": [str(path) for path in files.values()],
        "checkpoints": [_document(c, m) for c, m in zip(checkpoints, measured, strict=True)],
    }


def _measured(checkpoint: Checkpoint, request: Request, observer: Observer) -> Measured | str:
    source = _original(checkpoint, request, observer)
    if source is None:
        observer(Note(f"{checkpoint.label}: comparing weights and activations {_ABSENT}"))
        return _ABSENT
    found = measure(checkpoint.folder, source, request.sample, device=request.device, observer=observer)
    if checkpoint.fingerprint is not None and checkpoint.fingerprint != fingerprint(source):
        observer(Note(f"{checkpoint.label}: {_OTHER}", "warning"))
        found.notes.insert(0, _OTHER)
    return found


def _original(checkpoint: Checkpoint, request: Request, observer: Observer) -> Source | None:
    """The model of `--original`, or the one that the checkpoint names if it need not be downloaded."""
    if request.original is not None:
        return open_source(request.original, observer=observer)
    name, commit = checkpoint.about["model"], checkpoint.about["commit"]
    folder = cached(name, revision=commit) if name and name.count("/") == 1 and commit else None
    return None if folder is None else replace(open_source(str(folder), observer=observer), name=name)


def _pictures(checkpoints: Sequence[Checkpoint], measured: Sequence[Measured | str]) -> dict[str, Picture]:
    """All pictures of the page by the end of their file's name."""
    known = [own if isinstance(own, Measured) else None for own in measured]
    if len(checkpoints) == 1:
        return {picture.name: picture for picture in figures.pictures(checkpoints[0], known[0])}
    both = comparison.pareto(checkpoints, comparison.judge(checkpoints)), comparison.layers(checkpoints, known)
    found = {picture.name: picture for picture in both if picture is not None}
    for i, (checkpoint, own) in enumerate(zip(checkpoints, known, strict=True), 1):
        found |= {f"{i}-{picture.name}": picture for picture in figures.pictures(checkpoint, own)}
    return found


def _document(checkpoint: Checkpoint, measured: Measured | str) -> dict[str, Any]:
    return {
        **checkpoint.about,
        "label": checkpoint.label,
        "modules": {m.name: {"layer": m.layer, "kind": m.kind, "bits": m.bits, "bytes": m.nbytes, "error": m.error}
                    for m in checkpoint.modules},
        "dense_bytes": dict(checkpoint.dense),
        "results": [asdict(result) for result in checkpoint.results],
        "measured": measured.as_json() if isinstance(measured, Measured) else None,
    }  # fmt: skip
