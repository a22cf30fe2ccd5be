"""The other way round: a checkpoint that another library packed becomes ours, number by number."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexport import plugins
from qexport.card import IMPORTED
from qexport.checkpoint import (
    Reader,
    ShardWriter,
    Written,
    copy_companions,
    dump_json,
    read_json,
    write_index,
    write_text,
)  # fmt: skip
from qexport.container import SCHEMA, shard_metadata
from qexport.errors import CheckpointError, LayoutError, PlanError, QExportError
from qexport.events import LayerDone, Observer, Started, ignore
from qexport.export._place import new_folder, refuse_taken
from qexport.export.base import Reading
from qexport.finish import MANIFEST, write_config
from qexport.formats.specs import InputSpec, LinearSpec, to_json
from qexport.models import find_blocks, hollow, read_config, tied_names
from qexport.models.auto import reason


def adopt(directory: Path | str, out: Path | str, *, observer: Observer = ignore) -> dict[str, Any]:
    """Turn a compressed-tensors or GPTQ checkpoint, whoever made it, into a packed one, without rounding anything.

    Args:
        directory: its folder.
        out: a folder that does not exist, or is empty.
        observer: is told of progress.

    Returns:
        `{"out", "from", "modules", "bits_per_weight", "bits_per_parameter", "bytes"}`.

    Raises:
        PlanError: it holds something that has no counterpart here; nothing was written.
        CheckpointError, LayoutError: a file or tensor is not what the config promises; nothing is left.
        ResumeError: `out` is in use.
    """
    folder, place = Path(directory), Path(out)
    refuse_taken(place)
    config = read_json(folder / "config.json")
    with _stated(folder):
        reading = _reading(config, folder)
    with new_folder(place) as made, _stated(folder):
        facts = _Adoption(folder, config, reading, made).run(observer)
    return {"out": str(place), "from": reading.quant_method, **facts}


@contextmanager
def _stated(folder: Path) -> Iterator[None]:
    """Whatever a config from outside makes the code raise becomes a `CheckpointError`."""
    try:
        yield
    except (QExportError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its config or tensors are not what they should be ({type(error).__name__}: {reason(error)}). "
            "Compare config.json with the original."
        ) from error


def _reading(config: Mapping[str, Any], folder: Path) -> Reading:
    found = config.get("quantization_config") or config.get("compression_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    kinds = {}
    for name in plugins.names("export"):
        module = importlib.import_module(f"qexport.export.{name}")
        if hasattr(module, "reading"):
            kinds[module.reading.quant_method] = module.reading
    if not isinstance(method, str) or method not in kinds:
        raise PlanError(
            f"{folder}: expected a quantization_config of {' or '.join(sorted(kinds))} in config.json, found "
            f"{str(method)[:40] if method else 'none'}. A dense model is for `qexport quantize`."
        )
    try:
        made: Reading = kinds[method](found)
    except PlanError as error:
        raise PlanError(f"{folder}, {method}: {error}") from error
    return made


class _Adoption:
    """One import; its state is what was written so far."""

    def __init__(self, folder: Path, config: Mapping[str, Any], reading: Reading, out: Path) -> None:
        self.folder, self.config, self.reading, self.out = folder, config, reading, out
        self.reader = Reader(folder)
        self.model: Any = hollow(read_config(folder, local_files_only=True))
        self.specs: dict[str, LinearSpec] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.written: list[Written] = []

    def run(self, observer: Observer) -> dict[str, Any]:
        """Write all files; returns what there is to say."""
        packed, dense = self.sorted()
        path, blocks = find_blocks(self.model)
        prefixes = [f"{path}.{i}." for i in range(len(blocks))]
        observer(Started("import", len(prefixes) + 1, "shard"))
        for index, prefix in enumerate([*prefixes, ""]):
            own = [n for n in packed if (n.startswith(prefix) if prefix else not n.startswith(tuple(prefixes)))]
            rest = [n for n in dense if (n.startswith(prefix) if prefix else not n.startswith(tuple(prefixes)))]
            self.shard(f"model-{index + 1:05d}-of-{len(prefixes) + 1:05d}.safetensors", own, packed, rest)
            observer(LayerDone(index, len(prefixes) + 1, prefix.rstrip(".") or "the rest", None, 0.0))
        return self.finish(dense)

    def sorted(self) -> tuple[dict[str, list[str]], list[str]]:
        """Packed linears with their fields, and names of what is dense; raises `PlanError` where one has no place."""
        first, *_ = self.reading.suffixes
        packed: dict[str, list[str]] = {
            n.removesuffix(f".{first}"): [] for n in self.reader.names if n.endswith(f".{first}")
        }
        dense = []
        known, state = tied_names(self.model), self.model.state_dict()
        for name in self.reader.names:
            module, _, field = name.rpartition(".")
            if module in packed and field in self.reading.suffixes:
                packed[module].append(field)
            elif name in known:
                self.check_dense(name, state[name])
                dense.append(name)
            else:
                raise PlanError(
                    f"{name}: has no place in {type(self.model).__name__}. Load and save the checkpoint once with its "
                    "own library and transformers 5, which gives its tensors the names of the model in memory."
                )
        for module in packed:
            found = self.model.get_submodule(module) if f"{module}.weight" in known else None
            if not isinstance(found, nn.Linear):
                raise PlanError(f"{module}: is packed, and is no linear of {type(self.model).__name__}.")
        held = {known[n] for n in dense} | {known[f"{m}.weight"] for m in packed}
        lost = sorted(n for n in set(known.values()) - held if not n.endswith("inv_freq"))
        if lost or not packed:
            raise CheckpointError(
                f"{self.folder}: {lost[0] if lost else 'any packed linear'} is missing from the files."
            )
        return packed, dense

    def check_dense(self, name: str, wanted: torch.Tensor) -> None:
        """Raise `LayoutError` unless a tensor has the shape that the model gives it, and is floats where that is."""
        meta = self.reader.meta(name)
        if meta.shape != tuple(wanted.shape) or meta.dtype.is_floating_point != wanted.dtype.is_floating_point:
            raise LayoutError(
                f"{name}: expected {'floats' if wanted.dtype.is_floating_point else 'integers'} {list(wanted.shape)}, "
                f"found {meta.dtype} {list(meta.shape)}."
            )

    def shard(self, file: str, own: list[str], fields: Mapping[str, list[str]], dense: list[str]) -> None:
        """Convert and write some linears with the dense tensors beside them."""
        tensors: dict[str, torch.Tensor] = {}
        table = {}
        for name in own:
            linear = self.model.get_submodule(name)
            n, k = linear.out_features, linear.in_features
            found = self.reading.found(name, {f: self.reader.read(f"{name}.{f}") for f in fields[name]}, n, k)
            spec = LinearSpec(found.fmt, InputSpec(permute=found.perm is not None, quant=found.quant))
            own_inputs = {} if found.perm is None else {"perm": found.perm}
            stored = spec.pack(found.fields, {**found.inputs, **own_inputs})
            spec.check(stored, n, k, name)
            tensors |= {f"{name}.{field}": tensor for field, tensor in stored.items()}
            nbytes = sum(t.nbytes for t in stored.values())
            self.specs[name], table[name] = spec, (spec, n, k)
            self.facts[name] = {"n": n, "k": k, "nbytes": nbytes, "bits_per_weight": 8 * nbytes / (n * k)}
        entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        entries |= {name: (self.reader.meta(name).dtype, self.reader.meta(name).shape) for name in dense}
        with ShardWriter(self.out / file, entries, shard_metadata(table)) as writer:
            for name in writer.order:
                writer.write(name, tensors[name] if name in tensors else self.reader.chunks(name))
        assert writer.result is not None
        self.written.append(writer.result)

    def finish(self, dense: list[str]) -> dict[str, Any]:
        """Index, config, tokenizer and manifest."""
        shards = [written.name for written in self.written]
        gone = ("quantization_config", "compression_config", "transformers_weights")
        plain = {key: value for key, value in self.config.items() if key not in gone}
        specs = {name: self.specs.get(name) for name, _ in self.model.named_modules() if name}
        table = self.model.get_input_embeddings().weight.dtype
        # Tied names of the model that the files hold apart are two tensors from now on.
        stored = [*dense, *(f"{name}.weight" for name in self.facts)]
        untied = len({tied_names(self.model)[name] for name in stored}) < len(stored)
        self.written += [
            write_index(self.out, shards),
            write_config(self.out, plain, specs, {}, untied=untied, dtype=table),
            *copy_companions(self.folder, self.out),
        ]
        reader = Reader(self.out, shards)
        packed = sum(facts["nbytes"] for facts in self.facts.values())
        weights = sum(facts["n"] * facts["k"] for facts in self.facts.values())
        counted = weights + sum(prod(reader.meta(name).shape) for name in dense)
        bits = {
            "bits_per_weight": 8 * packed / weights,
            "bits_per_parameter": 8 * sum(reader.meta(name).nbytes for name in reader.names) / counted,
        }
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        manifest = {
            "schema": SCHEMA,
            "writer": version("qexport"),
            "digest": "",
            "plan": {"model": self.folder.name, "recipe": IMPORTED, "modules": self.groups()},
            "calibration": None,
            **bits,
            "modules": self.facts,
            "embeddings": [],
            "dense": [name for name in linears if name not in self.facts],
            "towers": [],
            "files": {written.name: written.sha256 for written in self.written},
        }
        write_text(self.out / MANIFEST, dump_json(manifest, indent=1) + "\n")
        nbytes = sum(written.nbytes for written in self.written if written.name.endswith(".safetensors"))
        return {"modules": len(self.facts), **bits, "bytes": nbytes}

    def groups(self) -> list[dict[str, Any]]:
        """Linears with equal specs together, as a plan lists them."""
        method = {"name": f"imported from {self.reading.quant_method}"}
        kinds: dict[str, dict[str, Any]] = {}
        for name, spec in self.specs.items():
            entry = {"spec": to_json(spec), "method": method}
            kinds.setdefault(dump_json(entry), {**entry, "names": []})["names"].append(name)
        return list(kinds.values())
