"""Folds: scaling a producer and its consumers leaves the whole model as it was, in every architecture."""

from pathlib import Path

import pytest
import torch

from qexport.models import anatomy, find_folds, load_dense, open_source
from tests import tiny

ALL = ("q_proj", "o_proj", "gate_proj", "down_proj")
EXPECTED = {
    "llama": ALL, "mistral": ALL, "qwen2": ALL, "qwen3": ALL, "gemma2": ALL, "gemma3": ALL, "gemma3-wrapper": ALL,
    "phi3": ("qkv_proj", "gate_up_proj"), "opt": ("q_proj", "out_proj", "fc1", "fc2"), "gpt2": ("c_attn", "c_fc"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"), "mixtral": ("q_proj", "o_proj"), "qwen3_moe": ALL,
}  # fmt: skip


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_is_found_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "model")))
    described = anatomy(source)
    folds = find_folds(source, described)
    first = described.blocks[0]
    assert {path.rpartition(".")[2] for path in folds if path.startswith(first.name + ".")} == set(EXPECTED[name])

    model = load_dense(source, dtype=torch.float32)
    for module in model.modules():  # gains and biases of 1 and 0 would hide mistakes
        for key, param in module.named_parameters(recurse=False):
            if param.ndim == 1:
                param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(key))))
    ids = torch.arange(24).view(2, 12) * 5 % tiny.VOCAB
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rng = torch.Generator().manual_seed(0)
        groups = {g.members[0].name: g for b in described.blocks for g in b.groups}
        for path, fold in folds.items():
            factors = torch.rand(int(fold.features.max()) + 1, generator=rng) + 0.5
            producer = model.get_submodule(fold.producer)
            if not fold.linear:
                producer.weight.copy_((producer.weight + fold.unit) / factors - fold.unit)
            else:
                producer.weight.div_(factors[:, None])
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(factors)
            for view in groups[path].members:
                weight, across = model.get_submodule(view.name).weight, factors[fold.features]
                weight.mul_(across[:, None] if view.transposed else across)
        after = model(input_ids=ids).logits
    assert folds
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_query_heads_that_share_a_value_head_share_its_features(tmp_path: Path) -> None:
    source = open_source(str(tiny.save("llama", tmp_path / "model")))
    text = source.config
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    assert shared < heads
    folds = find_folds(source, anatomy(source))
    features = folds["model.layers.0.self_attn.o_proj"].features
    width = features.numel() // heads
    wanted = torch.arange(shared * width).view(shared, 1, width).expand(-1, heads // shared, -1).flatten()
    assert torch.equal(features, wanted)
