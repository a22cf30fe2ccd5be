"""The attention `"qexport"`: transformers' `"sdpa"`, but from packed keys and values where one query asks for them.

A quantized cache hands its layer's attention handles instead of tensors (`Packed`). Where a kernel can read what is
stored, and a mask says nothing but pads and window, the result comes from the packed cache; in all other cases the
handles become the tensors that they stand for, and `"sdpa"` does the rest. `QuantCache.path` says which it was.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from qexport import plugins
from qexport.kernels.kv.base import Past, Turn
from qexport.runtime._store import Cohort, Rope, Side

NAME = "qexport"
QUERIES = 1  # that a kernel takes at once
# What models hand to attention beside what `attend` reads, and what changes nothing for one query in inference.
_IDLE = frozenset(
    (
        "is_causal", "position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict",
        "output_hidden_states", "output_router_logits", "layer_idx", "past_key_values", "logits_to_keep",
    )
)  # fmt: skip


class Reading:
    """What the last query sees of a layer: all handles of one update share it.

    Args:
        layer: the `QuantCacheLayer`.
        first: number of the first token that is seen, pads counted.
        cohorts: sequences of equally many pads.
    """

    def __init__(self, layer: Any, first: int) -> None:
        self.layer, self.first, self.seen = layer, first, layer.seen
        self._tensors: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are seen, pads included."""
        return self.seen - self.first

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [b, h, tokens, d], zero at pads."""
        if self._tensors is None:
            if self.layer.seen != self.seen:
                raise RuntimeError("cache: keys were used after the cache had changed; use them before.")
            self._tensors = self.layer.read(self.first)
        return self._tensors


class Packed(Tensor):
    """Keys or values of a layer that are decoded once something other than `attend` touches them.

    Attributes:
        reading: what they are.
        side: 0 for keys, 1 for values.
    """

    reading: Reading
    side: int

    @staticmethod
    def of(reading: Reading, side: int, shape: tuple[int, ...]) -> "Packed":
        """A handle with shape, dtype and device of the tensor that it stands for."""
        layer = reading.layer
        made: Packed = Tensor._make_wrapper_subclass(Packed, shape, dtype=layer.dtype, device=layer.device)
        made.reading, made.side = reading, side
        return made

    def decoded(self) -> Tensor:
        """The tensor."""
        return self.reading.tensors()[self.side]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Packed({'keys' if self.side == 0 else 'values'}, {tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation of torch sees the tensor."""
        args, kwargs = pytree.tree_map_only(Packed, Packed.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)


def offer(model: Any) -> None:
    """Give a text model the attention that reads packed caches, in place of `"sdpa"` alone."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "_attn_implementation", None) != "sdpa":
        return
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text]
    if parts and all(part._can_set_attn_implementation() for part in parts):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        text._attn_implementation = NAME


def why_decoded(layer: Any, key_states: Tensor, dim: int) -> str:
    """Why a layer's attention can't be given handles after an update with these keys, or an empty text.

    `dim` are channels of its values.
    """
    own, found = getattr(layer.config, "_attn_implementation", None), None
    if own != NAME:
        found = f"the model's attention is {own!r}"
    elif key_states.shape[2] > QUERIES:
        found = f"{key_states.shape[2]} queries at once"
    elif torch.is_grad_enabled() and key_states.requires_grad:
        found = "gradients are wanted"
    elif torch.compiler.is_compiling():
        found = "the model is being compiled"
    elif not all(cohort.keys.packed.count or cohort.values.packed.count for cohort in layer.cohorts):
        found = "nothing is packed yet"
    else:
        found = obstacle(layer, max(key_states.shape[3], dim))
    return f"decoded: {found}" if found else ""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface.

    Args:
        module: the layer's attention.
        query: [b, heads, queries, dim].
        key: [b, heads of keys, tokens, dim], a tensor or a handle.
        value: like key.
        attention_mask: None, or what is visible, bool or added, [b, 1 or heads, queries, tokens].
        **kwargs: `scaling`, `dropout` and whatever the model's attention passes on.

    Returns:
        [b, queries, heads, dim], and None for the weights.
    """
    if not (isinstance(key, Packed) and isinstance(value, Packed) and key.reading is value.reading):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    reading = key.reading
    why = _unusual(reading, query, kwargs) or _mask_says_more(reading, attention_mask)
    if why is None:
        reading.layer.path = f"fused ({kernel_name(query.device)})"
        return _fused(reading, query, kwargs.get("scaling")), None
    reading.layer.path = f"decoded: {why}"
    return sdpa_attention_forward(module, query, *reading.tensors(), attention_mask, **kwargs)


# ---- whether a kernel can do it ----------------------------------------------------------------


