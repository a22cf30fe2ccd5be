"""From the tensors of a checkpoint to the tensors of the model in memory.

Both can differ: transformers renames (a language model moved inside its wrapper), adds or drops a prefix (GPT-2 stored
without its head), and merges (the experts of a mixture become one stacked tensor). Its own conversion machinery says
how; here it is applied one tensor at a time, when that tensor is asked for.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qexport.checkpoint import Meta
from qexport.errors import PlanError


class Stored(Protocol):
    """Where the tensors of a checkpoint come from: `checkpoint.Reader`, or headers alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    def meta(self, name: str) -> Meta:
        """Dtype and shape of a tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor's first axis."""

    def chunks(self, name: str, size: int = ...) -> Iterator[bytes]:
        """The stored bytes of a tensor, `size` at a time."""


@dataclass(frozen=True)
class Plain:
    """A tensor of the model that is stored as it is, under the name `key`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Merged:
    """A tensor of the model that transformers makes from one or several stored ones.

    Attributes:
        converter: transformers' own recipe, never used itself: `convert` works on a copy.
        first: name of the first tensor that the recipe makes.
        parts: stored names with the pattern of the recipe that each matched, in natural order.
        target: name of the tensor that is meant, among those the recipe makes.
    """

    converter: Any
    first: str
    parts: tuple[tuple[str, str], ...]
    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]


Origin = Plain | Merged


@dataclass(frozen=True)
class CheckpointMap:
    """Where every tensor of the model comes from (tied ones once), and which stored tensors are not needed."""

    origins: dict[str, Origin]
    ignored: tuple[str, ...]
    untied: bool = False


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """State-dict name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def map_checkpoint(model: PreTrainedModel, stored: Stored, where: str) -> CheckpointMap:
    """Find the origin of every tensor of a meta model.

    Args:
        model: the meta model.
        stored: the checkpoint.
        where: its name, for errors.

    Returns:
        The mapping; `untied` says that the checkpoint holds two different tensors where the config promises tied ones.

    Raises:
        PlanError: tensors that the model needs are missing or have another shape, or stored ones have no place in it.
    """
    origins, unknown = _origins(model, stored)
    canonical = tied_names(model)
    ignored = [k for k in unknown if _ignorable(model, k)]
    strangers = sorted(set(unknown) - set(ignored))
    if strangers:
        raise PlanError(
            f"{where}: {listed(strangers)} of the checkpoint have no place in {type(model).__name__}. "
            "They would be lost: check that config.json belongs to these weights."
        )
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, origin in origins.items():
        if origin.shape != wanted[name]:
            raise PlanError(
                f"{where}: {name} is {list(origin.shape)} in the checkpoint, {type(model).__name__} expects "
                f"{list(wanted[name])}. Check that config.json belongs to these weights."
            )
    out: dict[str, Origin] = {}
    untied = False
    for name, home in canonical.items():
        if name not in origins:
            continue
        if home in out and not _equal(stored, out[home], origins[name]):
            untied = True
        out.setdefault(home, origins[name])
    missing = [n for n in dict.fromkeys(canonical.values()) if n not in out and not _optional(model, n)]
    if missing and not untied:
        raise PlanError(
            f"{where}: {listed(missing)} that {type(model).__name__} needs are not in the checkpoint. "
            "The download may be incomplete, or the weights belong to another model class."
        )
    return CheckpointMap(out, tuple(ignored), untied)


def _origins(model: PreTrainedModel, stored: Stored) -> tuple[dict[str, Origin], list[str]]:
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    origins: dict[str, Origin] = {}
    merges: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unknown = []
    for key in sorted(stored.names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            unknown.append(key)
        elif pattern is None:
            meta = stored.meta(key)
            origins[name] = Plain(key, meta.dtype, meta.shape)
        else:
            merges.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
    for first, (converter, parts) in merges.items():
        origins.update(_merged(model, stored, converter, first, parts))
    return origins, unknown


def _merged(
    model: PreTrainedModel, stored: Stored, converter: Any, first: str, parts: list[tuple[str, str]]
) -> dict[str, Origin]:
    def blank(key: str) -> Tensor:
        meta = stored.meta(key)
        return torch.empty(meta.shape, dtype=meta.dtype, device="meta")

    made = _convert(model, converter, first, parts, blank)
    return {
        name: Merged(converter, first, tuple(parts), name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in made.items()
    }


def _convert(
    model: PreTrainedModel, converter: Any, first: str, parts: Iterable[tuple[str, str]], get: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    own = copy.deepcopy(converter)
    for key, pattern in parts:
        own.add_tensor(first, key, pattern, get(key))
    try:
        made = own.convert(first, model=model, config=model.config)
    except Exception as error:  # transformers raises whatever the operation raised
        raise PlanError(
            f"{first}: transformers can't make it from {listed([k for k, _ in parts])}: {error}. "
            "Load and save the model with transformers once, and quantize the copy."
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def read(model: PreTrainedModel, stored: Stored, origin: Origin) -> Tensor:
    """A tensor of the model, on the CPU, in its stored dtype."""
    if isinstance(origin, Plain):
        return stored.read(origin.key)
    return _convert(model, origin.converter, origin.first, origin.parts, stored.read)[origin.target]


def read_slice(model: PreTrainedModel, stored: Stored, origin: Origin, index: int) -> Tensor:
    """Entry `index` of the first axis; of a stack of experts no other expert is read where the recipe allows it."""
    if isinstance(origin, Plain):
        return stored.read_rows(origin.key, index, index + 1)[0]
    stack, *rest = origin.converter.operations
    separable = isinstance(stack, MergeModulelist) and stack.dim == 0
    if not separable or not all(isinstance(op, Concatenate) and op.dim > 0 for op in rest):
        return read(model, stored, origin)[index]
    patterns = dict.fromkeys(pattern for _, pattern in origin.parts)
    mine = [[part for part in origin.parts if part[1] == pattern][index] for pattern in patterns]
    return _convert(model, origin.converter, origin.first, mine, stored.read)[origin.target][0]


def _equal(stored: Stored, a: Origin, b: Origin) -> bool:
    if not (isinstance(a, Plain) and isinstance(b, Plain)):
        return False
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(stored.chunks(a.key), stored.chunks(b.key), strict=True))


def _ignorable(model: PreTrainedModel, key: str) -> bool:
    """Buffers that older versions stored and newer ones compute, and what the model class itself says to skip."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    prefixed = f"{model.base_model_prefix}.{key}"
    return bool({key, prefixed} & buffers) or any(re.search(p, key) for p in patterns)


def _optional(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(p, name) for p in (model._keys_to_ignore_on_load_missing or ()))


def listed(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
