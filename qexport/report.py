"""Tables of what there is, and of a finished checkpoint. Everything here returns plain data and writes nothing."""

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from qexport import checkpoint, container, plugins, recipe
from qexport.checkpoint import read_json
from qexport.container import Quantization
from qexport.errors import CheckpointError
from qexport.formats.base import bits_per_weight
from qexport.formats.kv.base import PRESETS, KVFormat, make_kv
from qexport.formats.specs import InputSpec, LinearSpec, refuse_input, to_json
from qexport.inputs.base import described
from qexport.kvfile import calibrates, figures, figures_in, options_of
from qexport.methods.base import LinearMethod
from qexport.runtime.dispatch import choose
from qexport.runtime.embedding import QuantEmbedding

_EXAMPLE = (4096, 4096)  # the size that `formats` states bits for
_HEADS = (8, 128)  # heads and their channels, for caches


# ---- what there is -----------------------------------------------------------------------------


def methods() -> dict[str, Any]:
    """Methods with a cell for every format, transforms with a cell for every pair of the two, and recipes."""
    found = {}
    for name in plugins.names("methods"):
        cls = plugins.get("methods", name)
        found[name] = {
            "source": cls.source,
            "needs": sorted(kind.__name__ for kind in cls().needs),
            "options": _options(cls),
            "formats": {fmt: _cell(name, cls(), fmt) for fmt in plugins.names("formats")},
        }
    transforms = {}
    for name in plugins.names("transforms"):
        made = plugins.get("transforms", name)
        transforms[name] = {
            "source": made.source,
            "needs": sorted(kind.__name__ for kind in made().needs),
            "options": _options(made),
            "pairs": {
                m: {fmt: _transformed(m, fmt, name, cell) for fmt, cell in entry["formats"].items()}
                for m, entry in found.items()
            },
        }
    recipes = {}
    for name in recipe.recipe_names():
        r = recipe.load_recipe(name)
        fmt = plugins.get("formats", r.format)(**r.format_options)
        method = plugins.get("methods", r.method)(**r.method_options)
        extents = method.expected_extents(fmt, *_EXAMPLE)
        recipes[name] = {
            "summary": r.summary, "source": r.source, "method": r.method, "format": r.format,
            "method_options": dict(r.method_options), "format_options": dict(r.format_options),
            "transforms": [name for name, _ in r.transforms], "tier": r.tier,
            "input": {"name": r.input, **r.input_options} if r.input else None,
            "kv": {"name": r.kv, **r.kv_options} if r.kv else None,
            "bits_per_weight": bits_per_weight(fmt, *_EXAMPLE, extents),
        }  # fmt: skip
    blocks = {}
    for name in plugins.names("blocks"):
        own = plugins.get("blocks", name)
        blocks[name] = {"source": own.source, "options": _options(own)}
    return {"methods": found, "transforms": transforms, "blocks": blocks, "recipes": recipes}


def formats() -> dict[str, Any]:
    """Formats with their options, true bits of a 4096 x 4096 matrix by default options, and a cell for every method."""
    found = {}
    for name in plugins.names("formats"):
        cls = plugins.get("formats", name)
        found[name] = {
            "source": cls.source,
            "version": cls.version,
            "options": _options(cls),
            "bits_per_weight": bits_per_weight(cls(), *_EXAMPLE),
            "kernel": name in plugins.names("kernels"),
            "methods": {m: _cell(m, plugins.get("methods", m)(), name) for m in plugins.names("methods")},
        }
    inputs = {}
    for name in plugins.names("inputs"):
        quant = plugins.get("inputs", name)
        inputs[name] = {
            "source": quant.source,
            "options": _options(quant),
            "calibrated": quant().calibrated,
            "formats": {fmt: _rounded(name, fmt) for fmt in found},
        }
    return {"formats": found, "inputs": inputs, "caches": _caches(), "shape": list(_EXAMPLE)}


def _caches() -> dict[str, Any]:
    """Caches with their options and figures for layers of `_HEADS`."""
    found = {}
    for name in PRESETS:
        fmt = make_kv(name)
        assert fmt is not None
        bits = figures(fmt, {0: _HEADS})["bits"]
        found[name] = {
            "source": fmt.source,
            "format": fmt.name,
            "version": fmt.version,
            "options": options_of(fmt),
            "calibrated": calibrates(fmt),
            "bits": bits,
            "heads": list(_HEADS),
        }
    return found


