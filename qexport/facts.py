"""What the files of a packed or exported checkpoint say for its model card."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from qexport import card
from qexport.checkpoint import Reader, dump_json, read_json, sha256, write_text
from qexport.errors import CheckpointError
from qexport.evaluate.record import read_results
from qexport.evaluate.size import measure, packed_modules
from qexport.inputs.base import described
from qexport.kvfile import figures_in
from qexport.verify import MANIFEST

EXPORT = "qexport-export.json"
_CARD = "README.md"
_NAMED = re.compile(r'AutoModelForCausalLM\.from_pretrained\(("(?:[^"\\]|\\.)*")\)')  # how a card calls its folder
_NAME = "{name}"  # stands for the repository in what an export says of its loading


def write_export(
    folder: Path, facts: card.Facts, to: str, source: str, how: str, check: Mapping[str, Any] | None
) -> None:
    """Write what an exported folder says of itself, and its card.

    Args:
        folder: with all its other files.
        facts: of the packed checkpoint; the name is the folder's.
        to: name of the target.
        source: the library and version that it is written for.
        how: how it is loaded, in Markdown, with `{name}` for the repository.
        check: figures of the proof.
    """
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    about = {
        "schema": 1,
        "to": to,
        "source": source,
        "how": how,
        "check": check,
        "facts": asdict(facts),
        "files": files,
    }
    write_text(folder / EXPORT, dump_json(about, indent=1) + "\n")
    write_text(folder / "README.md", export_card(folder, facts.name))


def export_card(folder: Path, repo: str) -> str:
    """The card of an exported folder under the name of its repository; raises `CheckpointError`."""
    about = read_json(folder / EXPORT)
    given, source, how = about.get("facts"), about.get("source"), about.get("how")
    known = {f.name for f in fields(card.Facts)}
    if not (isinstance(given, dict) and set(given) <= known and isinstance(source, str) and isinstance(how, str)):
        raise CheckpointError(f"{EXPORT}: expected facts, source and how, as `qexport export` writes them.")
    facts = replace(card.Facts(**given), name=repo)
    return card.render_export(facts, source, how.replace(_NAME, repo), about.get("check"))


def check_export(folder: Path) -> Mapping[str, str]:
    """Files of an exported folder with their sha256; raises `CheckpointError` where one is not what it was."""
    files = read_json(folder / EXPORT).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{EXPORT}: expected a table of files with their sha256.")
    for name, wanted in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{name[:200]}: missing; {EXPORT} lists it. Export the checkpoint again.")
        if sha256(folder / name) != wanted:
            raise CheckpointError(f"{name}: was changed since it was exported. Export the checkpoint again.")
    return files


def card_facts(folder: Path, repo: str) -> card.Facts:
    """What the files of a directory say for its card; raises `CheckpointError`."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    plan = manifest.get("plan") or {}
    sizes, modules = measure(folder), packed_modules(Reader(folder))
    specs = {spec.weight.name for spec, _, _ in modules.values()}
    groups = plan.get("modules") or []
    methods = _distinct(_spell(group["method"], "name") for group in groups)
    formats = _distinct(_spell({"format": g["spec"]["format"], **g["spec"]["options"]}, "format") for g in groups)
    base = str(plan.get("model") or "unknown")
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    recipe = str(plan.get("recipe") or "unknown")
    bits = {f"{spec.weight.bits}-bit" for spec, _, _ in modules.values() if hasattr(spec.weight, "bits")}
    kv, figures = manifest.get("kv") or {}, figures_in(manifest)
    return card.Facts(
        name=repo,
        base=base if on_hub else Path(base).name,
        base_on_hub=on_hub,
        commit=plan.get("commit"),
        recipe=recipe,
        methods=methods or ["unknown"],
        formats=formats or sorted(specs),
        inputs=sorted({described(spec.input.quant) for spec, _, _ in modules.values() if spec.input.quant}),
        tags=_distinct(["qexport", "quantized", recipe, *sorted(specs), *sorted(bits)]),
        bits_per_weight=sizes.bits_per_weight,
        bits_per_parameter=sizes.bits_per_parameter,
        nbytes=sizes.nbytes,
        modules=len(modules),
        embeddings=manifest.get("embeddings") or (),
        dense=manifest.get("dense") or (),
        calibration=_calibration(plan.get("calibration"), manifest.get("calibration")),
        kv=None if figures is None else _spell({"name": figures["name"], **(kv.get("options") or {})}, "name"),
        kv_bytes=None if figures is None else (figures["bytes_per_token"], figures["fp16_bytes_per_token"]),
        kv_calibration=_calibration(kv.get("calibration"), kv.get("calibration")),
        writer=manifest.get("writer"),
        results=read_results(folder),
    )


def renew_card(folder: Path) -> bool:
    """Write a folder's model card anew if it has one that nobody edited; returns whether it did."""
    path = folder / _CARD
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    named = _NAMED.search(text)
    if not card.is_generated(text) or named is None or (folder / EXPORT).exists():
        return False
    write_text(path, card.render(card_facts(folder, json.loads(named[1]))))
    return True


def _distinct(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _spell(entry: Mapping[str, Any], head: str) -> str:
    options = ", ".join(f"{key} {value}" for key, value in sorted(entry.items()) if key != head and value is not None)
    return f"`{entry[head]}`" + (f" ({options})" if options else "")


def _calibration(planned: Any, origin: Any) -> str | None:
    if not planned:
        return None
    found = origin if isinstance(origin, Mapping) else {}
    source = Path(str(planned.get("source", "unknown"))).name
    amount = f"{planned.get('samples', '?')} x {planned.get('seqlen', '?')} tokens"
    digest = f", sha256 {str(found['sha256'])[:16]}" if found.get("sha256") else ""
    return f"{source}, {amount}{digest}"
