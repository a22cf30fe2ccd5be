"""What a checkpoint stores for its cache of keys and values: one file of calibrated tensors, and figures.

`config.json` names the format. What calibration found for layer 3 is in `cache.safetensors` as `cache.3.<name>`; a
format that calibrates nothing has no such file. transformers never sees it: no index lists it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from qexport import schema
from qexport.checkpoint import Reader, Written, shape_of, write_tensors
from qexport.container import METADATA_KEY, SCHEMA
from qexport.errors import CheckpointError
from qexport.formats.kv.base import NONE, KVFormat, kv_from_json, kv_json, kv_name, predicted_nbytes
from qexport.schema import Tensors

FILE = "cache.safetensors"
PENDING = "cache.safetensors.new"
"""The file while a job that exchanges one cache for another writes it; see `stored`."""
WORK = ".cache-calibration.safetensors"
"""Hidden: what a job that calibrates a cache has so far."""
_PREFIX = "cache."

Heads: TypeAlias = Mapping[int, tuple[int, int]]
"""Heads and channels of a head, by layer."""
Statics: TypeAlias = Mapping[int, Tensors]


def calibrates(fmt: KVFormat | None) -> bool:
    """Whether a format needs tensors that calibration finds."""
    return fmt is not None and bool(fmt.static(1, 32))


def write(path: Path, fmt: KVFormat, statics: Statics) -> Written:
    """Write the calibrated tensors of all layers."""
    tensors = {f"{_PREFIX}{layer}.{name}": t for layer, own in statics.items() for name, t in own.items()}
    return write_tensors(path, tensors, {"schema": SCHEMA, "kv": kv_json(fmt)})


def stored(folder: Path, fmt: KVFormat) -> Path | None:
    """The file with what a format needs; None if there is none.

    A job that exchanges caches writes the new file beside the old one, then the config, then renames. Whatever it is
    killed at, the config and one of the two files belong together.
    """
    pending, usual = folder / PENDING, folder / FILE
    if pending.is_file():
        try:
            if _described(Reader(folder, [PENDING]), PENDING) == fmt:
                return pending
        except CheckpointError:
            pass  # not that job's, or cut short: the usual file decides
    return usual if usual.is_file() else None


def read(folder: Path, fmt: KVFormat, heads: Heads) -> dict[int, dict[str, Tensor]]:
    """Calibrated tensors by layer, with everything about them checked; nothing where a format needs none.

    Args:
        folder: of the checkpoint.
        fmt: that its config names.
        heads: of every layer with keys and values.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another cache.
        LayoutError: a tensor is missing, of another dtype or shape, or its content could mislead a reader.
    """
    if not calibrates(fmt):
        return {}
    path = stored(folder, fmt)
    if path is None:
        raise CheckpointError(
            f"{FILE}: missing from {folder}; config.json names the cache {kv_name(fmt)!r}, which needs it. Fetch it "
            f"again, or make it again: qexport quantize {folder} --kv {kv_name(fmt)}"
        )
    reader = Reader(folder, [path.name])
    own = _described(reader, path.name)
    if own != fmt:
        raise CheckpointError(
            f"{path.name}: holds what was found for {spell(own)}, and config.json names {spell(fmt)}. One of them is "
            f"from elsewhere. Fetch both again, or make it again: qexport quantize {folder} --kv {kv_name(fmt)}"
        )
    return _read(reader, fmt, heads)


def check(statics: Statics, fmt: KVFormat, heads: Heads) -> None:
    """Compare calibrated tensors with what a format demands for every layer; raises `LayoutError`."""
    for layer, (count, dim) in heads.items():
        own, where = statics.get(layer, {}), f"{_PREFIX}{layer}"
        schema.check(own, fmt.static(count, dim), where)
        fmt.check_static(own, count, dim, where)


def _read(reader: Reader, fmt: KVFormat, heads: Heads) -> dict[int, dict[str, Tensor]]:
    names: dict[int, list[str]] = {layer: [] for layer in heads}
    for name in reader.names:
        number, _, field = name.removeprefix(_PREFIX).partition(".")
        known = number.isdecimal() and str(int(number)) == number and int(number) in heads
        if not (name.startswith(_PREFIX) and known and field):
            raise CheckpointError(f"{name[:200]}: {FILE} holds it, and no layer of the model has such a tensor.")
        names[int(number)].append(field)
    for layer, (count, dim) in heads.items():
        metas = {field: shape_of(reader.meta(_name(layer, field)), _name(layer, field)) for field in names[layer]}
        schema.check(metas, fmt.static(count, dim), f"{_PREFIX}{layer}")
    found = {layer: {field: reader.read(_name(layer, field)) for field in own} for layer, own in names.items()}
    check(found, fmt, heads)
    return found


def _name(layer: int, field: str) -> str:
    return f"{_PREFIX}{layer}.{field}"


def _described(reader: Reader, file: str) -> KVFormat:
    """The format that a file's own metadata names; raises `CheckpointError`."""
    try:
        data = json.loads(reader.metadata[file][METADATA_KEY])
        version = data["schema"]
        if type(version) is not int or not 1 <= version <= SCHEMA:
            raise CheckpointError(f"{file}: schema {str(version)[:20]} needs a newer qexport.")
        return kv_from_json(data["kv"], file)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a qexport table in its metadata, found {error!r:.100}.") from error


