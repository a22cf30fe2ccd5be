"""Is a checkpoint what its manifest says? Structure first, which names the tensor; then hashes; then contents.

Loading refuses by itself what is structural. This goes further: every byte of every file is read.
"""

import fnmatch
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from qexport import checkpoint, container, kvfile
from qexport.checkpoint import COMPANIONS, INDEX, Reader, read_json
from qexport.container import Quantization, read_shard_metadata
from qexport.errors import CheckpointError, LayoutError
from qexport.events import Advanced, Observer, Started, ignore
from qexport.formats.kv.base import kv_from_json, kv_name
from qexport.formats.specs import LinearSpec

MANIFEST = "qexport.json"
# What loaders look for beside the files of the manifest: more weights, another tokenizer, an adapter, code.
_LOADED = (
    *COMPANIONS, "config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt",
    "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.model", "*.jinja", "tokenizer*.json", "adapter_*",
    "additional_chat_templates", "custom_generate",
)  # fmt: skip


def verify(directory: Path | str, *, observer: Observer = ignore) -> dict[str, Any]:
    """Check a checkpoint completely.

    Args:
        directory: a folder that `qexport quantize` wrote, or a download of one.
        observer: is told of progress.

    Returns:
        `{"directory", "files", "bytes", "modules", "tensors", "bits_per_weight", "kv"}` of what was found in order;
        bytes of the files in the manifest, bits counted from the packed tensors, the name of the quantized cache or
        None.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, in another's place or too new; names the file.
        LayoutError: a tensor is missing, or is not what its format demands; names the tensor.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder that qexport wrote, found no folder. Check the path.")
    quantization = container.parse(read_json(folder / "config.json").get("quantization_config"))
    hashes = manifest_files(folder)
    reader = Reader(folder)
    _check_strangers(folder, hashes)
    _check_index(folder, reader, hashes)
    modules = _check_structure(reader, quantization)
    _check_inventory(folder, modules)
    _check_cache(folder, quantization, hashes)
    observer(Started("verify", len(hashes) + len(modules), "check"))
    total = _check_hashes(folder, hashes, observer)
    weights = packed = 0
    for done, (name, (spec, n, k)) in enumerate(modules.items(), len(hashes) + 1):
        tensors = {field: reader.read(f"{name}.{field}") for field in spec.layout(n, k)}
        spec.check(tensors, n, k, name, quantization.extents_of(name))
        packed += sum(t.nbytes for t in tensors.values())
        weights += n * k
        observer(Advanced("verify", done, name))
    _check_sizes(folder, modules, reader)
    return {
        "directory": str(folder),
        "files": len(hashes),
        "bytes": total,
        "modules": len(modules),
        "tensors": len(reader.names),
        "bits_per_weight": 8 * packed / weights if weights else None,
        "kv": None if quantization.kv is None else kv_name(quantization.kv),
    }


def manifest_files(folder: Path) -> Mapping[str, str]:
    """SHA-256 of every file that the manifest lists, by name; raises `CheckpointError`."""
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder / MANIFEST}: missing, so nothing says what the files should be. A job that has not finished has "
            "none: repeat its command. `save_pretrained` writes none either."
        )
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST}: expected a table of files with their sha256.")
    found: dict[str, str] = {}
    for name, entry in files.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else entry
        if Path(name).name != name or not isinstance(digest, str):
            raise CheckpointError(
                f"{MANIFEST}: the entry of {name[:200]!r} is not a file of this folder with its sha256."
            )
        found[name] = digest
    return found


def _check_strangers(folder: Path, hashes: Mapping[str, str]) -> None:
    """Nothing lies there that a loader might take beside, or instead of, what the manifest lists."""
    for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        if name not in hashes and any(fnmatch.fnmatchcase(name, pattern) for pattern in _LOADED):
            raise CheckpointError(
                f"{name}: {MANIFEST} does not list it, and a loader might read it beside the files that were checked, "
                "or instead of them. It comes from elsewhere: delete it, or move it out of the folder."
            )


def _check_cache(folder: Path, quantization: Quantization, hashes: Mapping[str, str]) -> None:
    """Manifest and config name one cache, and its file is listed exactly if it has one, and is in order."""
    fmt, facts = quantization.kv, read_json(folder / MANIFEST).get("kv")
    if (folder / kvfile.PENDING).exists():
        raise CheckpointError(
            f"{kvfile.PENDING}: left by a job that was interrupted while it changed the cache. Repeat its command: "
            f"qexport quantize {folder} --kv ..."
        )
    said = None if facts is None else kv_from_json(facts, MANIFEST)
    if said != fmt:
        raise CheckpointError(
            f"{MANIFEST}: names the cache {kvfile.spell(said)}, config.json {kvfile.spell(fmt)}. If a job that changed "
            f"the cache was interrupted, repeat its command: qexport quantize {folder} --kv ..."
        )
    if kvfile.calibrates(fmt) != (kvfile.FILE in hashes):
        state = (
            "does not list it" if kvfile.calibrates(fmt) else "lists it, and the cache of config.json has no tensors"
        )
        raise CheckpointError(
            f"{kvfile.FILE}: {MANIFEST} {state}. Make the cache again: qexport quantize {folder} --kv ..."
        )
    if fmt is not None:
        from qexport.models import heads_of  # brings transformers, which nothing else here needs

        kvfile.read(folder, fmt, heads_of(folder))


def _check_index(folder: Path, reader: Reader, hashes: Mapping[str, str]) -> None:
    """Every weight file is listed, and holds the tensors that the index says it holds."""
    for file in reader.files:
        if file not in hashes:
            raise CheckpointError(f"{file}: holds weights, but {MANIFEST} does not list it. It comes from elsewhere.")
    if not (folder / INDEX).exists():
        return
    places = read_json(folder / INDEX).get("weight_map", {})
    for name in sorted(set(places) | set(reader.names)):
        found = reader.meta(name).file.name if name in reader.names else None
        if name not in places:
            raise CheckpointError(f"{name}: stored in {found}, but {INDEX} does not list it.")
        if found is None:
            raise LayoutError(
                f"{name}: missing; {INDEX} says that {places[name]} holds it. Fetch or write that file again."
            )
        if found != places[name]:
            raise CheckpointError(f"{name}: expected in {places[name]}, found in {found}. Were two files swapped?")


def _check_structure(reader: Reader, quantization: Quantization) -> dict[str, tuple[LinearSpec, int, int]]:
    """Compare each shard's own description with `config.json` and with the tensors in it, by headers alone."""
    modules: dict[str, tuple[LinearSpec, int, int]] = {}
    for file in reader.files:
        own = read_shard_metadata(reader.metadata[file], file)
        stored = [name for name in reader.names if reader.meta(name).file.name == file]
        for name, (spec, n, k) in own.items():
            if quantization.spec_for(name) != spec:
                raise CheckpointError(
                    f"{file}: describes {name} otherwise than config.json does. One of them is from elsewhere."
                )
            _check_headers(reader, name, spec, n, k, stored, quantization.extents_of(name))
        for name in stored:
            module = name.rpartition(".")[0]
            if quantization.spec_for(module) is not None and module not in own:
                raise CheckpointError(f"{file}: holds {name}, but its header does not describe {module}.")
        modules |= own
    if not modules:
        raise CheckpointError(f"{reader.folder}: config.json names quantized modules, and no file holds one.")
    return modules


