"""GGUF exports: bytes against a decoder written by hand, logits by transformers, everything else refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from qexport import load
from qexport import plan as planning
from qexport.calibration import Calibration
from qexport.errors import CheckpointError, PlanError, SourceError, UsageError
from qexport.export import _ggml, _gguf_model, _gguf_vocabulary, _proof, export
from qexport.export._gguf_vocabulary import read_vocabulary
from qexport.formats.uniform import Uniform
from qexport.models import anatomy, open_source
from qexport.models import gguf as reading
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import Choice, load_recipe, with_options
from tests import tiny
from tests.test_export import packed

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny.CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS: dict[str, Callable[..., t.PretrainedConfig]] = {
    "llama": t.LlamaConfig,
    "mistral": t.MistralConfig,
    "qwen2": t.Qwen2Config,
    "qwen3": t.Qwen3Config,
    "gemma2": t.Gemma2Config,
}
SYM = {"bits": 4, "group_size": 32, "symmetric": True}


def _on_a_grid(model: Any) -> None:
    """Levels of every group of 32 are powers of two apart, and its ends are at codes 0 and 15."""
    rng = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shape = (module.out_features, module.in_features // 32, 32)
            codes = torch.randint(0, 16, shape, generator=rng)
            codes[..., 0], codes[..., 1] = 0, 15
            zeros = torch.randint(0, 16, (*shape[:2], 1), generator=rng)
            scales = 2.0 ** torch.randint(-7, -4, (*shape[:2], 1), generator=rng)
            module.weight.data = ((codes - zeros) * scales).reshape(module.weight.shape)


def made(
    folder: Path,
    kind: str = "llama",
    *,
    options: Mapping[str, Any] = SYM,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    work: Callable[[Any], None] = lambda model: None,
    tokenizer: Any = None,
    **config: Any,
) -> Path:
    """A model whose widths are multiples of 32, quantized into `folder / "packed"` with rtn."""
    own = KINDS[kind](**{**SIZES, "tie_word_embeddings": tied, **config})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(own)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.1)
    work(model)
    model.to(dtype).save_pretrained(folder / "model")
    (tokenizer or tiny.tokenizer(chat=True, add_bos=True)).save_pretrained(folder / "model")
    source = open_source(str(folder / "model"))
    recipe = with_options(load_recipe("rtn"), list(options.items()))
    quantize(make_plan(source, anatomy(source), recipe, calibration=Calibration()), source, folder / "packed")
    return folder / "packed"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof load with transformers in this process, which is faster than in another."""

    def foreign(exported: Path, work: Path, loading: Mapping[str, Any]) -> dict[str, Tensor]:
        options = {**loading, "dtype": torch.float32}
        model = t.AutoModelForCausalLM.from_pretrained(exported, **options).eval()
        with torch.inference_mode():
            return {n: model(input_ids=x.unsqueeze(0)).logits[0] for n, x in _proof.sequences(tiny.VOCAB).items()}

    monkeypatch.setattr(_proof, "_foreign", foreign)


