"""Calibrate a cache: a live model, its format and a method to what each layer's cache needs to know.

    state = start(model, fmt, method, tokens=texts.numel())
    for name in method.passes:
        for ids in texts.split(1):
            state = step(model, fmt, method, state, name=name, ids=ids)
    statics = finish(fmt, method, state)

A state is a dict of tensors of fixed sizes, so a job can save it after any step and go on from there.
"""

from typing import Any

import torch
from torch import Tensor

from qexport import schema
from qexport.caches.base import CacheMethod
from qexport.errors import CalibrationError, PlanError
from qexport.formats.kv.base import KVFormat, kv_name
from qexport.runtime.record import record, shapes
from qexport.schema import Tensors

_SHAPE = "shape"


def start(model: Any, fmt: KVFormat, method: CacheMethod, *, tokens: int) -> dict[str, Tensor]:
    """State of all layers before the first step.

    Args:
        model: causal language model of transformers.
        fmt: the cache's format.
        method: that calibrates it.
        tokens: of all sequences together.

    Returns:
        Tensors by `<layer>.<name>`; `<layer>.shape` are heads and channels of a head.

    Raises:
        PlanError: the method can't calibrate the format.
        CalibrationError: a layer has no keys and values of one size.
    """
    if reason := method.reject(fmt):
        raise PlanError(f"cache {kv_name(fmt)!r}: {type(method).__name__} can't calibrate it: {reason}.")
    out = {}
    for layer, (heads, dim) in shapes(model).items():
        out[f"{layer}.{_SHAPE}"] = torch.tensor([heads, dim])
        out |= _named(layer, method.start(fmt, heads * dim, tokens))
    return out


def step(
    model: Any, fmt: KVFormat, method: CacheMethod, state: Tensors, *, name: str, ids: Tensor
) -> dict[str, Tensor]:
    """State after some sequences more, int64 [b, t], in a pass of the method."""
    out = dict(state)

    def take(layer: int, data: dict[str, Tensor]) -> None:
        own = {key: t.to(data["keys"].device) for key, t in _of(layer, state).items()}
        out.update(_named(layer, {key: t.cpu() for key, t in method.see(fmt, name, own, data).items()}))

    record(model, ids, take, gradients=method.passes[name], pre_rope=fmt.pre_rope)
    return out


def finish(fmt: KVFormat, method: CacheMethod, state: Tensors) -> dict[int, dict[str, Tensor]]:
    """What each layer's cache needs to know, checked; raises `CalibrationError` if no sequence was long enough."""
    out = {}
    for layer in sorted(int(key.split(".")[0]) for key in state if key.endswith(f".{_SHAPE}")):
        heads, dim = state[f"{layer}.{_SHAPE}"].tolist()
        out[layer] = method.finish(fmt, _of(layer, state))
        schema.check(out[layer], fmt.static(heads, dim), f"cache.{layer}")
        fmt.check_static(out[layer], heads, dim, f"cache.{layer}")
    if not out:
        raise CalibrationError("a cache was to be calibrated, and the model has no layer with keys and values.")
    return out


def _named(layer: int, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{layer}.{key}": t for key, t in tensors.items()}


def _of(layer: int, state: Tensors) -> dict[str, Tensor]:
    start = f"{layer}."
    return {key.removeprefix(start): t for key, t in state.items() if key.startswith(start) and key != start + _SHAPE}
