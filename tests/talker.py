"""A model that says what it is told to: each byte follows from the byte before, so what ends a message decides."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers as t

from tests import tiny

# Ends with the last message's own last byte, which is where an answer begins.
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
END = 1


def write(folder: Path, answers: Mapping[str, str], *, endless: str = "", context: int = 256) -> Path:
    """Save a dense folder.

    Args:
        folder: a new folder.
        answers: by the last letter of a message; no byte may come twice in all of them.
        endless: a letter and what is written after it again and again.
        context: tokens.
    """
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    follows: dict[int, int] = {}
    for start, text in answers.items():
        _link(follows, [*tokenizer(start + text)["input_ids"], END])
    if endless:
        ids = tokenizer(endless)["input_ids"]
        _link(follows, [*ids, ids[1]])
    width = tiny.VOCAB
    config = t.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=context, bos_token_id=0, eos_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = t.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(width))
        for token in range(tiny.VOCAB):
            model.lm_head.weight[follows.get(token, END), token] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _link(follows: dict[int, int], ids: list[int]) -> None:
    for token, after in itertools.pairwise(ids):
        assert token not in follows, "a byte has one successor"
        follows[token] = after