def _rounded(quant: str, fmt: str) -> str:
    """Whether an input can be rounded so and multiplied by a format as integers."""
    made = plugins.get("formats", fmt)()
    reason = refuse_input(LinearSpec(made, InputSpec(quant=plugins.get("inputs", quant)())))
    return f"refused: {reason}" if reason else "runs"


def validated() -> list[dict[str, str]]:
    """Pairs, some with a transform, whose quality was measured, with the file of `benchmarks/results` that says so."""
    text = (resources.files("qexport") / "validated.toml").read_text()
    pairs: list[dict[str, str]] = tomllib.loads(text).get("pair", [])
    return pairs


def _cell(name: str, method: LinearMethod, fmt: str) -> str:
    reason = method.reject(plugins.get("formats", fmt)())
    if reason is not None:
        return f"refused: {reason}"
    return "validated" if {"method": name, "format": fmt, "transform": ""} in _measured() else "runs"


def _transformed(method: str, fmt: str, transform: str, cell: str) -> str:
    """The cell of a pair after a transform; a pair that is refused by itself stays so."""
    reason = plugins.get("transforms", transform)().reject(plugins.get("formats", fmt)())
    if cell.startswith("refused") or reason is None:
        known = {"method": method, "format": fmt, "transform": transform} in _measured()
        return cell if cell.startswith("refused") else "validated" if known else "runs"
    return f"refused: {reason}"


def _measured() -> list[dict[str, str]]:
    return [{key: pair.get(key, "") for key in ("method", "format", "transform")} for pair in validated()]


def _options(cls: Any) -> dict[str, Any]:
    return {f.name: None if f.default is MISSING else f.default for f in fields(cls)}


# ---- a checkpoint ------------------------------------------------------------------------------


def inspect(directory: Path | str, *, backend: str = "auto", device: str = "auto") -> dict[str, Any]:
    """What a checkpoint holds, from its manifest and config; no tensor is read.

    Args:
        directory: a folder that `qexport quantize` wrote.
        backend: the path to ask for.
        device: where it would run; `"auto"` is CUDA where there is one.

    Returns:
        `model, commit, recipe, writer, bits_per_weight, bits_per_parameter, bytes, files`; `specs`, each with its
        modules and bits; `kinds`, bits, mean relative error and what becomes of the input by kind of module; `paths`,
        the chosen path and its reason with the number of modules it serves; `inputs`, how many modules multiply
        integers, how many only as floats that hold them (`simulated`), how many floats, and how many of the former
        floats while tokens are generated one by one; `dense`, `towers`; `kv`, the quantized cache or None;
        `calibration` and `run` as recorded.

    Raises:
        CheckpointError: it is no such folder, or one of its files is malformed.
        BackendError: the backend can't run here.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder that qexport wrote, found no folder. Check the path.")
    quantization = container.parse(read_json(folder / "config.json").get("quantization_config"))
    manifest = read_json(folder / "qexport.json")
    modules = _modules(manifest, quantization)
    plan, run = _records(manifest, folder)
    sizes = {name: (folder / name).stat().st_size for name in manifest.get("files") or () if (folder / name).is_file()}
    return {
        "directory": str(folder),
        "model": plan.get("model"),
        "commit": plan.get("commit"),
        "recipe": plan.get("recipe"),
        "writer": manifest.get("writer"),
        "bits_per_weight": manifest.get("bits_per_weight"),
        "bits_per_parameter": manifest.get("bits_per_parameter"),
        "bytes": sum(
            size for name, size in sizes.items() if name.endswith(".safetensors") and name.startswith("model")
        ),
        "files": sizes,
        "specs": _specs(modules.values()),
        "kinds": _kinds(modules, manifest["modules"]),
        **_paths(modules, manifest.get("embeddings") or (), backend, device),
        "dense": list(manifest.get("dense") or ()),
        "towers": list(manifest.get("towers") or ()),
        "kv": _cache(quantization.kv, manifest),
        "calibration": {"plan": plan.get("calibration"), "origin": manifest.get("calibration")},
        "chosen": [dict(entry) for entry in manifest.get("chosen") or () if isinstance(entry, dict)],
        "seed": plan.get("seed"),
        "run": run,
    }


def _cache(fmt: KVFormat | None, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantized cache: format, options, figures, its layers, and what it was calibrated on; None if there is none.

    `calibrated` says whether its layers have tensors that calibration found.
    """
    figures = figures_in(manifest)
    if fmt is None or figures is None:
        return None
    facts = manifest["kv"]
    return {
        **figures,
        "format": fmt.name,
        "version": fmt.version,
        "options": options_of(fmt),
        "layers": list(facts.get("layers") or ()),
        "calibrated": calibrates(fmt),
        "calibration": facts.get("calibration"),
    }


