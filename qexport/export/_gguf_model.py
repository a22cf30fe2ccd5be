"""What a GGUF file says of a model: its architecture, its sizes, names of its tensors, order of its rows."""

from collections.abc import Iterator
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from qexport.models.gguf import frequencies

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's architecture for each model type of transformers that can be written."""

ELSEWHERE = "Use --to dense and llama.cpp's own converter"
"""What to do with a model that is not written here."""


class Outline:
    """A model as GGUF describes it.

    Args:
        config: of transformers, of one of `ARCHITECTURES`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.architecture = ARCHITECTURES[config.model_type]
        self.rope: dict[str, Any] = dict(config.rope_parameters)
        kinds = {name: key for key, name in MODEL_ARCH_NAMES.items()}
        self._names = get_tensor_name_map(kinds[self.architecture], config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        own: int | None = getattr(self.config, "head_dim", None)
        return own or int(self.config.hidden_size // self.config.num_attention_heads)

    @property
    def context(self) -> int:
        """Most tokens of a text; where attention has a window, that: up to there all of a text lies in it."""
        return min(int(self.config.max_position_embeddings), getattr(self.config, "sliding_window", None) or 1 << 62)

    def name(self, tensor: str) -> str | None:
        """GGUF's name of a tensor of the state dict; None if there is none."""
        found: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        return found

    def rows(self, tensor: str) -> Tensor | None:
        """The order of a tensor's rows, int64 [n], where it is another one.

        The rotation of architecture `llama` takes neighbouring features of a query or key for a pair; that of
        transformers takes feature i and feature i + head_dim / 2.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        layer, _, _ = tensor.rpartition(".")
        count = heads.get(layer.rpartition(".")[2])
        if self.architecture != "llama" or count is None:
            return None
        return torch.arange(count * self.head_dim).view(count, 2, -1).transpose(1, 2).reshape(-1)

    def rope_factors(self) -> Tensor | None:
        """What rotary frequencies are divided by, float32 [head_dim / 2]; None if they are as they come.

        GGUF has no words for the rule of Llama 3: llama.cpp reads its result from a tensor.
        """
        if self.rope.get("rope_type") != "llama3":
            return None
        plain = {"rope_type": "default", "rope_theta": self.rope["rope_theta"]}
        return frequencies(self.config, plain) / frequencies(self.config, self.rope)

    def add_to(self, writer: Any) -> None:
        """Tell a `GGUFWriter` all sizes."""
        config = self.config
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        writer.add_vocab_size(config.vocab_size)

    def reasons(self) -> Iterator[str]:
        """What of the config can't be told."""
        config = self.config
        if config.hidden_act != "silu":
            yield f"its activation is {config.hidden_act}, and {self.architecture} means silu there"
        kind, part = self.rope.get("rope_type", "default"), self.rope.get("partial_rotary_factor", 1.0)
        known = ("default", "llama3") if self.architecture == "llama" else ("default",)
        if kind not in known or part != 1.0:
            yield (
                f"its rotary positions are {kind} over {part:g} of a head, and {self.architecture} is written with "
                f"{' or '.join(known)} over all of it. {ELSEWHERE}"
            )
        taken = {"qwen2": config.hidden_size / config.num_attention_heads, "qwen3": 128}.get(self.architecture)
        if taken is not None and self.head_dim != taken:
            yield (
                f"its heads are {self.head_dim} wide, and transformers takes {taken:g} for granted in a GGUF file of "
                f"{self.architecture}: it could not be proven. {ELSEWHERE}"
            )

    def refuses(self, tensor: str) -> Iterator[str]:
        """Why a tensor can't be told."""
        if self.name(tensor) is None:
            yield f"architecture {self.architecture} has no place for it. {ELSEWHERE}"
        elif tensor.endswith(".bias") and self.architecture != "qwen2":
            yield (
                f"transformers passes over a bias in a GGUF file of {self.architecture}: it could not be proven. "
                f"{ELSEWHERE}"
            )