def _check_inventory(folder: Path, modules: Mapping[str, tuple[LinearSpec, int, int]]) -> None:
    """The manifest and the shards agree on which modules there are and how large they are."""
    listed = read_json(folder / MANIFEST).get("modules")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{MANIFEST}: expected a table of modules.")
    for name in sorted(set(listed) | set(modules)):
        if name not in modules:
            raise CheckpointError(f"{name}: is missing; {MANIFEST} lists it, and no file holds it.")
        facts = listed.get(name)
        facts = facts if isinstance(facts, dict) else {}
        found = list(modules[name][1:])
        wanted = [facts.get("n"), facts.get("k")]
        if wanted != found:
            raise CheckpointError(
                f"{name}: expected [n, k] = {wanted} as {MANIFEST} says, found {found} in its file's header."
            )


def _check_sizes(folder: Path, modules: Mapping[str, tuple[LinearSpec, int, int]], reader: Reader) -> None:
    """The manifest's bytes and bits, of each module and of all, are those of the tensors."""
    manifest, total = read_json(folder / MANIFEST), 0
    for name, (spec, n, k) in modules.items():
        nbytes = sum(reader.meta(f"{name}.{field}").nbytes for field in spec.layout(n, k))
        _check_size(name, manifest["modules"][name], nbytes, n * k)
        total += nbytes
    weights = sum(n * k for _, n, k in modules.values())
    _check_size("all modules", {**manifest, "nbytes": total}, total, weights)
    packed = {f"{name}.{field}" for name, (spec, n, k) in modules.items() for field in spec.layout(n, k)}
    metas = {name: reader.meta(name) for name in reader.names}
    counted = weights + sum(prod(meta.shape) for name, meta in metas.items() if name not in packed)
    _check_whole(manifest, 8 * sum(meta.nbytes for meta in metas.values()) / counted)


def _check_whole(manifest: Mapping[str, Any], counted: float) -> None:
    """Bits of all parameters; manifests of early writers don't say them."""
    said = manifest.get("bits_per_parameter", counted)
    if said != counted:
        raise CheckpointError(
            f"all tensors: {MANIFEST} says bits_per_parameter {str(said)[:40]}, the files hold {counted}."
        )


def _check_size(what: str, facts: Mapping[str, Any], nbytes: int, weights: int) -> None:
    """What the manifest says of stored bytes and bits is what the headers say."""
    for key, counted in (("nbytes", nbytes), ("bits_per_weight", 8 * nbytes / weights)):
        if facts.get(key) != counted:
            raise CheckpointError(
                f"{what}: {MANIFEST} says {key} {str(facts.get(key))[:40]}, the files hold {counted}."
            )


def _check_headers(
    reader: Reader, module: str, spec: LinearSpec, n: int, k: int, stored: list[str], extents: Mapping[str, int]
) -> None:
    """Names, dtypes and shapes of one module's tensors, before any of them is read."""
    layout = spec.layout(n, k)
    for field, wanted in layout.items():
        name = f"{module}.{field}"
        if name not in stored:
            raise LayoutError(f"{name}: is missing; the format stores {', '.join(sorted(layout))}.")
        meta = reader.meta(name)
        shape = tuple(extents.get(d, -1) if isinstance(d, str) else d for d in wanted.shape)
        if meta.dtype != wanted.dtype or meta.shape != shape:
            raise LayoutError(f"{name}: expected {wanted.dtype} {list(shape)}, found {meta.dtype} {list(meta.shape)}.")


def _check_hashes(folder: Path, hashes: Mapping[str, str], observer: Observer) -> int:
    total = 0
    for done, (name, expected) in enumerate(sorted(hashes.items()), 1):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name}: missing; {MANIFEST} lists it. Fetch or write it again.")
        found = checkpoint.sha256(path)
        if found != expected:
            raise CheckpointError(
                f"{name}: expected sha256 {expected[:16]}..., found {found[:16]}...: the file was changed or damaged. "
                "Fetch or write it again."
            )
        total += path.stat().st_size
        observer(Advanced("verify", done, name))
    return total
