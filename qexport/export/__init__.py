"""Exports: a packed checkpoint as other tools load it, proven by those tools before it counts as done."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qexport import plugins
from qexport.checkpoint import copy_companions, read_json
from qexport.errors import CheckpointError, PlanError, ResumeError, UsageError
from qexport.events import Advanced, Note, Observer, Started, ignore
from qexport.export import _proof as proof
from qexport.export._adopt import adopt
from qexport.export._place import new_folder, refuse_taken
from qexport.export.base import Module, Packed, Target, WholeTarget
from qexport.facts import card_facts, write_export
from qexport.plan import Plan
from qexport.verify import verify

__all__ = [
    "READERS",
    "adopt",
    "export",
    "outlook",
    "planned",
    "reader_of",
    "refusals",
    "refuse",
    "target_of",
    "targets",
]

READERS = {"vllm": "compressed-tensors", "llama.cpp": "gguf"}
"""Programs by the target that they read."""

_NUMBERS = (float, float | None)


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
    if place.resolve().is_relative_to(folder.resolve()):
        raise ResumeError(f"{place} lies in the checkpoint itself. Choose another -o.")
    refuse_unpacked(folder)
    packed = Packed(folder)
    refuse(packed.modules, target, to)
    if check:
        proof.require(target, to)
    verify(folder, observer=observer)
    if isinstance(target, WholeTarget):
        _raise(_gathered(list(target.refuse_checkpoint(packed))), target, to)
    for note in target.notes(packed.modules):
        observer(Note(note, "warning"))
    if cache := packed.config["quantization_config"].get("kv"):
        observer(Note(f"the quantized cache {cache['format']!r} is not exported: no target has such a one", "warning"))
    observer(Started("export", 2 + check, "step"))
    with new_folder(place) as made:
        target.write(packed, made)
        list(copy_companions(folder, made))
        observer(Advanced("export", 1, "written"))
        more = target.loading_of(packed) if isinstance(target, WholeTarget) else {}
        figures = proof.prove(target, folder, made, packed.vocab, more) if check else None
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
    """The target of a name, or that a program reads, with options, numbers as text too.

    Raises:
        UsageError: there is none of that name, or it has no such option.
    """
    name = READERS.get(to, to)
    if name not in targets():
        close = get_close_matches(name, targets(), 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        programs = ", ".join(f"{program} (reads {target})" for program, target in READERS.items())
        raise UsageError(f"--to {to}: expected {', '.join(targets())}, {programs}.{hint}")
    made = plugins.get("export", name.replace("-", "_"))
    types = {f.name: f.type for f in fields(made)}
    unknown = sorted(set(options) - set(types))
    if unknown:
        raise UsageError(f"--to {to} has no option {', '.join(unknown)}; its options: {', '.join(types) or 'none'}.")
    target: Target = made(**{name: _number(name, v) if types[name] in _NUMBERS else v for name, v in options.items()})
    return target


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} {value!r}: expected a number.") from None


def refuse_unpacked(folder: Path) -> None:
    """Raise `PlanError` for a model that is dense, or that another library packed; `CheckpointError` for no folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder that qexport wrote, found no folder. Check the path.")
    found = read_json(folder / "config.json").get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method is None:
        raise PlanError(f"{folder}: is not quantized. `qexport quantize {folder}` first.")
    if method != "qexport":
        raise PlanError(
            f"{folder}: is a {str(method)[:40]} checkpoint already. `qexport import` turns it into ours first."
        )


def refuse(modules: Sequence[Module], target: Target, to: str) -> None:
    """Raise `PlanError` with every reason that a target has against modules of a checkpoint."""
    _raise(refusals(modules, target), target, to)


def _raise(lines: Sequence[str], target: Target, to: str) -> None:
    if lines:
        raise PlanError(f"--to {to} ({target.source}): nothing was written.\n  " + "\n  ".join(lines))


def refusals(modules: Sequence[Module], target: Target) -> list[str]:
    """Every reason that a target has against modules, once, with the first of them and how many more there are."""
    found = [(module.name, target.refuse(module)) for module in modules]
    alone = [(name, reason) for name, reason in found if reason]
    return _gathered(alone or target.refuse_together(modules))


def _gathered(found: Sequence[tuple[str, str]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in found:
        reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}."
        for reason, names in reasons.items()
    ]


def planned(plan: Plan) -> list[Module]:
    """The modules of a plan as they will be packed."""
    kinds = {plan.embedding.view.name: "embedding"} if plan.embedding else {}
    return [
        Module(
            name, m.spec, m.view.n, m.view.k, kinds.get(name, "linear" if m.view.index is None else "expert"),
            m.view.transposed,
        )
        for name, m in plan.modules.items()
    ]  # fmt: skip


def reader_of(reader: str) -> tuple[str, Target]:
    """Name and target for a target's name, `vllm` or `llama.cpp`; raises `UsageError` where there is none."""
    return READERS.get(reader, reader), target_of(reader, {})


def outlook(plan: Plan, reader: str) -> dict[str, Any]:
    """Whether what a plan makes can be exported for a reader: a target's name, `vllm` or `llama.cpp`.

    Returns:
        `{"for", "to", "refused", "notes"}`; `refused` is empty if all can be told.

    Raises:
        UsageError: nothing is known of that reader.
    """
    to, target = reader_of(reader)
    modules = planned(plan)
    refused = refusals(modules, target)
    return {"for": reader, "to": to, "refused": refused, "notes": [] if refused else target.notes(modules)}
