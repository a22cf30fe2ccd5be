"""Attention layers of a model that keep keys and values, from its config alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from qexport.errors import CheckpointError
from qexport.models.auto import read_config, reason

KINDS = ("full_attention", "sliding_attention")
"""transformers' types of layers whose cache is keys and values of tokens."""


@dataclass(frozen=True)
class Attention:
    """What one token leaves in the cache of a layer: keys and values [heads, dim].

    Attributes:
        heads: of keys and values.
        dim: of a head.
        window: tokens that are kept at most; None: all.
    """

    heads: int
    dim: int
    window: int | None = None


def attention_layers(config: PretrainedConfig) -> dict[int, Attention]:
    """Layers with keys and values, by their number; without those that keep another state or share one.

    Raises:
        CheckpointError: the config does not say how many heads there are, or how wide.
    """
    try:
        text: Any = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(text)
        found = zip(kinds, options, text.per_layer_config, strict=True)
        return {i: _attention(own, extra) for i, (kind, extra, own) in enumerate(found) if kind in KINDS}
    except CheckpointError:
        raise
    except Exception as error:  # configs are other people's classes around an untrusted file
        raise CheckpointError(
            f"config.json: can't tell which layers keep keys and values ({type(error).__name__}: {error})."
        ) from error


def other_layers(config: PretrainedConfig) -> dict[int, str]:
    """Layers that keep another state than keys and values, by their number, with transformers' name of the type."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return {i: kind for i, kind in enumerate(kinds) if kind not in (*KINDS, "dummy")}


def heads_of(folder: Path) -> dict[int, tuple[int, int]]:
    """Heads and channels of a head of each layer with keys and values of a checkpoint on disk.

    Raises:
        CheckpointError: its config can't be read, or there is no such layer.
    """
    try:
        config = read_config(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers can't read it ({reason(error)}).") from error
    heads = {layer: (own.heads, own.dim) for layer, own in attention_layers(config).items()}
    if not heads:
        raise CheckpointError(f"{folder}: has no attention layer whose cache could be quantized. Use --kv none.")
    return heads


def _attention(layer: Any, options: dict[str, Any]) -> Attention:
    queries = getattr(layer, "num_attention_heads", None) or 0
    heads = getattr(layer, "num_key_value_heads", None) or queries
    dim = getattr(layer, "head_dim", None) or layer.hidden_size // max(queries, 1)
    if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim > 0):
        raise CheckpointError(f"config.json: expected numbers of heads and of their channels, found {heads}, {dim}.")
    return Attention(heads, dim, options.get("sliding_window"))
