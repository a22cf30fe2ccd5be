"""What the files of a packed checkpoint say for its model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport import card
from qexport.checkpoint import Reader, read_json
from qexport.evaluate.run import read_results
from qexport.evaluate.size import measure, packed_modules

MANIFEST = "qexport.json"


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
    return card.Facts(
        name=repo,
        base=base if on_hub else Path(base).name,
        base_on_hub=on_hub,
        commit=plan.get("commit"),
        recipe=recipe,
        methods=methods or ["unknown"],
        formats=formats or sorted(specs),
        tags=_distinct(["qexport", "quantized", recipe, *sorted(specs), *sorted(bits)]),
        bits_per_weight=sizes.bits_per_weight,
        bits_per_parameter=sizes.bits_per_parameter,
        nbytes=sizes.nbytes,
        modules=len(modules),
        embeddings=manifest.get("embeddings") or (),
        dense=manifest.get("dense") or (),
        calibration=_calibration(plan.get("calibration"), manifest.get("calibration")),
        writer=manifest.get("writer"),
        results=read_results(folder),
    )


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
