"""Quantized key-value caches on transformers' cache API.

    cache = qexport.kv_cache(model, "kivi-2bit")
    model.generate(ids, past_key_values=cache)

A layer's cache stores what its format says and hands attention what that stands for, or where attention can read it
(`runtime.attention`) a handle. Two hooks tell it what the cache API does not: rotations by position, so that keys can
be coded as they were before, and pads, so that every sequence counts its groups from its own first token.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from qexport.errors import UsageError
from qexport.formats.kv.base import KVFormat, calibrated_alike, changed, kv_name, make_kv
from qexport.models.attention import KINDS
from qexport.runtime import attention
from qexport.runtime._cache_layer import QuantCacheLayer
from qexport.runtime._store import Rope
from qexport.schema import Tensors

_KEPT = "_qexport_kv"


class QuantCache(Cache):  # type: ignore[misc]
    """The cache of a model; see `kv_cache`.

    Args:
        config: of the text model.
        fmt: how keys and values are stored.
        statics: what calibration found, by layer; empty where the format calibrates nothing.
    """

    def __init__(self, config: Any, fmt: KVFormat, statics: Mapping[int, Tensors]) -> None:
        self.fmt = fmt
        self.ropes: dict[tuple[str, int], Rope | None] = {}
        self.masks: dict[str, Any] = {}
        shared = {"config": config, "masks": self.masks}
        layers: list[Any] = []
        for index, (kind, options) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True)):
            if kind in KINDS:
                layers.append(QuantCacheLayer(fmt, statics.get(index, {}), self.ropes, kind, **options, **shared))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
        super().__init__(layers=layers)

    @property
    def quantized(self) -> Sequence[QuantCacheLayer]:
        """Layers that store few bits; those with another kind of state keep it as it is."""
        return [layer for layer in self.layers if isinstance(layer, QuantCacheLayer)]

    def note_mask(self, mask: Tensor) -> None:
        """Tell where sequences begin: mask [b, tokens], 0 at pads, which have to come first."""
        waiting = [layer for layer in self.quantized if layer.pads is None or max(layer.pads) >= layer.seen]
        if not waiting or mask.ndim != 2:
            return
        real = mask != 0
        first = real.to(torch.int64).argmax(1)
        first = torch.where(real.any(1), first, torch.full_like(first, mask.shape[1]))
        for layer in waiting:
            layer.pads = first.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored: codes, parameters, what is in full precision, and rotations by position."""
        return sum(layer.nbytes for layer in self.quantized) + sum(r.rows.nbytes for r in self._ropes())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the memory that is held for it."""
        held = sum(layer.capacity_bytes for layer in self.quantized)
        return held + sum(r.rows.capacity_bytes for r in self._ropes())

    @property
    def fp16_bytes(self) -> int:
        """Bytes that the same tokens would take in transformers' own cache in float16; pads aside."""
        return sum(layer.fp16_bytes for layer in self.quantized)

    @property
    def key_reads(self) -> int:
        """Keys that queries have read so far, counted for each query."""
        return sum(layer.key_reads for layer in self.quantized)

    @property
    def packed_reads(self) -> int:
        """How many of them were packed."""
        return sum(layer.packed_reads for layer in self.quantized)

    @property
    def quantized_read_fraction(self) -> float:
        """Which part of the keys that queries have read so far were packed ones; 0 before any were read."""
        return self.packed_reads / self.key_reads if self.key_reads else 0.0

    @property
    def path(self) -> str:
        """How attention got its last results: "fused (numba)", or "decoded: " and why; both where layers differ."""
        return ", ".join(sorted({layer.path for layer in self.quantized} - {""}))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.ropes.clear()
        self.masks.clear()

    def _ropes(self) -> list[Rope]:
        return [rope for rope in self.ropes.values() if rope is not None]


# ---- a model and its cache ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kept:
    """The cache that a model's checkpoint names: format, and what was calibrated, by layer."""

    fmt: KVFormat
    statics: Mapping[int, Tensors]


def kept(model: Any) -> Kept | None:
    """The cache of a model's checkpoint, or None."""
    found: Kept | None = getattr(model, _KEPT, None)
    return found


