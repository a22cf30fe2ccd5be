"""The cache of one attention layer: what comes is packed as its format says, and attention reads that."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qexport.errors import UsageError
from qexport.formats.kv.base import KVFormat
from qexport.runtime import attention
from qexport.runtime._store import Cohort, Rope
from qexport.schema import Tensors


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
                f"cache: sequences {cohort.rows} have equally many pads and other positions. Pad at the left "
                "(padding_side='left'), or give them one by one."
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
