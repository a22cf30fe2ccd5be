"""Tiny random models of every supported architecture, saved as Hugging Face folders.

`save(name, folder)` writes one; `NAMES` lists them. Sizes are odd on purpose (head_dim 8, widths that no group size
divides), weights are large enough for every logit to matter, biases and norms are not left at zero and one.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 258  # <s>, </s> and 256 bytes
CONTEXT = 128

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MOE: dict[str, Any] = {**_LLAMA, "num_experts_per_tok": 2, "max_position_embeddings": CONTEXT}


def _gemma3_wrapper(tied: bool) -> t.PretrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return t.Gemma3Config(
        text_config={**_GEMMA, "tie_word_embeddings": tied},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
        tie_word_embeddings=tied,
    )


_CONFIGS: dict[str, Callable[[bool], t.PretrainedConfig]] = {
    "llama": lambda tied: t.LlamaConfig(**_LLAMA, tie_word_embeddings=tied),
    "mistral": lambda tied: t.MistralConfig(**_LLAMA, sliding_window=16, tie_word_embeddings=tied),
    "qwen2": lambda tied: t.Qwen2Config(
        **{k: v for k, v in _LLAMA.items() if k != "head_dim"}, tie_word_embeddings=tied
    ),
    "qwen3": lambda tied: t.Qwen3Config(**_LLAMA, tie_word_embeddings=tied),
    "gemma2": lambda tied: t.Gemma2Config(**_GEMMA, tie_word_embeddings=tied),
    "gemma3": lambda tied: t.Gemma3TextConfig(**_GEMMA, tie_word_embeddings=tied),
    "gemma3-wrapper": _gemma3_wrapper,
    "phi3": lambda tied: t.Phi3Config(
        **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
        original_max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
    ),
    "opt": lambda tied: t.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        word_embed_proj_dim=40,
        ffn_dim=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=tied,
    ),
    "gpt2": lambda tied: t.GPT2Config(
        vocab_size=VOCAB,
        n_embd=40,
        n_inner=72,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    ),
    "gpt_neox": lambda tied: t.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    ),
    "mixtral": lambda tied: t.MixtralConfig(**_MOE, num_local_experts=3, tie_word_embeddings=tied),
    "qwen3_moe": lambda tied: t.Qwen3MoeConfig(
        **_MOE, num_experts=3, moe_intermediate_size=24, mlp_only_layers=[0], tie_word_embeddings=tied
    ),
}
NAMES = tuple(_CONFIGS)
DENSE = tuple(n for n in NAMES if n not in {"mixtral", "qwen3_moe"})
MOE = ("mixtral", "qwen3_moe")

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(*, chat: bool = False, add_bos: bool = False) -> t.PreTrainedTokenizerFast:
    """A byte-level tokenizer made in memory: ids 0 and 1 are `<s>` and `</s>`, then one id for each byte."""
    from tokenizers import processors

    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    out = t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat:
        out.chat_template = CHAT_TEMPLATE
    return out


def config(name: str, *, tied: bool = False) -> t.PretrainedConfig:
    """The configuration of a tiny model."""
    return _CONFIGS[name](tied)


def make(name: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> t.PreTrainedModel:
    """A tiny random model in memory, in eval mode."""
    own = config(name, tied=tied)
    cls: Any = t.Gemma3ForConditionalGeneration if name == "gemma3-wrapper" else t.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(own) if name == "gemma3-wrapper" else cls.from_config(own)
        with torch.no_grad():
            for key, param in model.named_parameters():
                if param.ndim == 1:  # norms and biases: neither one nor zero
                    param.add_(torch.randn_like(param) * 0.1)
                else:
                    param.normal_(std=0.3 if "embed" in key or "wte" in key else param.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def save(
    name: str,
    folder: Path,
    *,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    chat: bool = False,
) -> Path:
    """Write a tiny model with its tokenizer.

    Args:
        name: one of `NAMES`.
        folder: a new folder.
        tied: the head shares the embedding.
        shards: 1 writes model.safetensors; more writes an index and about that many files.
        dtype: stored dtype.
        chat: give the tokenizer a chat template.

    Returns:
        The folder.
    """
    shutil.copytree(_saved(name, tied, shards, dtype, chat), folder)
    return folder


@functools.cache
def _saved(name: str, tied: bool, shards: int, dtype: torch.dtype, chat: bool) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    model = make(name, tied=tied, dtype=dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size="1GB" if shards == 1 else max(total // shards, 1))
    tokenizer(chat=chat).save_pretrained(folder)
    return folder