def types(folder: Path) -> dict[str, str]:
    """Types of the tensors of an exported file, by their names."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / "model.gguf").tensors}


def field(folder: Path, key: str) -> Any:
    """A value of the metadata of an exported file."""
    return GGUFReader(folder / "model.gguf").fields[key].contents()


def _bpe(cut: Any, norm: Any = None, **options: Any) -> t.PreTrainedTokenizerFast:
    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab={**vocab, "ab": 258, "abc": 259}, merges=[("a", "b"), ("ab", "c")], **options))
    raw.pre_tokenizer, raw.decoder = cut, decoders.ByteLevel()
    if norm is not None:
        raw.normalizer = norm
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def _split(digits: str) -> Any:
    pattern = Regex(_gguf_vocabulary._WORDS % digits)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), plain])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])


# ---- proven by transformers --------------------------------------------------------------------


def test_q4_0_is_proven_in_another_process_with_a_tied_head(tmp_path: Path) -> None:
    found = export(made(tmp_path, tied=True), "gguf", tmp_path / "out")
    assert found["check"]["max_difference"] < 1e-6
    assert found["check"]["top1"] == 1.0
    stored = types(tmp_path / "out")
    assert "output.weight" not in stored
    assert {stored[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_v", "ffn_down", "attn_output")} == {"Q4_0"}
    assert {stored[name] for name in ("token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight")} == {"F32"}
    assert "llama-cli -m out/model.gguf" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("forked")
def test_q4_1_is_proven_in_another_process_where_its_offsets_are_exact(tmp_path: Path) -> None:
    folder = made(tmp_path, work=_on_a_grid, options={"bits": 4, "group_size": 32})
    found = export(folder, "gguf", tmp_path / "out")
    assert found["check"]["max_difference"] < 1e-6
    assert types(tmp_path / "out")["blk.0.attn_k.weight"] == "Q4_1"
    assert field(tmp_path / "out", "general.file_type") == 3


@pytest.mark.usefixtures("forked")
def test_q8_0_is_proven_in_another_process_with_biases(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen2", options={**SYM, "bits": 8}, dtype=torch.bfloat16)
    found = export(folder, "gguf", tmp_path / "out")
    assert found["check"]["max_difference"] < 1e-6
    stored = types(tmp_path / "out")
    assert stored["blk.0.attn_q.weight"] == "Q8_0"
    assert stored["blk.0.attn_q.bias"] == "F32"
    assert stored["token_embd.weight"] == stored["output.weight"] == "BF16"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("qwen3", {"head_dim": 128, "rope_theta": 500000.0}),
        ("mistral", {"head_dim": 32, "sliding_window": 96}),
        ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    ],
)
def test_other_architectures_compute_the_same(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = made(tmp_path, kind, options={**SYM, "lm_head": 8}, dtype=torch.float16, **config)
    assert export(folder, "gguf", tmp_path / "out")["check"]["max_difference"] < 1e-6
    stored = types(tmp_path / "out")
    assert (stored["output.weight"], stored["token_embd.weight"]) == ("Q8_0", "F16")


def test_a_window_is_written_as_the_context(tmp_path: Path) -> None:
    export(made(tmp_path, "mistral", sliding_window=96), "gguf", tmp_path / "out", check=False)
    assert field(tmp_path / "out", "llama.context_length") == 96


def test_rotary_factors_of_llama_3_are_a_tensor_that_is_read_back(tmp_path: Path) -> None:
    export(made(tmp_path, rope_parameters=LLAMA3), "gguf", tmp_path / "out", check=False)
    config = t.LlamaConfig(**SIZES)
    reading._rope_factors(GGUFReader(tmp_path / "out" / "model.gguf"), config, "model.gguf")
    assert config.rope_parameters == LLAMA3


@pytest.mark.usefixtures("here")
def test_a_packed_embedding_without_zeros_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice("rtn", {}, "uniform", {**SYM, "bits": 8})
    monkeypatch.setattr(planning, "choose_embedding", lambda recipe, name: choice)
    assert export(made(tmp_path), "gguf", tmp_path / "out")["check"]["max_difference"] < 1e-6
    assert types(tmp_path / "out")["token_embd.weight"] == "Q8_0"


# ---- proven by llama.cpp -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "config"),
    [
        ("llama", SYM, {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
        ("llama", {"bits": 4, "group_size": 32}, {"work": _on_a_grid, "tied": True}),
        ("qwen2", {**SYM, "bits": 8}, {"dtype": torch.bfloat16}),
        ("qwen3", {**SYM, "lm_head": 8}, {"head_dim": 128}),
    ],
)
def test_llama_cpp_computes_the_same_from_float32(
    kind: str, options: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """It decodes the blocks itself, as its products would round the other side to 8 bits."""
    llama = pytest.importorskip("llama_cpp")
    folder = made(tmp_path, kind, options=options, tokenizer=_bpe(_GPT2), vocab_size=260, **config)
    export(folder, "gguf", tmp_path / "out", check=False)
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, 1
    decoded = str(tmp_path / "float32.gguf")
    assert llama.llama_model_quantize(str(tmp_path / "out" / "model.gguf").encode(), decoded.encode(), params) == 0
    plain = {"n_ctx": 64, "n_threads": 1, "verbose": False, "logits_all": True, "type_k": 0, "type_v": 0}
    theirs = llama.Llama(decoded, **plain, flash_attn=False)
    ids = _proof.sequences(258)["sequence_48"]
    theirs.eval(ids.tolist())
    with torch.inference_mode():
        ours = load(folder, backend="reference", dtype=torch.float32)(input_ids=ids.unsqueeze(0)).logits[0]
    assert (torch.tensor(theirs.scores[:48]) - ours).abs().max() < 1e-5 * ours.abs().max()


# ---- bytes -------------------------------------------------------------------------------------


def _by_hand(kind: str, raw: bytes) -> list[float]:
    """32 weights of one block."""
    numbers = np.frombuffer(raw, np.uint8)
    d = float(np.frombuffer(raw[:2], np.float16)[0])
    if kind == "Q8_0":
        return [d * (int(b) - 256 if b > 127 else int(b)) for b in numbers[2:34]]
    body = numbers[2:18] if kind == "Q4_0" else numbers[4:20]
    codes = [int(b) % 16 for b in body] + [int(b) // 16 for b in body]
    if kind == "Q4_0":
        return [d * (code - 8) for code in codes]
    return [d * code + float(np.frombuffer(raw[2:4], np.float16)[0]) for code in codes]


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "size"), [("Q4_0", 4, True, 18), ("Q4_1", 4, False, 20), ("Q8_0", 8, True, 34)]
)
def test_blocks_hold_our_levels_byte_by_byte(kind: str, bits: int, symmetric: bool, size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    fmt = Uniform(bits=bits, group_size=32, symmetric=symmetric)
    fields = {
        "codes": torch.randint(0, 2**bits, (3, 64), generator=rng, dtype=torch.uint8),
        "scales": torch.rand(3, 2, generator=rng).to(torch.float16).to(torch.float32),
        "zeros": torch.tensor([[0.0, 1.0], [2.0, 4.0], [8.0, 0.0]]),
    }
    fields = fields if not symmetric else {name: fields[name] for name in ("codes", "scales")}
    assert _ggml.kind(fmt) == kind
    found = _ggml.blocks(kind, fields)
    assert (found.shape, found.dtype) == ((3, 2 * size), np.uint8)
    rows = [_by_hand(kind, row[:size].tobytes()) + _by_hand(kind, row[size:].tobytes()) for row in found]
    torch.testing.assert_close(torch.tensor(rows), fmt.decode(fields), atol=0, rtol=0)


def test_only_formats_with_a_block_have_a_kind() -> None:
    assert _ggml.kind(Uniform(bits=8, group_size=32, symmetric=False)) is None
    assert _ggml.kind(Uniform(bits=3, group_size=32, symmetric=True)) is None
    assert _ggml.kind(Uniform(bits=4, group_size=64, symmetric=True)) is None


def test_dense_tensors_are_never_rounded() -> None:
    fine = torch.tensor([[1.0, 1 + 2**-20], [3.0, 4.0]])
    assert _ggml.dense(fine)[0] == "F32"
    assert _ggml.dense(fine.to(torch.float16).to(torch.float32))[0] == "F16"
    assert _ggml.dense(torch.tensor([[1e30]]).to(torch.bfloat16))[0] == "BF16"
    assert _ggml.dense(torch.ones(3, dtype=torch.float16))[0] == "F32"
    assert _ggml.dense(fine)[1].view(np.float32).tolist() == fine.tolist()


# ---- the tokenizer -----------------------------------------------------------------------------


def test_the_tokenizer_is_told_whole(tmp_path: Path) -> None:
    export(made(tmp_path, vocab_size=264), "gguf", tmp_path / "out", check=False)
    get = {key: field(tmp_path / "out", f"tokenizer.{key}") for key in ("ggml.tokens", "ggml.token_type")}
    tokens, kinds = get["ggml.tokens"], get["ggml.token_type"]
    assert (len(tokens), tokens[:2], tokens[258]) == (264, ["<s>", "</s>"], "[PAD258]")
    assert (kinds[0], kinds[2], kinds[263]) == (TokenType.CONTROL, TokenType.NORMAL, TokenType.UNUSED)
    told = {"model": "gpt2", "pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1}
    told |= {"add_bos_token": True, "add_eos_token": False}
    for key, value in told.items():
        assert field(tmp_path / "out", f"tokenizer.ggml.{key}") == value
    assert field(tmp_path / "out", "tokenizer.chat_template") == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("cut", "options", "pre"),
    [
        (_GPT2, {}, "gpt-2"),
        (_DIGITS, {}, "smollm"),
        (_split(r"\p{N}{1,3}"), {"ignore_merges": True}, "llama-bpe"),
        (_split(r"\p{N}{1,3}"), {}, "smaug-bpe"),
        (_split(r"\p{N}"), {}, "qwen2"),
    ],
)
def test_cuts_into_words_have_names(cut: Any, options: dict[str, Any], pre: str, tmp_path: Path) -> None:
    _bpe(cut, **options).save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 260)
    assert (found.pre, found.merges, found.add_bos) == (pre, ["a b", "ab c"], False)
    assert found.special == {"bos": 0, "eos": 1}


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (_bpe(pre_tokenizers.Whitespace()), "it cuts text into words as none of gpt-2, smollm, .*Whitespace"),
        (_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "it cuts text into words as none of"),
        (_bpe(_GPT2, ignore_merges=True), "it cuts text into words as none of"),
        (_bpe(_GPT2, normalizers.Lowercase()), "normalizes with Lowercase, and only byte-level BPE and Sent"),
        (_bpe(_GPT2, byte_fallback=True), "it has pieces, but prepares text otherwise: .* llama.cpp's own converter"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer: Any, reason: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=reason):
        read_vocabulary(tmp_path, 260)


# ---- faults ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fault", ["nibbles", "rows", "epsilon"])
def test_a_wrong_file_fails_the_check_and_leaves_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path)
    if fault == "nibbles":
        right = _ggml.blocks
        monkeypatch.setattr(_ggml, "blocks", lambda name, fields: _swap(right(name, fields)))
    elif fault == "rows":
        monkeypatch.setattr(_gguf_model.Outline, "rows", lambda self, name: None)
    else:
        own_sizes = _gguf_model.Outline.add_to

        def sizes(self: Any, writer: Any) -> None:
            own_sizes(self, writer)
            writer.add_layer_norm_rms_eps(1e-2)

        monkeypatch.setattr(_gguf_model.Outline, "add_to", sizes)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"logits differ from ours by .* of the largest"):
        export(folder, "gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def _swap(rows: _ggml.Bytes) -> _ggml.Bytes:
    """Q4_0 blocks whose first 16 weights lie in the high halves."""
    out = rows.reshape(-1, 18).copy()
    out[:, 2:] = out[:, 2:] >> 4 | out[:, 2:] << 4
    return out.reshape(rows.shape)


# ---- refusals ----------------------------------------------------------------------------------


def _refused(folder: Path, place: Path, reason: str) -> None:
    with pytest.raises(PlanError, match=reason) as refusal:
        export(folder, "gguf", place / "out", check=False)
    assert "nothing was written" in str(refusal.value)
    assert not (place / "out").exists()


GOOD = "Quantize with --method gptq --bits 4 --group-size 32 --sym"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4, "group_size": 32}, rf"down_proj and 13 more: .* -zero \* scale .* rounded here. {GOOD}"),
        (
            {**SYM, "bits": 3},
            "and 13 more: no block holds 3-bit integers without zeros. .* --sym and --bits 4 or 8, or",
        ),
        ({"bits": 8, "group_size": 32}, "no block holds 8-bit integers with zeros"),
        ({**SYM, "group_size": 16}, f"its groups hold 16 weights, and a block holds 32. {GOOD}"),
        ({**SYM, "group_size": -1}, "its groups are whole rows, and a block holds 32"),
        ({**SYM, "embeddings": 6}, "embed_tokens: no block holds 6-bit integers without zeros. Leave out --embed"),
    ],
)
def test_other_integers_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _refused(made(tmp_path, options=options), tmp_path, reason)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("gemma2", {}, "model: gemma2 is not written, only llama, mistral, qwen2, qwen3. Use --to dense"),
        ("llama", {"attention_bias": True}, r"self_attn.k_proj.bias and .* more: .* passes over a bias"),
        ("llama", {"hidden_act": "gelu"}, "model: its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "are linear over 1"),
        ("qwen3", {"head_dim": 32}, "its heads are 32 wide, and transformers takes 128 for granted"),
        ("llama", {"intermediate_size": 80}, "down_proj and 1 more: blocks of 32 do not divide its 80 columns"),
    ],
)
def test_other_models_are_refused(kind: str, config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _refused(made(tmp_path, kind, **config), tmp_path, reason)


def test_other_formats_inputs_and_experts_are_refused(tmp_path: Path) -> None:
    sorts = {"order": "act", "group_size": 32}
    _refused(packed(tmp_path / "a", "llama", "bcq", bits=2, group_size=16), tmp_path, 'format "bcq" has no counterpart')
    _refused(packed(tmp_path / "b", "llama", "gptq", **sorts), tmp_path, "its input is sorted when it runs")
    _refused(packed(tmp_path / "c", "mixtral"), tmp_path, "it is one expert of a stack")


@pytest.mark.usefixtures("here")
def test_a_symmetric_recipe_packs_an_embedding_that_fits(tmp_path: Path) -> None:
    folder = made(tmp_path, options={**SYM, "embeddings": 8, "lm_head": 4}, tied=True)
    export(folder, "gguf", tmp_path / "out")
    found = types(tmp_path / "out")
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q8_0", "Q4_0")


def test_scales_out_of_range_are_refused(tmp_path: Path) -> None:
    def large(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.data[0] = 1e6

    _refused(made(tmp_path, work=large), tmp_path, "0.mlp.up_proj: its scales are bfloat16, .* --ignore")


def test_a_model_without_a_tokenizer_that_can_be_told_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, tokenizer=_bpe(pre_tokenizers.Whitespace()), vocab_size=260)
    _refused(folder, tmp_path, "tokenizer: it cuts text into words as none of")
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"no tokenizer can be loaded from .*none .*Add the model's tokenizer.json"):
        read_vocabulary(tmp_path / "none", 260)


@pytest.mark.parametrize(
    ("options", "others", "kinds", "largest"),
    [
        ({"bits": 4, "group_size": 16, "symmetric": True}, "Q8_0", {"Q8_0"}, 4e-2),
        ({"bits": 4, "group_size": 32, "symmetric": False}, "F16", {"F16"}, 5e-3),
        (SYM, "Q8_0", {"Q4_0"}, 1e-5),
    ],
)
def test_what_does_not_fit_is_rounded_again_only_on_request(
    options: dict[str, Any], others: str, kinds: set[str], largest: float, tmp_path: Path, here: None
) -> None:
    folder = made(tmp_path, options=options)
    if kinds != {"Q4_0"}:
        with pytest.raises(PlanError):
            export(folder, "gguf", tmp_path / "out")
    found = export(folder, "gguf", tmp_path / "out", options={"others": others})
    assert found["check"]["max_difference"] < largest
    linears = {kind for name, kind in types(tmp_path / "out").items() if ".attn_q." in name or ".ffn_up." in name}
    assert linears == kinds
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**rounded again, to {others}**" in card
    assert "\n- requantized\n" in card
    with pytest.raises(UsageError, match="others 'Q2_K': expected refuse, F16, Q8_0"):
        export(folder, "gguf", tmp_path / "more", options={"others": "Q2_K"})
