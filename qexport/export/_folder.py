"""Exports that are Hugging Face folders: shard by shard, with other tensors for the packed modules."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import ShardWriter, dump_json, write_index, write_text
from qexport.export.base import Module, Packed
from qexport.schema import Tensors

Convert = Callable[[Module, Tensors], Mapping[str, Tensor]]
"""From a packed module to the tensors that stand for it, by state-dict name."""


def write_folder(
    packed: Packed,
    out: Path,
    convert: Convert,
    quantization: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write shards, index and config.

    Args:
        packed: what to export.
        out: an empty folder.
        convert: for each packed module.
        quantization: `quantization_config` of the result; None leaves it out.
        dtype: that dense floating-point tensors are rounded to; None leaves them as they are.
    """
    reader = packed.reader
    for file, modules in packed.shards.items():
        new = _stacked(modules, {m.name: convert(m, m.tensors(reader)) for m in modules})
        kept = packed.dense(file)
        if dtype is not None:
            new |= {name: reader.read(name).to(dtype) for name in kept if reader.meta(name).dtype.is_floating_point}
        entries = {name: (t.dtype, tuple(t.shape)) for name, t in new.items()}
        entries |= {name: (reader.meta(name).dtype, reader.meta(name).shape) for name in kept if name not in new}
        with ShardWriter(out / file, entries, tags={"format": "pt"}) as writer:
            for name in writer.order:
                writer.write(name, new[name] if name in new else reader.chunks(name))
    write_index(out, packed.shards)
    config = packed.plain_config()
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_text(out / "config.json", dump_json(config, indent=1) + "\n")


def _stacked(modules: tuple[Module, ...], found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors by name; of experts, which name a stack, those of one stack put together."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for module in modules:
        if module.kind == "expert":
            stack, _, index = module.name.rpartition(".")
            stacks.setdefault(stack, {})[int(index)] = found[module.name][stack]
        else:
            out |= found[module.name]
    return out | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}
