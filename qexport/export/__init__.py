"""Exports: a packed checkpoint as other tools load it, proven by those tools before it counts as done."""

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qexport import plugins
from qexport.checkpoint import is_companion, stays_inside
from qexport.errors import PlanError, UsageError
from qexport.events import Advanced, Observer, Started, ignore
from qexport.export import _proof as proof
from qexport.export._adopt import adopt
from qexport.export._place import new_folder, refuse_taken
from qexport.export.base import Packed, Target
from qexport.facts import card_facts, write_export
from qexport.verify import verify

__all__ = ["adopt", "export", "refuse", "target_of", "targets"]


def export(
    directory: Path | str,
    to: str,
    out: Path | str,
    *,
    check: bool = True,
    options: dict[str, Any] | None = None,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Write a checkpoint in another library's format.

    It is written beside `out`, proven there, and renamed; whatever goes wrong, `out` is not there afterwards.

    Args:
        directory: a folder of `qexport quantize`; it is verified first.
        to: name of a target, see `qexport.export`.
        out: a folder that does not exist, or is empty.
        check: load the result with the other library, in a fresh process, and compare logits.
        options: of the target.
        observer: is told of progress.

    Returns:
        `{"out", "to", "source", "bytes", "modules", "check"}`; `check` is None if it was left out, see `proof.prove`.

    Raises:
        PlanError: the target can't say what is in the checkpoint; nothing was written.
        BackendError: a package for the check is missing; nothing was written.
        CheckpointError: the check failed, or the checkpoint is damaged.
        ResumeError: `out` is in use.
    """
    target, folder, place = target_of(to, options or {}), Path(directory), Path(out)
    refuse_taken(place)
    if check:
        proof.require(target, to)
    verify(folder, observer=observer)
    packed = Packed(folder)
    refuse(packed, target, to)
    observer(Started("export", 2 + check, "step"))
    with new_folder(place) as made:
        target.write(packed, made)
        for path in sorted(folder.iterdir()):
            if is_companion(path.name) and stays_inside(path):
                shutil.copyfile(path, made / path.name)
        observer(Advanced("export", 1, "written"))
        figures = proof.prove(target, folder, made, packed.vocab) if check else None
        observer(Advanced("export", 1 + check, "proven" if check else "not proven"))
        facts = replace(card_facts(folder, place.name), tags=["quantized", *target.tags])
        write_export(made, facts, to, target.source, target.how("{name}"), figures)
    nbytes = sum(path.stat().st_size for path in place.iterdir())
    return {
        "out": str(place), "to": to, "source": target.source, "bytes": nbytes, "modules": len(packed.modules),
        "check": figures,
    }  # fmt: skip


def targets() -> list[str]:
    """Names of targets, as `--to` takes them."""
    return [name.replace("_", "-") for name in plugins.names("export")]


def target_of(to: str, options: Mapping[str, Any]) -> Target:
    """The target of a name with options; raises `UsageError` where it has none of that name."""
    made = plugins.get("export", to.replace("-", "_"))
    unknown = sorted(set(options) - {f.name for f in fields(made)})
    if unknown:
        raise UsageError(f"--to {to} has no option {', '.join(unknown)}.")
    target: Target = made(**options)
    return target


def refuse(packed: Packed, target: Target, to: str) -> None:
    """Raise `PlanError` with every reason that a target has against modules of a checkpoint."""
    reasons: dict[str, list[str]] = {}
    for module in packed.modules:
        reason = target.refuse(module)
        if reason:
            reasons.setdefault(reason, []).append(module.name)
    if reasons:
        lines = [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}."
            for reason, names in reasons.items()
        ]
        raise PlanError(f"--to {to} ({target.source}): nothing was written.\n  " + "\n  ".join(lines))
