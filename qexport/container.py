"""What a checkpoint says about its packed modules: in `config.json` for all of them, in each shard for its own.

Writing is `describe` and `shard_metadata`; reading is `parse` and `read_shard_metadata`, which trust nothing.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import CheckpointError
from qexport.formats.kv.base import KVFormat, kv_from_json
from qexport.formats.specs import LinearSpec, from_json, to_json
from qexport.schema import Extents

SCHEMA = 1
METADATA_KEY = "qexport"
FORGOTTEN_IMPORT = "packed by qexport: pip install qexport, then import qexport"


# ---- quantization_config -----------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """What `config.json` says about packed modules.

    Attributes:
        specs: the distinct specs.
        patterns: module path, in which a component may be `*`, any number, to index into `specs`; None marks a dense
            exception.
        extents: data-dependent extents of each module that has any.
        kv: how the cache of keys and values is stored; None as the model's class does it.
    """

    specs: tuple[LinearSpec, ...]
    patterns: Mapping[str, int | None]
    extents: Mapping[str, Extents]
    kv: KVFormat | None = None

    def spec_for(self, module: str) -> LinearSpec | None:
        """The spec of a module path, None if it is dense; the pattern with the fewest wildcards decides."""
        parts = module.split(".")
        fitting = [p for p in self.patterns if _matches(p.split("."), parts)]
        if not fitting:
            return None
        index = self.patterns[min(fitting, key=lambda p: (p.split(".").count("*"), p))]
        return None if index is None else self.specs[index]

    def extents_of(self, module: str) -> Extents:
        """Data-dependent extents of a module; empty for most formats."""
        return self.extents.get(module, {})


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(
        a == b or (a == "*" and b.isdigit()) for a, b in zip(pattern, parts, strict=True)
    )


def describe(modules: Mapping[str, LinearSpec | None], extents: Mapping[str, Extents]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose cache is not quantized.

    Args:
        modules: every module by path, with its spec, or None if it is dense or no linear: a pattern must not fit those.
        extents: data-dependent extents, by module path.
    """
    specs: list[dict[str, Any]] = []
    index: dict[str, int | None] = {}
    for name, spec in modules.items():
        entry = None if spec is None else to_json(spec)
        if entry is not None and entry not in specs:
            specs.append(entry)
        index[name] = None if entry is None else specs.index(entry)
    return {
        "quant_method": "qexport",
        "schema": SCHEMA,
        "specs": specs,
        "modules": _patterns(index),
        "extents": {name: dict(found) for name, found in extents.items() if found},
        "transforms": [],
        "kv": None,
    }


def _patterns(index: Mapping[str, int | None]) -> dict[str, int | None]:
    """Few patterns that say of every module what `index` does: those of a repeated layer share one.

    What differs from the most frequent entry of its family gets a pattern of its own, with the last number spelt out if
    that says the same in all layers (the activation between two linears of a `Sequential`), else its name.
    """
    families, finer = _families(index, spelt=0), _families(index, spelt=1)
    patterns: dict[str, int | None] = {}
    for pattern, members in families.items():
        usual = Counter(index[name] for name in members).most_common(1)[0][0]
        if usual is not None:
            patterns[pattern] = usual
        for name in members:
            if index[name] != usual:
                near = _starred(name, spelt=1)
                agreed = len({index[other] for other in finer[near]}) == 1
                patterns[near if agreed else name] = index[name]
    return patterns


def _families(names: Iterable[str], *, spelt: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_starred(name, spelt=spelt), []).append(name)
    return found


def _starred(name: str, *, spelt: int) -> str:
    """A module path with a wildcard for each of its numbers but the last `spelt`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    gone = set(numbers[: len(numbers) - spelt])
    return ".".join("*" if i in gone else part for i, part in enumerate(parts))


def parse(config: Any, where: str = "config.json") -> Quantization:
    """Read an untrusted `quantization_config`; raises `CheckpointError` on what is malformed, foreign or too new."""
    if not isinstance(config, Mapping) or config.get("quant_method") != "qexport":
        raise CheckpointError(
            f"{where}: expected a quantization_config with quant_method 'qexport'. `qexport quantize` makes such a "
            "folder of a dense model, `qexport import` of one that another library packed."
        )
    version = config.get("schema")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA:
        raise CheckpointError(
            f"{where}: schema {str(version)[:20]} needs a newer qexport; this one reads up to {SCHEMA}."
        )
    if config.get("required") or config.get("transforms"):
        raise CheckpointError(f"{where}: uses required features that this qexport does not know; a newer one may.")
    specs, modules, extents = config.get("specs"), config.get("modules"), config.get("extents") or {}
    if not (isinstance(specs, list) and isinstance(modules, Mapping) and isinstance(extents, Mapping)):
        raise CheckpointError(f"{where}: expected specs (a list), modules and extents (tables).")
    for pattern, number in modules.items():
        if number is not None and not (type(number) is int and 0 <= number < len(specs)):
            raise CheckpointError(f"{where}: module {pattern[:200]!r} names spec {str(number)[:20]} of {len(specs)}.")
    for module, found in extents.items():
        if not (isinstance(found, Mapping) and all(type(v) is int and v >= 0 for v in found.values())):
            raise CheckpointError(f"{where}: the extents of {module[:200]!r} are not counts.")
    kv = None if config.get("kv") is None else kv_from_json(config["kv"], where)
    return Quantization(tuple(from_json(spec, where) for spec in specs), dict(modules), dict(extents), kv)


# ---- a shard's own metadata --------------------------------------------------------------------


def shard_metadata(modules: Mapping[str, tuple[LinearSpec, int, int]]) -> dict[str, Any]:
    """What a shard says of its packed modules (spec, n, k), so that it can be read without the config."""
    specs: list[dict[str, Any]] = []
    table: dict[str, list[int]] = {}
    for name, (spec, n, k) in modules.items():
        entry = to_json(spec)
        if entry not in specs:
            specs.append(entry)
        table[name] = [specs.index(entry), n, k]
    return {"schema": SCHEMA, "specs": specs, "modules": table}


def read_shard_metadata(metadata: Mapping[str, str], file: str) -> dict[str, tuple[LinearSpec, int, int]]:
    """Spec, n and k of each packed module of a shard, from its untrusted metadata; raises `CheckpointError`."""
    try:
        data = json.loads(metadata[METADATA_KEY])
        if not 1 <= int(data["schema"]) <= SCHEMA:
            raise CheckpointError(f"{file}: schema {str(data['schema'])[:20]} needs a newer qexport.")
        specs = [from_json(entry, file) for entry in data["specs"]]
        table = {}
        for name, (index, n, k) in data["modules"].items():
            if not all(type(v) is int and v >= 0 for v in (index, n, k)):
                raise ValueError(name)
            table[name] = (specs[index], n, k)
        return table
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a qexport table in its metadata, found {error!r:.100}.") from error