def _records(manifest: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The plan in a manifest and the record of the run; raises `CheckpointError` where a fact is of another kind."""
    run = read_json(folder / "run.json") if (folder / "run.json").exists() else None
    _expect("qexport.json", manifest, files=dict, plan=dict, dense=list, towers=list, calibration=dict, writer=str)
    _expect("qexport.json", manifest, bits_per_weight=(int, float), bits_per_parameter=(int, float), embeddings=list)
    _expect("qexport.json", manifest, chosen=list)
    plan = manifest.get("plan") or {}
    _expect("qexport.json, plan", plan, model=str, commit=str, recipe=str, calibration=dict)
    _expect("run.json", run or {}, seconds=(int, float), peak_rss_bytes=int)
    return plan, run


def _expect(where: str, found: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> None:
    for key, kind in kinds.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise CheckpointError(
                f"{where}: expected {names} under {key!r}, found {type(found[key]).__name__}. "
                "The file was changed or damaged; fetch or write it again."
            )


def _modules(manifest: Mapping[str, Any], quantization: Quantization) -> dict[str, tuple[LinearSpec, int, int, int]]:
    """Spec, n, k and stored bytes of every packed module."""
    found: dict[str, tuple[LinearSpec, int, int, int]] = {}
    table = manifest.get("modules")
    if not isinstance(table, dict) or not table:
        raise CheckpointError("qexport.json: expected a table of modules.")
    for name, facts in table.items():
        spec = quantization.spec_for(name)
        if spec is None:
            raise CheckpointError(f"qexport.json: lists {name}, which config.json says is dense.")
        try:
            found[name] = (spec, int(facts["n"]), int(facts["k"]), int(facts["nbytes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"qexport.json: the entry of {name} needs n, k and nbytes.") from error
    return found


def _specs(modules: Iterable[tuple[LinearSpec, int, int, int]]) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for spec, n, k, nbytes in modules:
        entry = table.setdefault(
            checkpoint.dump_json(to_json(spec)), {**to_json(spec), "modules": 0, "weights": 0, "bytes": 0}
        )
        entry["modules"] += 1
        entry["weights"] += n * k
        entry["bytes"] += nbytes
    return [{**entry, "bits_per_weight": 8 * entry["bytes"] / entry["weights"]} for entry in table.values()]


def _kinds(
    modules: Mapping[str, tuple[LinearSpec, int, int, int]], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By the name of a module without the numbers in it: how many, how large, how many bits, how wrong."""
    table: dict[str, dict[str, Any]] = {}
    for name, (spec, n, k, nbytes) in modules.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        entry = table.setdefault(
            kind, {"modules": 0, "weights": 0, "bytes": 0, "formats": set(), "inputs": set(), "errors": []}
        )
        entry["modules"] += 1
        entry["weights"] += n * k
        entry["bytes"] += nbytes
        entry["formats"].add(spec.weight.name)
        entry["inputs"].add(described(spec.input.quant))
        if isinstance(error := facts[name].get("error"), float):
            entry["errors"].append(error)
    for entry in table.values():
        errors = entry.pop("errors")
        entry["formats"], entry["inputs"] = sorted(entry["formats"]), sorted(entry["inputs"])
        entry["bits_per_weight"] = 8 * entry["bytes"] / entry["weights"]
        entry["error"] = sum(errors) / len(errors) if errors else None
    return table


def _paths(
    modules: Mapping[str, tuple[LinearSpec, int, int, int]], embeddings: Collection[str], backend: str, device: str
) -> dict[str, Any]:
    """The path that each module would take on a device, and why, equal ones together; and what they multiply."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    table: dict[tuple[str, str, str], int] = {}
    inputs = {"integer": 0, "simulated": 0, "float": 0, "float_in_decoding": 0}
    for name, (spec, n, k, _) in modules.items():
        choice = QuantEmbedding.choice if name in embeddings else choose(spec, n, k, device, backend)
        key = (spec.weight.name, choice.path, choice.reason)
        table[key] = table.get(key, 0) + 1
        simulated = "simulated" if choice.path == "reference" else "integer"
        inputs["float" if spec.input.quant is None else simulated] += 1
        inputs["float_in_decoding"] += spec.input.quant is not None and spec.input.quant.decode_input == "float"
    paths = [
        {"format": fmt, "device": device, "path": path, "reason": reason, "modules": count}
        for (fmt, path, reason), count in table.items()
    ]
    return {"paths": paths, "inputs": inputs}
