"""GGUF files become folders of the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qexport.errors import PlanError, SourceError, UsageError
from qexport.evaluate.compare import compare
from qexport.evaluate.run import evaluate
from qexport.models import anatomy, load_dense, open_source
from tests import tiny

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(**changes: Any) -> Any:
    """A tiny Llama whose rows hold whole GGUF blocks of 32."""
    torch.manual_seed(0)
    # One token more than the bytes: a GGUF tokenizer has at least one merge.
    options = {
        **tiny._LLAMA,
        "vocab_size": tiny.VOCAB + 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes})).eval()


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        inner, _, suffix = rest.rpartition(".")
        return f"blk.{index}.{_NAMES[inner]}.{suffix}"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which GGUF keeps rotary pairs: side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    model: Any, path: Path, kind: GGMLQuantizationType, extra: dict[str, np.ndarray] | None = None
) -> dict[str, torch.Tensor]:
    """Write a GGUF file; returns what a reader must make of it, before rounding to float16."""
    config = model.config
    out = GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    ids = tiny.tokenizer().get_vocab()
    vocab = [*sorted(ids, key=ids.__getitem__), "he"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(vocab)
    out.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(vocab) - 2))
    out.add_token_merges(["h e"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    expected = {}
    for name, param in model.named_parameters():
        value = param.detach().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(
            name.partition("_proj")[0][-1], 0
        )
        stored = interleaved(value, heads) if heads and value.ndim == 2 else value
        if value.ndim == 2:
            packed = quantize(stored, kind)
            decoded = dequantize(packed, kind)
            out.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        else:
            decoded = stored
            out.add_tensor(gguf_name(name), stored)
        if heads and value.ndim == 2:
            decoded = decoded.reshape(heads, -1, 2, decoded.shape[1]).swapaxes(1, 2).reshape(value.shape)
        expected[name] = torch.from_numpy(np.array(decoded))
    for name, value in (extra or {}).items():
        out.add_tensor(name, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return expected


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_file_becomes_float16_tensors_of_the_model(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    expected = write(llama(), tmp_path / "tiny.gguf", kind)
    source = open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work")
    found = anatomy(source)
    assert found.tied
    assert set(found.parameters) == set(expected)
    for name, value in expected.items():
        assert torch.equal(source.read(name), value.to(torch.float16)), name
    assert source.tokenizer().decode(source.tokenizer()("hello").input_ids) == "hello"
    assert (source.folder / "generation_config.json").is_file()


def test_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    model = llama()
    write(model, tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    dense = load_dense(open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work"), dtype=torch.float32)
    tokens = torch.randint(2, 240, (2, 20))
    torch.testing.assert_close(dense(tokens).logits, model.half().float()(tokens).logits)


def test_conversion_is_done_once(tmp_path: Path) -> None:
    write(llama(), tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    notes: list[Any] = []
    first = open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work", observer=notes.append)
    told = len(notes)
    second = open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work", observer=notes.append)
    assert first.folder == second.folder
    assert told > 0
    assert len(notes) == told
    assert not list((tmp_path / "work").glob("*.tmp"))


def test_llama3_rotary_factors_go_into_the_config(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = llama(rope_parameters=rope)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 1
    write(model, tmp_path / "tiny.gguf", GGMLQuantizationType.F32, {"rope_freqs.weight": factors})
    source = open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work")
    torch.testing.assert_close(LlamaRotaryEmbedding(source.config).inv_freq, model.model.rotary_emb.inv_freq)
    other = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    write(model, tmp_path / "other.gguf", GGMLQuantizationType.F32, other)
    with pytest.raises(PlanError, match=r"rope_freqs\.weight holds rotary factors that are not Llama 3's"):
        open_source(str(tmp_path / "other.gguf"), work=tmp_path / "work")


def test_tensor_without_a_place_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    extra = {"blk.0.adapter.weight": np.ones((2, 2), dtype=np.float32)}
    write(llama(), tmp_path / "tiny.gguf", GGMLQuantizationType.F32, extra)
    with pytest.raises(PlanError, match=r"has no place for blk\.0\.adapter\.weight"):
        open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_value_outside_float16_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.norm.weight.data[0] = 1e6
    write(model, tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    with pytest.raises(SourceError, match=r"model\.norm\.weight holds values outside float16, up to 1e\+06"):
        open_source(str(tmp_path / "tiny.gguf"), work=tmp_path / "work")


def test_other_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model, but long enough to have a header" * 4)
    with pytest.raises(SourceError, match="is not a readable GGUF file"):
        open_source(str(tmp_path / "text.gguf"), work=tmp_path / "work")


def test_a_file_is_measured_and_compared_like_a_folder(tmp_path: Path) -> None:
    write(llama(), tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    (tmp_path / "text").write_text("once upon a time there was a file. " * 20)
    target = str(tmp_path / "tiny.gguf")
    found = evaluate(target, texts=[str(tmp_path / "text")], seqlen=32, windows=1)
    row = compare([target])["rows"][0]
    assert row["name"] == "tiny.gguf"
    assert row["bits_per_weight"] == 16
    assert row["figures"]["perplexity, text"]["value"] == pytest.approx(found["perplexity"]["text"]["value"])
    with pytest.raises(UsageError, match=r"found another file"):
        compare([str(tmp_path / "text")])
