"""Structure and streaming, on a tiny model of every supported architecture."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from qexport.errors import PlanError
from qexport.models import Skeleton, anatomy, load_dense, open_source, skeleton
from qexport.models import chain as chain_module
from qexport.models.linears import is_linear
from qexport.models.structure import _cache_width
from tests import tiny

LENGTH = 40  # longer than the sliding window of 16


def stream(bones: Skeleton, blocks: int, tokens: Tensor) -> Tensor:
    hidden = bones.embed(tokens)
    for i in range(blocks):
        hidden = bones.run(i, bones.block(i), hidden)
    return bones.finish(hidden)


def whole(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the whole model gives to its output projection."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_blocks_in_sequence_equal_the_whole_model(name: str, tied: bool, shards: int, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "m", tied=tied, shards=shards)))
    found = anatomy(source)
    tokens = torch.randint(2, 240, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=LENGTH)
    expected = whole(tiny.make(name, tied=tied), tokens)
    assert torch.equal(stream(bones, len(found.blocks), tokens), expected)
    assert found.tied is tied


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_bfloat16_stream_equals_from_pretrained(name: str, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "m", tied=True)))
    found = anatomy(source)
    tokens = torch.randint(2, 240, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    bones = skeleton(source, found, dtype=torch.bfloat16, device="cpu", seqlen=LENGTH)
    got = stream(bones, len(found.blocks), tokens)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, whole(load_dense(source, dtype=torch.bfloat16), tokens))


EXPECTED = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_linears_that_share_an_input_are_one_group(name: str, tmp_path: Path) -> None:
    block = anatomy(open_source(str(tiny.save(name, tmp_path / "m")))).blocks[-1]
    assert [[v.name.rpartition(".")[2] for v in g.members] for g in block.groups] == EXPECTED[name]
    assert all(len({v.k for v in g.members}) == 1 for g in block.groups)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_views_are_the_matrices_that_the_modules_multiply_by(name: str, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "m")))
    found = anatomy(source)
    model = tiny.make(name)
    for block in found.blocks:
        for view in block.views:
            weight = source.view(view)
            assert weight.shape == (view.n, view.k)
            assert weight.dtype == torch.float32
            assert weight.is_contiguous()
            if view.index is None:
                linear = model.get_submodule(view.name)
                x = torch.randn(3, view.k)
                bias = linear.bias if view.bias else torch.zeros(view.n)
                torch.testing.assert_close(linear(x), x @ weight.T + bias)
            else:
                stack = model.get_parameter(view.param)
                assert torch.equal(stack[view.index], weight)


@pytest.mark.parametrize("name", tiny.MOE)
def test_every_expert_is_a_view_of_its_own(name: str, tmp_path: Path) -> None:
    experts = anatomy(open_source(str(tiny.save(name, tmp_path / "m")))).blocks[-1].experts
    names = [v.name.removeprefix("model.layers.1.mlp.experts.") for v in experts]
    assert names == [f"{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(3)]


def test_transposed_experts_are_seen_as_such(tmp_path: Path) -> None:
    small = {k: v for k, v in tiny._LLAMA.items() if k != "tie_word_embeddings"}
    layers = ["sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(**small, num_local_experts=3, num_experts_per_tok=2, layer_types=layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    view = anatomy(source).blocks[0].experts[0]
    assert (view.n, view.k, view.transposed) == (2 * 72, 40, True)
    assert torch.equal(source.view(view), model.get_parameter(view.param)[0].T)


def test_a_subclass_of_linear_counts_only_if_it_multiplies(tmp_path: Path) -> None:
    small = {k: v for k, v in tiny._LLAMA.items() if k != "head_dim"}
    config = transformers.PhimoeConfig(**small, num_local_experts=3, num_experts_per_tok=2)
    found = anatomy(open_source(saved(config, tmp_path / "phimoe")))
    linears = {v.name.rpartition(".")[2] for b in found.blocks for g in b.groups for v in g.members}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj"}  # the router returns three values
    config = transformers.FalconConfig(vocab_size=258, hidden_size=40, num_hidden_layers=1, num_attention_heads=4)
    found = anatomy(open_source(saved(config, tmp_path / "falcon")))
    assert len(found.blocks[0].views) == 4  # its own class of linears rounds otherwise, and is linear


class Sharp(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.round(), self.weight, self.bias)


class Scaled(nn.Linear):
    scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.scale


class Renamed(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight, bias=self.bias)


class Named(nn.Linear):
    """As it was."""


@pytest.mark.parametrize(("kind", "linear"), [(Sharp, False), (Scaled, False), (Renamed, True), (Named, True)])
def test_what_a_module_computes_makes_it_a_linear(kind: type[nn.Linear], linear: bool) -> None:
    assert is_linear(kind(8, 4, device="meta")) is linear


def test_put_writes_what_the_block_then_computes_with(tmp_path: Path) -> None:
    for name in ("gpt2", "mixtral"):
        source = open_source(str(tiny.save(name, tmp_path / name)))
        found = anatomy(source)
        bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=8)
        module = bones.block(1)
        for view in found.blocks[1].views:
            weight = torch.randn(view.n, view.k)
            bones.put(1, module, view, weight)
            if view.index is None:
                linear = bones.submodule(1, module, view)
                x = torch.randn(2, view.k)
                torch.testing.assert_close(linear(x), x @ weight.T + (linear.bias if view.bias else 0))
        hidden = torch.randn(1, 8, found.hidden)
        assert not torch.equal(bones.run(1, module, hidden), bones.run(1, bones.block(1), hidden))


def test_wrapper_lists_its_towers_and_keeps_all_parameters(tmp_path: Path) -> None:
    found = anatomy(open_source(str(tiny.save("gemma3-wrapper", tmp_path / "m", tied=True))))
    assert found.towers == ("model.vision_tower", "model.multi_modal_projector")
    assert set(found.parameters) == {n for n, _ in tiny.make("gemma3-wrapper", tied=True).named_parameters()}
    assert all(b.name.startswith("model.language_model.layers.") for b in found.blocks)


def test_anatomy_says_what_there_is(tmp_path: Path) -> None:
    found = anatomy(open_source(str(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16))))
    assert (found.architecture, found.model_type, found.tied) == ("LlamaForCausalLM", "llama", False)
    assert (found.vocab, found.hidden, found.context) == (tiny.VOCAB, 40, tiny.CONTEXT)
    assert found.cache_width == 2 * 2 * 2 * 8  # keys and values, two layers, two heads of eight
    assert found.head is not None
    assert (found.head.name, found.head.param, found.head.n, found.head.k) == ("lm_head", "lm_head.weight", 258, 40)
    assert found.parameters["model.norm.weight"] == (torch.bfloat16, (40,))


def test_layers_may_differ_in_what_they_keep_of_a_token(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "gemma4_unified_text", **{**tiny._GEMMA, "head_dim": 16}, global_head_dim=32
    )
    found = anatomy(open_source(saved(config, tmp_path)))
    assert found.cache_width == 2 * 2 * (16 + 32)


def test_a_config_that_says_its_heads_in_another_way_stops_no_plan() -> None:
    config = transformers.PretrainedConfig(num_hidden_layers=2, hidden_size=40, num_attention_heads=[2, 1])
    assert _cache_width(config) == 0
    assert _cache_width(transformers.PretrainedConfig()) == 0


def test_matrices_that_are_no_views_are_listed(tmp_path: Path) -> None:
    config = transformers.DbrxConfig(
        vocab_size=258, d_model=40, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
    )  # fmt: skip
    found = anatomy(open_source(saved(config, tmp_path / "dbrx")))
    stacks = [f"transformer.blocks.{i}.ffn.experts.mlp.{w}" for i in range(2) for w in ("w1", "v1", "w2")]
    assert list(found.unseen) == stacks
    assert all(found.parameters[name][1] == (2 * 24, 40) for name in found.unseen)
    assert anatomy(open_source(str(tiny.save("llama", tmp_path / "llama")))).unseen == ()
    mixture = anatomy(open_source(str(tiny.save("mixtral", tmp_path / "mixtral")))).unseen
    assert mixture == ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")


def test_tied_head_is_held_by_the_embedding(tmp_path: Path) -> None:
    found = anatomy(open_source(str(tiny.save("gpt2", tmp_path / "m", tied=True))))
    assert found.embedding == "transformer.wte.weight"
    assert found.head is not None
    assert found.head.param == found.embedding
    assert "lm_head.weight" not in found.parameters


def saved(config: transformers.PretrainedConfig, folder: Path, cls: type = transformers.AutoModelForCausalLM) -> str:
    cls.from_config(config).save_pretrained(folder)
    return str(folder)


def test_input_that_depends_on_tokens_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma3nTextConfig(
        **tiny._LLAMA, vocab_size_per_layer_input=258, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    with pytest.raises(PlanError, match="block 0 takes a second input computed from the tokens"):
        anatomy(open_source(saved(config, tmp_path)))


def test_blocks_of_several_classes_are_refused_by_name(tmp_path: Path) -> None:
    small = {k: v for k, v in tiny._LLAMA.items() if k != "head_dim"}
    config = transformers.JambaConfig(
        **small, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False, num_experts=2
    )
    with pytest.raises(PlanError, match=r"model\.layers\.\* are of several classes \(JambaAttention"):
        anatomy(open_source(saved(config, tmp_path)))


def test_experts_of_unknown_orientation_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(**tiny._LLAMA, num_local_experts=2, intermediate_size_mlp=40)
    with pytest.raises(PlanError, match=r"feed_forward\.experts\.gate_up_proj: a parameter \[2, 40, 144\]"):
        anatomy(open_source(saved(config, tmp_path)))


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=258, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(PlanError, match="T5ForConditionalGeneration is an encoder-decoder"):
        anatomy(open_source(saved(config, tmp_path, transformers.AutoModelForSeq2SeqLM)))


@pytest.mark.parametrize("kind", ["FalconConfig", "GPTJConfig", "OlmoConfig"])
def test_unlisted_decoder_of_the_usual_shape_works_too(kind: str, tmp_path: Path) -> None:
    small = {"vocab_size": 258, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"GPTJConfig": {"rotary_dim": 4, "n_positions": 128}, "OlmoConfig": {"intermediate_size": 72}}
    config = getattr(transformers, kind)(**small, **extra.get(kind, {}), bos_token_id=0, eos_token_id=1)
    source = open_source(saved(config, tmp_path))
    found = anatomy(source)
    tokens = torch.randint(2, 240, (2, LENGTH))
    bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=LENGTH)
    assert torch.equal(stream(bones, 2, tokens), whole(load_dense(source, dtype=torch.float32), tokens))


_BERT = {
    "vocab_size": 258, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "is_decoder": True,
}  # fmt: skip
BETWEEN: dict[str, transformers.PretrainedConfig] = {
    "BERT": transformers.BertConfig(**_BERT),
    "ELECTRA": transformers.ElectraConfig(**_BERT, embedding_size=40),
    "RemBERT": transformers.RemBertConfig(**_BERT, input_embedding_size=40, output_embedding_size=48),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_text_runs_through_between_decoder_and_head_is_no_tower(name: str, tmp_path: Path) -> None:
    source = open_source(saved(BETWEEN[name], tmp_path))
    found = anatomy(source)
    assert found.towers == ()
    tokens = torch.randint(2, 240, (2, LENGTH))
    bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=LENGTH)
    assert torch.equal(stream(bones, 2, tokens), whole(load_dense(source, dtype=torch.float32), tokens))


def bamba(folder: Path) -> str:
    small = {k: v for k, v in tiny._LLAMA.items() if k != "head_dim"}
    config = transformers.BambaConfig(
        **small, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=10, mamba_d_state=8, mamba_n_groups=1,
        mamba_expand=2, mamba_chunk_size=16,
    )  # fmt: skip
    return saved(config, folder)


def test_blocks_that_return_two_values_are_streamed(tmp_path: Path) -> None:
    source = open_source(bamba(tmp_path))
    tokens = torch.randint(2, 240, (2, LENGTH))
    bones = skeleton(source, anatomy(source), dtype=torch.float32, device="cpu", seqlen=LENGTH)
    assert torch.equal(stream(bones, 2, tokens), whole(load_dense(source, dtype=torch.float32), tokens))


def test_the_obstacle_is_told_of_and_not_the_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_ENTRIES", (0, 1))
    with pytest.raises(PlanError, match=r"with its blocks replaced \(ValueError: not enough values to unpack"):
        anatomy(open_source(bamba(tmp_path)))


BATCHED = {
    "BloomConfig": {"hidden_size": 40, "n_layer": 2, "n_head": 4},  # alibi [batch * heads, 1, length]
    "XGLMConfig": {"d_model": 40, "ffn_dim": 72, "num_layers": 2, "attention_heads": 4},  # checks its mask's batch
}


@pytest.mark.parametrize("kind", BATCHED)
def test_input_that_has_an_entry_for_each_sequence_is_made_for_each_batch(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, kind)(vocab_size=258, bos_token_id=0, eos_token_id=1, **BATCHED[kind])
    source = open_source(saved(config, tmp_path))
    found = anatomy(source)
    bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=LENGTH)
    dense = load_dense(source, dtype=torch.float32)
    for count in (3, 2):
        tokens = torch.randint(2, 240, (count, LENGTH))
        hidden = bones.embed(tokens)
        if count == 2:
            bones.forget_embedding()  # the calls for this batch are recorded without it
        for i in range(2):
            hidden = bones.run(i, bones.block(i), hidden)
        assert torch.equal(bones.finish(hidden), whole(dense, tokens))


def test_model_without_its_embedding_still_finishes(tmp_path: Path) -> None:
    source = open_source(str(tiny.save("gemma2", tmp_path / "m", tied=True)))
    found = anatomy(source)
    tokens = torch.randint(2, 240, (2, LENGTH))
    bones = skeleton(source, found, dtype=torch.float32, device="cpu", seqlen=LENGTH)
    expected = stream(bones, 2, tokens)
    hidden = bones.embed(tokens)
    bones.forget_embedding()
    weight = bones._model.get_input_embeddings().weight
    assert weight.untyped_storage().nbytes() == weight.shape[0] * 4
    for i in range(2):
        hidden = bones.run(i, bones.block(i), hidden)
    assert torch.equal(bones.finish(hidden), expected)


def test_sequence_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    source = open_source(str(tiny.save("llama", tmp_path / "m")))
    with pytest.raises(PlanError, match="--seqlen 129 is longer than the context"):
        skeleton(source, anatomy(source), dtype=torch.float32, device="cpu", seqlen=129)


def test_only_what_lies_outside_the_blocks_is_in_memory(tmp_path: Path) -> None:
    source = open_source(str(tiny.save("gemma3-wrapper", tmp_path / "m")))
    bones = skeleton(source, anatomy(source), dtype=torch.float32, device="cpu", seqlen=8)
    real = {n for n, p in bones._model.named_parameters() if p.device.type != "meta"}
    assert real == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    assert chain_module.find_blocks(bones._model)[0] == "model.language_model.layers"
