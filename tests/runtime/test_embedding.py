"""Packed embeddings: equal to dense ones bit for bit, and no more is decoded than the rows that are asked for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qexport.formats.specs import LinearSpec, make_format
from qexport.runtime import embedding as runtime
from qexport.runtime.decoding import decoded_rows
from qexport.runtime.embedding import QuantEmbedding
from qexport.runtime.packed import Budget
from tests import packing

N, K = 301, 50
SPECS = {
    "uniform": packing.UNIFORM,
    "one group a row": LinearSpec(make_format("uniform", {"group_size": -1, "symmetric": True})),
    "scaled": packing.SCALED,
    "spqr": packing.SPQR,
    "dense": packing.DENSE,
}


def plain() -> nn.Embedding:
    return nn.Embedding(N, K, padding_idx=N - 1)


def scaled() -> nn.Embedding:
    return Gemma3TextScaledWordEmbedding(N, K, N - 1, embed_scale=K**0.5)


def make(spec: LinearSpec, own: nn.Embedding, **options: Any) -> tuple[QuantEmbedding, nn.Embedding]:
    """A packed embedding with contents, and the dense one that it stands for."""
    found = packing.pack_weight(torch.randn(N, K), spec)
    module = QuantEmbedding(spec, own, dtype=torch.float32, extents=found.extents, device="cpu", **options)
    module.load_state_dict(dict(found.tensors))
    dense = copy.deepcopy(own).requires_grad_(False)
    dense.weight.data.copy_(found.decoded)
    return module, dense


def ids(*shape: int) -> Tensor:
    return torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("own", [plain, scaled])
def test_rows_equal_those_of_the_decoded_table_bit_for_bit(own: Any, spec: LinearSpec, dtype: torch.dtype) -> None:
    module, dense = make(spec, own())
    module.to(dtype)
    dense.to(dtype)
    for asked in (ids(3, 7), ids(1), ids(2, 0), torch.tensor(N - 1), torch.arange(N), torch.tensor([[0, 0, N - 1]])):
        found = module(asked)
        assert found.dtype == dtype
        assert torch.equal(found, dense(asked))
    if "weight" not in module.packed:
        assert torch.equal(module.weight, dense.weight)
    assert torch.equal(module.dense(dtype)(ids(4, 4)), dense(ids(4, 4)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_decoded_rows_are_a_cut_of_the_decoded_table(spec: LinearSpec) -> None:
    found = packing.pack_weight(torch.randn(N, K), spec)
    step = spec.weight.shard_multiple["n"]
    for rows in ((0, N), (step, 3 * step), (2 * step, N)):
        assert torch.equal(decoded_rows(spec, found.tensors, N, K, rows), found.decoded[slice(*rows)])


def test_only_the_blocks_of_the_rows_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dense = make(packing.UNIFORM, plain())
    seen: list[tuple[int, int]] = []

    def watched(spec: LinearSpec, tensors: Any, n: int, k: int, rows: tuple[int, int]) -> Tensor:
        seen.append(rows)
        return decoded_rows(spec, tensors, n, k, rows)

    monkeypatch.setattr(runtime, "decoded_rows", watched)
    asked = torch.tensor([[300, 5], [40, 5], [41, 200]])
    for joined, at_once, expected in (
        (0, 1 << 24, [(0, 64), (192, 224), (288, 301)]),
        (0, 32 * K, [(0, 32), (32, 64), (192, 224), (288, 301)]),
        (2 * 32 * K, 1 << 24, [(0, 64), (192, 301)]),
        (1 << 20, 1 << 24, [(0, 301)]),
    ):
        monkeypatch.setattr(runtime, "_JOINED", joined)
        monkeypatch.setattr(runtime, "_AT_ONCE", at_once)
        seen.clear()
        assert torch.equal(module(asked), dense(asked))
        assert seen == expected


def test_a_format_that_can_not_be_cut_is_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(packing.UNIFORM.weight), "shard_multiple", {"n": 0, "k": 0})
    monkeypatch.setattr(runtime, "decoded_rows", lambda spec, tensors, n, k, rows: spec.decoded(tensors, n, k))
    module, dense = make(packing.UNIFORM, plain())
    assert torch.equal(module(ids(2, 5)), dense(ids(2, 5)))


def test_the_table_is_kept_when_the_budget_allows_it() -> None:
    budget = Budget(4 * N * K + 10)
    module, dense = make(packing.UNIFORM, scaled(), budget=budget)
    assert torch.equal(module(ids(2, 5)), dense(ids(2, 5)))
    assert budget.left == 10
    assert torch.equal(module(ids(7)), dense(ids(7)))
    module.forget()
    assert budget.left == 4 * N * K + 10
    small = Budget(4 * N * K - 1)
    module, dense = make(packing.UNIFORM, plain(), budget=small)
    assert torch.equal(module(ids(2, 5)), dense(ids(2, 5)))
    assert small.left == 4 * N * K - 1


def test_ids_outside_of_the_table_are_an_index_error() -> None:
    module, _ = make(packing.UNIFORM, plain())
    for wrong in (-1, N):
        with pytest.raises(IndexError, match=f"expected ids from 0 to {N - 1}, found"):
            module(torch.tensor([3, wrong]))


def test_only_the_packed_tensors_are_in_the_state_dict_and_the_original_is_left_as_it_was() -> None:
    own = scaled()
    module, _ = make(packing.UNIFORM, own)
    assert set(module.state_dict()) == {"qweight", "scales", "qzeros"}
    assert [name for name, _ in own.named_parameters()] == ["weight"]
    twin = copy.deepcopy(module)
    assert torch.equal(twin(ids(3)), module(ids(3)))
    assert module(torch.empty(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, K)
