"""Stepping a whole model one token at a time, many rows at once: what sampling needs of transformers' caches."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from qexport.models.parts import Anatomy

_FLOAT32_PARAMETERS = 1 << 30


class _Buffered(DynamicLayer):  # type: ignore[misc]
    """A full-attention cache layer with a buffer of its final size, which does not copy itself at each step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self._used = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, heads, tokens, d]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys = _room(key_states, self._capacity)
            self._values = _room(value_states, self._capacity)
        start, self._used = self._used, self._used + key_states.shape[-2]
        self._keys[:, :, start : self._used] = key_states
        self._values[:, :, start : self._used] = value_states
        self.keys, self.values = self._keys[:, :, : self._used], self._values[:, :, : self._used]
        return self.keys, self.values


def _room(like: Tensor, capacity: int) -> Tensor:
    return like.new_empty((*like.shape[:2], capacity, like.shape[3]))


class Stepper:
    """Feeds rows of tokens to a model, one column at a time.

    Args:
        model: the whole model.
        capacity: columns that will come at most.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        layers = self._cache.layers
        self._cache.layers = [_Buffered(capacity) if type(layer) is DynamicLayer else layer for layer in layers]

    def step(self, column: Tensor) -> Tensor:
        """Logits float32 [b, vocab] of the next token, after tokens int64 [b]."""
        with torch.no_grad():
            out = self._model(input_ids=column.unsqueeze(1), past_key_values=self._cache, use_cache=True)
        logits: Tensor = out.logits[:, -1].float()
        return logits


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a document, by the tokenizer, the config or the generation settings."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    configured = model.config.get_text_config().eos_token_id
    for value in (tokenizer.eos_token_id, configured, getattr(generation, "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, Collection):
            found.update(int(v) for v in value)
    return frozenset(found)


def source_dtype(anatomy: Anatomy) -> torch.dtype:
    """The floating-point dtype that most weights are stored in."""
    weight: dict[torch.dtype, int] = {}
    for dtype, shape in anatomy.parameters.values():
        if dtype.is_floating_point:
            weight[dtype] = weight.get(dtype, 0) + torch.Size(shape).numel()
    return max(weight, key=lambda d: weight[d])


def compute_dtype(anatomy: Anatomy, device: str | torch.device = "cpu") -> torch.dtype:
    """Dtype to run the whole model in: the source's, unless a CPU is slow at it.

    On a CPU, float16 products are several times slower than float32 ones, attention over a bfloat16 cache too, and
    bfloat16 products need instructions that not every CPU has. So models of up to 2^30 parameters run in float32,
    which holds either dtype's weights exactly, and only larger ones in bfloat16, for its memory.
    """
    dtype = source_dtype(anatomy)
    if torch.device(device).type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    parameters = sum(torch.Size(shape).numel() for _, shape in anatomy.parameters.values())
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast and parameters > _FLOAT32_PARAMETERS else torch.float32