def options_of(fmt: KVFormat) -> dict[str, Any]:
    """All options of a format."""
    return dict(kv_json(fmt)["options"])


def spell(fmt: KVFormat | None) -> str:
    """A cache with its options, for people."""
    if fmt is None:
        return NONE
    options = options_of(fmt)
    return f"{kv_name(fmt)} ({', '.join(f'{key} {value}' for key, value in options.items())})"


# ---- figures -----------------------------------------------------------------------------------


def figures(fmt: KVFormat, heads: Heads) -> dict[str, Any]:
    """What a cache stores once tokens are coded.

    Returns:
        `name`; `bits`, stored bits of a number of `keys` and of `values`, scales and the like counted;
        `bytes_per_token` of all layers together, `fp16_bytes_per_token`, and `ratio`, the one to the other.
    """
    sides = {"keys": fmt.keys, "values": fmt.values}
    numbers = sum(count * dim for count, dim in heads.values())
    nbytes = {
        side: sum(schema.nbytes(coder.layout(*size)) for size in heads.values()) / coder.group
        for side, coder in sides.items()
    }
    total, whole = sum(nbytes.values()), 4 * numbers
    return {
        "name": kv_name(fmt),
        "bits": {side: 8 * count / numbers for side, count in nbytes.items()},
        "bytes_per_token": total,
        "fp16_bytes_per_token": whole,
        "ratio": total / whole,
    }


def figures_in(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures that a manifest states for its cache, None if it has none; raises `CheckpointError`."""
    facts = manifest.get("kv")
    if facts is None:
        return None
    try:
        numbers = {key: facts[key] + 0 for key in ("bytes_per_token", "fp16_bytes_per_token", "ratio")}
        bits = {side: facts["bits"][side] + 0 for side in ("keys", "values")}
        return {"name": str(facts["name"]), "bits": bits, **numbers}
    except (KeyError, TypeError) as error:
        raise CheckpointError("qexport.json: kv needs a name, bits of keys and values, and bytes per token.") from error


def at_length(fmt: KVFormat, heads: Heads, windows: Mapping[int, int | None], tokens: int) -> dict[str, int]:
    """Bytes of one sequence of so many tokens, coded and in float16; what stays uncoded counts as float16."""
    seen = {layer: min(tokens, windows.get(layer) or tokens) for layer in heads}
    return {
        "tokens": tokens,
        "bytes": sum(predicted_nbytes(fmt, seen[layer], count, dim, 2) for layer, (count, dim) in heads.items()),
        "fp16_bytes": sum(4 * seen[layer] * count * dim for layer, (count, dim) in heads.items()),
    }
