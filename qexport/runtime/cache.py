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
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from qexport.errors import UsageError
from qexport.formats.kv.base import KVFormat, calibrated_alike, changed, kv_name, make_kv
from qexport.models.attention import KINDS
from qexport.runtime import attention
from qexport.runtime._store import Cohort, Rope
from qexport.schema import Tensors

_KEPT = "_qexport_kv"


class QuantCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one attention layer.

    Args:
        fmt: how keys and values are stored.
        static: what calibration found for the layer; see `KVFormat.static`.
        ropes: rotations by layer type and pad; layers of one model share them.
        kind: transformers' name of the layer's type.
        sliding_window: tokens that a query sees, itself included; None: all.
        config: of the text model; says which attention reads the cache.
        masks: what `runtime.attention` found out about masks, by layer type; layers of one model share it.

    Attributes:
        path: how the last queries got their result; see `QuantCache.path`.
    """

    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        fmt: KVFormat,
        static: Tensors,
        ropes: dict[tuple[str, int], Rope | None],
        kind: str = "full_attention",
        sliding_window: int | None = None,
        *,
        config: Any = None,
        masks: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.fmt, self.static, self.ropes, self.kind, self.sliding_window = fmt, static, ropes, kind, sliding_window
        self.config, self.masks = config, {} if masks is None else masks
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.cohorts: list[Cohort] = []
        self.seen = 0  # tokens of the batch, pads included
        self.pads: list[int] | None = None
        self.rope_now: tuple[Tensor, Tensor] | None = None
        self.key_reads = self.packed_reads = 0
        self.path = ""
        self.is_initialized = False

    # ---- what transformers asks for -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device, and move what was calibrated there."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.static = {name: t.to(self.device) for name, t in self.static.items()}
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens and read the cache.

        Args:
            key_states: [b, h, t, d], rotated.
            value_states: [b, h, t, d].
            *args: unused.
            **kwargs: unused.

        Returns:
            Keys and values of all tokens that a query may see, [b, h, tokens, d], zero at pads; what is packed comes
            back as it is stored. Where attention can read it packed: handles that stand for them until the next update.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._forget()
        self._deal_out(key_states, value_states)
        new = key_states.shape[2]
        for cohort in self.cohorts:
            skipped = max(cohort.pad - self.seen, 0)
            if skipped < new:
                self._append(cohort, key_states, value_states, skipped)
        self.seen += new
        self.rope_now = None
        first = self._first(new)
        self.path = attention.why_decoded(self, key_states, value_states.shape[3])
        if self.path:
            out = self.read(first)
            self._forget()
            return out
        reading = attention.Reading(self, first)
        shape = (*key_states.shape[:2], self.seen - first)
        return tuple(  # type: ignore[return-value]
            attention.Packed.of(reading, side, (*shape, t.shape[3]))
            for side, t in enumerate((key_states, value_states))
        )

    def get_seq_length(self) -> int:
        """Tokens so far, pads included."""
        return self.seen

    def get_max_length(self) -> int:
        """The window of a sliding layer; -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next `update` will return, and the number of the first."""
        first = 0 if self.sliding_window is None else max(self.seen - self.sliding_window + 1, 0)
        return self.seen + query_length - first, first

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def activate_past_recording(self) -> None:
        """Keep what a sliding window has left behind, so that `crop` can go back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, `-tokens_to_remove` of them.

        What was packed stays as it was packed, so that another token at that place does not see more than before.
        """
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        left = max(self.seen - count, 0)
        for cohort in self.cohorts:
            own = max(left - cohort.pad, 0)
            gone = max(cohort.keys.gone, cohort.values.gone)
            if own < gone and self.sliding_window is not None and gone > max(own - self.sliding_window + 1, 0):
                raise RuntimeError(
                    "crop: the sliding window has left tokens behind that would be seen again. Call "
                    "activate_past_recording() on the cache before."
                )
            rope = self.rope_of(cohort)
            cohort.keys.truncate(own, rope if self.fmt.pre_rope else None)
            cohort.values.truncate(own, None)
            if rope is not None:
                rope.rows.count = min(rope.rows.count, own)
        self.seen = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these places."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these places, in this order; a mask will do."""
        if not self.is_initialized or self.pads is None:
            return
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        places = chosen.tolist()
        for cohort in self.cohorts:
            cohort.select({new: old for new, old in enumerate(places) if old in cohort.rows})
        self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]
        self.pads = [self.pads[old] for old in places]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times, one after the other."""
        if self.pads is not None:
            self.batch_select_indices(torch.arange(len(self.pads)).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: what is packed is small. Raises `UsageError`, because the caller counts on it."""
        raise UsageError("a quantized cache can't be offloaded. Leave out cache_implementation='offloaded'.")

    # ---- sequences -----------------------------------------------------------------------------------

    def _deal_out(self, k: Tensor, v: Tensor) -> None:
        """Sort sequences that have no tokens yet by their pads; those that have keep their place."""
        pads = [0] * k.shape[0] if self.pads is None else self.pads
        if len(pads) != k.shape[0]:
            raise UsageError(
                f"cache: expected a batch of {len(pads)} sequences, as before, found {k.shape[0]}. Make a new cache."
            )
        self.pads = pads
        self.cohorts = [cohort for cohort in self.cohorts if cohort.tokens]
        placed = {row for cohort in self.cohorts for row in cohort.rows}
        waiting: dict[int, list[int]] = {}
        for row, pad in enumerate(pads):
            if row not in placed:
                waiting.setdefault(pad, []).append(row)
        self.cohorts += [Cohort(rows, pad, self.fmt, self.static, k, v) for pad, rows in waiting.items()]

    def _append(self, cohort: Cohort, k: Tensor, v: Tensor, skipped: int) -> None:
        start = cohort.tokens
        rope = self._noted_rope(cohort, start, skipped)
        if cohort.rows != list(range(k.shape[0])):  # picking rows costs as much as all the rest
            k, v = k[cohort.rows], v[cohort.rows]
        cohort.keys.append(k[:, :, skipped:], rope)
        cohort.values.append(v[:, :, skipped:], None)
        self._count_reads(cohort, start)

    def _noted_rope(self, cohort: Cohort, start: int, skipped: int) -> Rope | None:
        """The cohort's rotations, those of the new tokens included; None where keys are coded as they come."""
        if not self.fmt.pre_rope or self.rope_now is None:
            return None
        cos, sin = (t[cohort.rows] if t.shape[0] > 1 else t[:1] for t in self.rope_now)
        if cos.shape[0] > 1 and cos.shape[1] > 1 and not torch.equal(cos, cos[:1].expand_as(cos)):
            raise UsageError(
                f"cache: sequences {cohort.rows} have equally many pads and other positions. Give them one by one."
            )
        key = (self.kind, cohort.pad)
        if key not in self.ropes:
            self.ropes[key] = Rope.of(cos[0])
        rope = self.ropes[key]
        if rope is not None:
            rope.extend(start, cos[0, skipped:], sin[0, skipped:])
        return rope

    def rope_of(self, cohort: Cohort) -> Rope | None:
        """Rotations that a cohort's packed keys still need."""
        return self.ropes.get((self.kind, cohort.pad)) if self.fmt.pre_rope else None

    # ---- reading -------------------------------------------------------------------------------------

    def _first(self, new: int) -> int:
        """Number of the first token that `new` queries at the end may see, as `get_mask_sizes` said."""
        return 0 if self.sliding_window is None else max(self.seen - new - self.sliding_window + 1, 0)

    def read(self, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values from token `first` of the batch on."""
        only = self.cohorts[0] if len(self.cohorts) == 1 else None
        if only is not None and only.pad <= first and only.rows == list(range(len(only.rows))):
            start = first - only.pad
            return only.keys.read(start, self.rope_of(only)), only.values.read(start, None)
        assert self.pads is not None
        out = []
        for name in ("keys", "values"):
            like = getattr(self.cohorts[0], name)
            whole = torch.zeros(
                len(self.pads), like.heads, self.seen - first, like.dim, dtype=self.dtype, device=self.device
            )
            for cohort in self.cohorts:
                if cohort.tokens:
                    rope = self.rope_of(cohort) if name == "keys" else None
                    own = getattr(cohort, name).read(max(first - cohort.pad, 0), rope)
                    whole[cohort.rows, :, whole.shape[2] - own.shape[2] :] = own
            out.append(whole)
        return out[0], out[1]

    def _forget(self) -> None:
        if self.sliding_window is None or self.record_past:
            return
        for cohort in self.cohorts:
            before = self.seen - self.sliding_window + 1 - cohort.pad
            for side in (cohort.keys, cohort.values):
                side.forget(before)

    def _count_reads(self, cohort: Cohort, start: int) -> None:
        """Add up the keys that the queries from own token `start` on see, and how many of them are packed."""
        side = cohort.keys
        if side.tokens - start == 1:
            begin = 0 if self.sliding_window is None else max(side.tokens - self.sliding_window, 0)
            self.key_reads += (side.tokens - begin) * len(cohort.rows)
            self.packed_reads += max(side.first_recent - max(begin, side.sink.shape[2]), 0) * len(cohort.rows)
            return
        last = torch.arange(start, side.tokens) + 1
        first = torch.zeros_like(last) if self.sliding_window is None else (last - self.sliding_window).clamp(min=0)
        packed = torch.minimum(last, torch.tensor(side.first_recent)) - first.clamp(min=side.sink.shape[2])
        self.key_reads += int((last - first).sum()) * len(cohort.rows)
        self.packed_reads += int(packed.clamp(min=0).sum()) * len(cohort.rows)

    @property
    def nbytes(self) -> int:
        """Of what is stored, rotations aside."""
        return sum(cohort.nbytes for cohort in self.cohorts)

    @property
    def capacity_bytes(self) -> int:
        """Of the memory that is held for it."""
        return sum(cohort.capacity_bytes for cohort in self.cohorts)

    @property
    def fp16_bytes(self) -> int:
        """Of the same tokens in float16, those that a sliding window has left behind aside."""
        most = self.seen if self.sliding_window is None else self.sliding_window - 1
        numbers = sum(
            len(cohort.rows) * min(side.tokens, most) * side.heads * side.dim
            for cohort in self.cohorts
            for side in (cohort.keys, cohort.values)
        )
        return 2 * numbers


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
            f"`qexport quantize DIR --kv {kv_name(fmt)}` adds it to a checkpoint."
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
    """Make `model.generate` use a cache of this format where the caller names none."""
    setattr(model, _KEPT, Kept(fmt, statics))
    model.generate = MethodType(_generate, model)


def forgo(model: Any) -> None:
    """Undo `keep`."""
    for name in (_KEPT, "generate"):
        vars(model).pop(name, None)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's `generate` with the cache of its checkpoint."""
    config = kwargs.get("generation_config") or self.generation_config
    wanted = kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False
    other = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if wanted and not other and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = kv_cache(self)
    return type(self).generate(self, *args, **kwargs)