def kv_cache(model: Any, name: str | None = None, **options: Any) -> QuantCache:
    """A new, empty cache for a model, to be given to `generate` or `forward` as `past_key_values`.

    Args:
        model: a causal language model of transformers.
        name: `"kivi-2bit"` and others, see `formats.kv.base.PRESETS`; default: that of the model's checkpoint.
        **options: of the format, for example `residual_window=0`.

    Raises:
        UsageError: there is no such cache or option, or it needs calibration that the checkpoint does not hold.
    """
    found = chosen(model, name, options)
    if found is None and name is None:
        raise UsageError("this checkpoint names no cache; say which, for example kv_cache(model, 'kivi-4bit').")
    if found is None:
        raise UsageError("kv 'none' is transformers' own cache: leave out past_key_values.")
    return cache_of(model, found.fmt, found.statics)


def chosen(model: Any, name: str | None, options: Mapping[str, Any]) -> Kept | None:
    """The cache that a name and options mean for a model, with what its checkpoint calibrated; None for none.

    Args:
        model: see `kv_cache`.
        name: None means the checkpoint's own, if it has one.
        options: of the format, in place of the preset's or the checkpoint's.

    Raises:
        UsageError: there is no such cache or option.
    """
    own = kept(model)
    if name is not None:
        fmt = make_kv(name, options)
    elif own is not None:
        fmt = changed(own.fmt, options)
    elif options:
        raise UsageError(f"this checkpoint names no cache for {', '.join(options)} to change; say which: --kv NAME.")
    else:
        return None
    if fmt is None:
        return None
    return Kept(fmt, own.statics if own is not None and calibrated_alike(fmt, own.fmt) else {})


def cache_of(model: Any, fmt: KVFormat, statics: Mapping[int, Tensors]) -> QuantCache:
    """A new cache for a model, from a format and what was calibrated for it; see `kv_cache`."""
    cache = QuantCache(model.config.get_text_config(decoder=True), fmt, statics)
    missing = [i for i, layer in enumerate(cache.layers) if isinstance(layer, QuantCacheLayer) and not layer.static]
    if fmt.static(1, 32) and missing:
        raise UsageError(
            f"cache {kv_name(fmt)!r} needs what calibration finds, and layer {missing[0]} has none of it. "
            f"`qexport quantize DIR --kv {kv_name(fmt)}` adds it to a folder that qexport packed; a dense model needs "
            "--method too."
        )
    if not cache.quantized:
        raise UsageError(f"{type(model).__name__} has no attention layer whose cache could be quantized.")
    listen(model)
    return cache


def listen(model: Any) -> None:
    """Put the hooks on a model that tell a quantized cache about pads and rotations; done twice, as once.

    A model whose attention is `"sdpa"` gets `"qexport"`, which is the same for other caches.
    """
    attention.offer(model)
    if getattr(model, "_qexport_listens", False):
        return
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for module in {id(m): m for m in (model, decoder) if isinstance(m, nn.Module)}.values():
        module.register_forward_pre_hook(_hear_mask, with_kwargs=True)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.register_forward_pre_hook(_hear_rope, with_kwargs=True)
    model._qexport_listens = True


def _hear_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if isinstance(cache, QuantCache) and isinstance(mask, Tensor):
        cache.note_mask(mask)


def _hear_rope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # GPT-NeoX calls it layer_past.
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    rope = kwargs.get("position_embeddings")
    if isinstance(cache, QuantCache) and isinstance(rope, tuple):
        layer = cache.layers[module.layer_idx]
        if isinstance(layer, QuantCacheLayer):
            layer.rope_now = rope


def keep(model: Any, fmt: KVFormat, statics: Mapping[int, Tensors]) -> None:
    """Make `model.generate` use a cache of this format where the caller names none.

    What the model's own generation config says of caches was said before it had this one, and is forgotten.
    """
    setattr(model, _KEPT, Kept(fmt, statics))
    model.generate = MethodType(_generate, model)
    if getattr(getattr(model, "generation_config", None), "cache_implementation", None) is not None:
        model.generation_config.cache_implementation = None


def forgo(model: Any) -> None:
    """Undo `keep`."""
    for name in (_KEPT, "generate"):
        vars(model).pop(name, None)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's `generate` with the cache of its checkpoint."""
    own = type(self).generate
    given = inspect.signature(own).bind_partial(self, *args, **kwargs).arguments
    config = given.get("generation_config") or self.generation_config
    wanted = kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False
    other = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if wanted and not other and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = kv_cache(self)
    return own(self, *args, **kwargs)
