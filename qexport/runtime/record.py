"""Keys and values of a live model as its attention sees them, and what the loss makes of a change of each.

A cache that stores nothing stands where transformers keeps keys and values, so that every implementation of attention
passes by. Decoder layers are run again on the way back (torch.utils.checkpoint), so that memory holds one layer's
activations at a time and the hidden states between layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.modeling_layers import GradientCheckpointingLayer

from qexport.errors import CalibrationError
from qexport.formats.kv.base import uncalibrated
from qexport.runtime._store import Rope

Take = Callable[[int, dict[str, Tensor]], None]
"""(layer, tensors): `keys` and `values`, float32 [b, t, h, d], and `key_grads` and `value_grads` where asked for."""
_KINDS = ("full_attention", "sliding_attention")


def record(model: Any, ids: Tensor, take: Take, *, gradients: bool = False, pre_rope: bool = True) -> None:
    """Run a model over sequences and hand over each layer's keys and values, once.

    The model may have packed linears, if their kernel is the reference, through which gradients pass. It is left as it
    was.

    Args:
        model: causal language model of transformers; its layers need attention with keys and values.
        ids: int64 [b, t], without pads.
        take: called for each layer, first to last, or last to first with gradients.
        gradients: also of the loss, the sum of negative log probabilities of each token but the first, in nats.
        pre_rope: keys and their gradients as they are before the rotation by position.

    Raises:
        CalibrationError: a layer has no keys and values, or they are not finite.
    """
    tap = _Tap(take, gradients, pre_rope)
    cache = _Passing(model.config.get_text_config(decoder=True), tap)
    ids = ids.to(model.device)
    with _attached(model, tap):
        if not gradients:
            with torch.no_grad():
                decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
                (decoder or model)(input_ids=ids, past_key_values=cache, use_cache=True)
            return
        with torch.enable_grad():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            del logits
            tap.replaying = True
            loss.backward()


def shapes(model: Any) -> dict[int, tuple[int, int]]:
    """Heads and channels of a head, of the keys and values of each layer, found by running one token."""
    out = {}

    def take(layer: int, data: dict[str, Tensor]) -> None:
        if data["keys"].shape != data["values"].shape:
            raise CalibrationError(
                f"layer {layer}: keys and values of different sizes can't be calibrated. Use {uncalibrated()}."
            )
        out[layer] = (data["keys"].shape[2], data["keys"].shape[3])

    record(model, torch.zeros(1, 1, dtype=torch.int64), take, pre_rope=False)
    return out


class _Tap:
    """What comes by; with gradients a layer is handed over once both of its own are there."""

    def __init__(self, take: Take, gradients: bool, pre_rope: bool) -> None:
        self.take, self.gradients, self.pre_rope = take, gradients, pre_rope
        self.replaying = False
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.waiting: dict[int, dict[str, Tensor]] = {}

    def hear(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values [b, h, t, d] on their way to attention."""
        rope = self._rope()
        if self.gradients and not self.replaying:
            keys.register_hook(partial(self._gradient, layer, "key_grads", rope))
            values.register_hook(partial(self._gradient, layer, "value_grads", None))
            return
        rows = {"keys": _rows(keys), "values": _rows(values)}
        if rope is not None:
            rows["keys"] = rope.undo(rows["keys"], 0)
        for name, tensor in rows.items():
            _require_finite(layer, name, tensor)
        # Hooks on what is made again would never fire: gradients pass through what was made at first.
        if self.gradients:
            self.waiting[layer] = rows
        else:
            self.take(layer, rows)

    def _rope(self) -> Rope | None:
        if not self.pre_rope or self.rotation is None:
            return None
        cos, sin = self.rotation
        rope = Rope.of(cos[0])
        if rope is not None:
            rope.extend(0, cos[0], sin[0])
        return rope

    def _gradient(self, layer: int, name: str, rope: Rope | None, gradient: Tensor) -> None:
        rows = _rows(gradient)
        found = self.waiting[layer]
        found[name] = rows if rope is None else rope.back(rows, 0)
        _require_finite(layer, name, rows)
        if len(found) == 4:
            self.take(layer, self.waiting.pop(layer))


def _rows(x: Tensor) -> Tensor:
    """[b, h, t, d] as float32 [b, t, h, d], which keeps no graph."""
    return x.detach().transpose(1, 2).to(torch.float32).contiguous()


def _require_finite(layer: int, name: str, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise CalibrationError(
            f"layer {layer}: {name} hold NaN or infinity. Either the weights are damaged (run `qexport verify`), or "
            "the compute dtype is too narrow (calibrate in float32)."
        )


class _Nothing(CacheLayerMixin):  # type: ignore[misc]
    """A layer's cache that stores nothing."""

    is_croppable = False
    is_compileable = False

    def __init__(self, index: int, tap: _Tap, sliding_window: int | None = None) -> None:
        super().__init__()
        self.index, self.tap, self.is_sliding = index, tap, sliding_window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Let them be heard and return them."""
        self.tap.hear(self.index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """No tokens."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many tokens as there are queries, from the first on."""
        return query_length, 0


class _Passing(Cache):  # type: ignore[misc]
    """A model's cache that stores nothing."""

    def __init__(self, config: Any, tap: _Tap) -> None:
        layers = []
        for index, (kind, options) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True)):
            if kind not in _KINDS:
                raise CalibrationError(
                    f"layer {index}: {kind} has no keys and values that could be calibrated. Use a cache that needs "
                    f"no calibration: {uncalibrated()}."
                )
            layers.append(_Nothing(index, tap, **options))
        super().__init__(layers=layers)


@contextmanager
def _attached(model: Any, tap: _Tap) -> Iterator[None]:
    """Hooks and wrappers on a model, its weights frozen and in eval mode; afterwards as before."""
    handles, layers = [], []
    frozen = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]

    def hear_rope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.rotation = kwargs.get("position_embeddings")

    try:
        for p in frozen:
            p.requires_grad_(False)
        model.eval()
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                handles.append(module.register_forward_pre_hook(hear_rope, with_kwargs=True))
        if tap.gradients:
            handles.append(model.get_input_embeddings().register_forward_hook(_with_gradient))
            layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            kept = [(module, module.__dict__.get("forward")) for module in layers]
            for module in layers:
                module.forward = partial(_run_again, module.forward)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in kept if layers else []:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        for p in frozen:
            p.requires_grad_(True)
        for module in training:
            module.training = True


def _with_gradient(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.detach().requires_grad_()


def _run_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