def obstacle(layer: Any, dim: int) -> str | None:
    """Why no kernel can read a layer with heads of so many channels, or None."""
    name, kind = layer.fmt.name, layer.device.type
    if name not in plugins.names("kernels.kv"):
        return f"no kernel reads format {name!r}"
    if kind not in ("cpu", "cuda"):
        return f"no kernel was written for {kind!r} devices"
    if kind == "cpu":
        return None if _loops() is not None else "numba is not installed; pip install 'qexport[cpu]'"
    decode = _triton()
    reason: str | None = "Triton can't be imported" if decode is None else decode.supports(name, dim)
    return reason


def kernel_name(device: torch.device) -> str:
    """How the kernels of a device are compiled."""
    return "numba" if device.type == "cpu" else "triton"


@cache
def _loops() -> Any:
    """The kernels for CPUs, or None where numba is not installed."""
    try:
        from qexport.kernels.kv import _cpu
    except ImportError:
        return None
    return _cpu


@cache
def _triton() -> Any:
    """The kernels for GPUs, or None where there is no Triton."""
    try:
        from qexport.kernels.kv import _decode
    except ImportError:
        return None
    return _decode


def _unusual(reading: Reading, query: Tensor, kwargs: dict[str, Any]) -> str | None:
    """What else is asked for than plain attention of a query, or None."""
    if query.shape[2] > QUERIES:
        return f"{query.shape[2]} queries at once"
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if kwargs.get("dropout"):
        return "dropout"
    if kwargs.get("sliding_window") not in (None, reading.layer.sliding_window):
        return f"sliding_window {kwargs['sliding_window']} is not the cache's"
    known = {"scaling", "dropout", "sliding_window", *_IDLE}
    other = [name for name, given in kwargs.items() if name not in known and given is not None and given is not False]
    return f"attention was given {', '.join(other)}" if other else None


def _mask_says_more(reading: Reading, mask: Tensor | None) -> str | None:
    """What a mask says beyond pads and window, or None.

    All layers of a kind get the same mask, so what was found is remembered while the mask is the same tensor.
    """
    layer = reading.layer
    if mask is None:
        return "there is no mask, and there are pads" if max(layer.pads) > reading.first else None
    version = -1 if mask.is_inference() else mask._version
    asked = (version, reading.first, reading.seen, tuple(layer.pads))
    known = layer.masks.get(layer.kind)
    if known is None or known[0] is not mask or known[1] != asked:
        known = (mask, asked, _compare(mask, reading.first, reading.seen, layer.pads))
        layer.masks[layer.kind] = known
    found: str | None = known[2]
    return found


def _compare(mask: Tensor, first: int, seen: int, pads: list[int]) -> str | None:
    if mask.ndim != 4 or mask.shape[0] not in (1, len(pads)) or mask.shape[2:] != (1, seen - first):
        return f"a mask of shape {tuple(mask.shape)}"
    visible = mask
    if mask.dtype != torch.bool:
        visible = mask == 0
        if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
            return "a mask with other numbers than 0 and the least"
    own = torch.arange(first, seen, device=mask.device) >= torch.tensor(pads, device=mask.device).unsqueeze(1)
    return None if bool((visible == own[:, None, None, :]).all()) else "a mask that hides more or less than pads"


# ---- doing it ----------------------------------------------------------------------------------


def _fused(reading: Reading, query: Tensor, scaling: float | None) -> Tensor:
    """[b, 1, heads, dim] in the query's dtype."""
    layer, kernels = reading.layer, _loops() if query.device.type == "cpu" else _triton()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for cohort in layer.cohorts:
        pasts = _pasts(cohort, max(reading.first - cohort.pad, 0), layer.fmt, layer.rope_of(cohort))
        whole = len(layer.cohorts) == 1 and cohort.rows == list(range(query.shape[0]))
        found = kernels.attend(query[:, :, 0] if whole else query[cohort.rows, :, 0], *pasts, scaling=scaling)
        if whole:
            return found.to(query.dtype).unsqueeze(1)
        parts.append((cohort.rows, found))
    out = query.new_empty(query.shape[0], 1, query.shape[1], parts[0][1].shape[2])
    for rows, found in parts:
        out[rows, 0] = found.to(query.dtype)
    return out


def _pasts(cohort: Cohort, start: int, fmt: Any, rope: Rope | None) -> tuple[Past, Past]:
    """What a kernel reads of a cohort from own token `start` on."""
    return _past(cohort.keys, start, fmt, rope), _past(cohort.values, start, fmt, None)


def _past(side: Side, start: int, fmt: Any, rope: Rope | None) -> Past:
    stop, turn = side.packed.count * side.coder.group, None
    if rope is not None and stop:
        rows = rope.rows.view(side.first_packed, side.first_packed + stop)
        turn = Turn(rows["cos"][0], rows["sin"][0], rope.neighbours)
    return Past(
        format=fmt.name,
        coder=side.coder,
        static=side.static,
        packed=side.packed.buffers,
        first=min(max(start - side.first_packed, 0), stop),
        stop=stop,
        before=side.sink[:, :, start:],
        after=side.recent[:, :, max(start - side.first_recent, 0) :],
        turn=turn,
        memo=side.memo,
    )
