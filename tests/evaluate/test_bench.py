"""A packed checkpoint beside dense models: the dense side is the same function, and the figures are what they say."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.errors import CheckpointError, UsageError
from qexport.evaluate import bench as b
from qexport.evaluate import latency
from qexport.evaluate.bench import Setting, Times, bench, eager, noted, weight_bytes
from qexport.evaluate.latency import Clock
from qexport.evaluate.record import read_results
from qexport.events import Advanced, Started
from qexport.integrations.transformers import load_model
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import quantized
from tests import finished, tiny
from tests.packing import pack_model

SHORT = Setting(prompt=20, tokens=3, compiled=False)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_TRYING", 0.01)
    monkeypatch.setattr(b, "INSIDE", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("bench") / "tiny")


def test_the_dense_side_is_the_same_function(folder: Path) -> None:
    packed = load_model(str(folder), dtype=torch.float32, backend="reference")
    ids = torch.arange(2, 60)[None]
    for dtype in (torch.float32, torch.bfloat16):
        dense = b._dense(folder, None, dtype, SHORT).model
        assert not quantized(dense)
        assert {p.dtype for p in dense.parameters()} == {dtype}
    dense = b._dense(folder, None, torch.float32, SHORT).model
    with torch.inference_mode():
        assert torch.equal(dense(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral"])
def test_other_architectures_have_their_dense_side(name: str, tmp_path: Path) -> None:
    pack_model(tiny.make(name), tmp_path / "packed")
    tiny.tokenizer().save_pretrained(tmp_path / "packed")
    found = bench(tmp_path / "packed", replace(SHORT, backend="reference"))
    assert found["dense"]["fp32"]["logits_difference"] == 0.0
    assert all(line["dense_us"]["fp16"] > 0 for line in found["linears"])


def test_the_fastest_loop_is_named_and_beside_dense_ones(folder: Path) -> None:
    found = bench(folder, replace(SHORT, compiled=True))["fastest_loop"]
    assert found["path"].startswith(("compiled", "eager"))
    assert " ms a token compiled" in found["path"] or "can't be compiled" in found["path"]
    assert found["decode_ms"] > 0
    assert set(found["dense_ratio"]) == {"fp32", "bf16", "fp16"}
    line = read_results(folder)[-1]
    assert (line["what"], line["name"], line["figure"]) == ("speed", "decode", 1e3 / found["decode_ms"])
    assert line["protocol"]["prompt"] == SHORT.prompt


def test_a_quantized_cache_is_not_compiled(folder: Path) -> None:
    found = bench(folder, replace(SHORT, kv="kivi-4bit", compiled=True))
    assert found["fastest_loop"]["path"] == "eager: a quantized cache can't be in a graph"
    assert found["fastest_loop"]["decode_ms"] == found["packed"]["decode_ms"]


def test_the_usual_loop_generates_greedily() -> None:
    model = tiny.make("llama")
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        run = eager(model, ids, b._own_cache(model)())
        found = [int(next(run).argmax()) for _ in range(6)]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert found == wanted[0, 10:].tolist()


def test_what_a_checkpoint_is_measured_as(folder: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    found = bench(folder, SHORT, threads=1, picture=tmp_path / "roof.png", observer=told.append)
    assert (found["loop"], found["threads"], found["dtype"], found["prompt"]) == ("eager", 1, "float32", 20)
    assert set(found["dense"]) == {"fp32", "bf16", "fp16"}
    for side in (found["packed"], *found["dense"].values()):
        assert 0 <= side["outside_share"] <= 1
        assert side["tokens_per_second"] == pytest.approx(1e3 / side["decode_ms"])
        assert side["prefill_ms"] > 0
    assert found["dense"]["fp32"]["logits_difference"] < 1e-4
    assert found["dense"]["fp32"]["weight_bytes"] > 1.9 * found["dense"]["bf16"]["weight_bytes"]
    assert found["packed"]["weight_bytes"] < found["dense"]["fp32"]["weight_bytes"]
    assert found["packed"]["peak_rss_bytes"] <= found["peak_rss_bytes"]
    assert found["picture"] == str(tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    starts = [event for event in told if isinstance(event, Started)]
    assert [s.phase for s in starts] == ["packed, fp32", "packed, bf16", "packed, fp16"]
    assert [e.done for e in told if isinstance(e, Advanced)] == [*range(1, starts[0].total + 1)] * 3


def test_every_linear_has_its_line(folder: Path) -> None:
    found = bench(folder, SHORT)
    model = load_model(str(folder), dtype=torch.float32)
    packed = quantized(model)
    lines = {line["kind"]: line for line in found["linears"]}
    assert len(lines) == len(found["linears"]) == 8  # seven in a layer, and the head
    head = lines.pop("lm_head")
    assert (head["count"], head["format"], head["path"], head["in_layers"]) == (1, None, "torch", False)
    assert head["bytes"] == head["n"] * head["k"] * 4
    assert sum(line["count"] for line in lines.values()) == len(packed) == 14
    assert sum(line["count"] * line["bytes"] for line in lines.values()) == sum(
        t.nbytes for module in packed.values() for t in module.packed.values()
    )
    for line in found["linears"]:
        assert line["in_layers"] == (line["kind"] != "lm_head")
        assert line["packed_us"] > 0
        assert all(us > 0 for us in line["dense_us"].values())
        assert line["gbps"] == pytest.approx(line["bytes"] / line["packed_us"] / 1e3)
        assert line["bandwidth_fraction"] == pytest.approx(line["gbps"] / found["roofs"]["read_gbps"])
    own = {m.choice.path for m in packed.values() if isinstance(m, QuantLinear)}
    assert set(found["paths"]) == own | {"torch"}
    assert sum(found["paths"].values()) == 15


def test_another_loop_is_measured_in_place_of_the_usual_one(folder: Path) -> None:
    calls: list[int] = []

    def counting(model: Any, ids: Tensor, cache: Any) -> Iterator[Tensor]:
        for logits in eager(model, ids, cache):
            calls.append(ids.shape[1])
            yield logits

    found = bench(folder, replace(SHORT, loop=counting))
    assert found["loop"] == "counting"
    # Of each pair of sides: the dense one's first 3 tokens, prompts of both, and 3 tokens of both; and 3 of the packed.
    assert len(calls) == 3 + 3 * (3 + 2 * b.PREFILLS + 2 * 3)
    assert 0 <= found["packed"]["outside_share"] <= 1


def test_tokens_are_read_through_a_quantized_cache(folder: Path) -> None:
    options = {"residual_window": 0}
    found = bench(folder, replace(SHORT, prompt=64, kv="kivi-2bit", kv_options=options))["kv"]
    assert (found["name"], found["options"]["residual_window"], found["tokens"]) == ("kivi-2bit", 0, 65)
    assert found["bytes"] < found["fp16_bytes"]
    assert found["path"]
    assert bench(folder, replace(SHORT, kv="none"))["kv"] is None


def test_another_dense_model_can_be_named(folder: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "original")
    found = bench(folder, replace(SHORT, against=str(other)))
    assert found["against"] == str(other)
    assert found["dense"]["fp32"]["logits_difference"] > 1e-3
    foreign = tiny.save("gpt2", tmp_path / "other")
    lines = bench(folder, replace(SHORT, against=str(foreign)))["linears"]
    named = {line["kind"]: line["dense_us"]["fp32"] for line in lines}
    assert named["model.layers.*.self_attn.q_proj"] is None
    assert named["lm_head"] > 0


def test_the_prompt_fits_the_context(folder: Path) -> None:
    found = bench(folder, Setting(tokens=3, compiled=False))
    assert found["prompt"] == tiny.CONTEXT - 3 - 2
    with pytest.raises(UsageError, match=r"--prompt 124 --tokens 3: with 2 more tokens, .* context of 128"):
        bench(folder, Setting(prompt=124, tokens=3))


def test_what_is_wrong_is_said_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="found a model that is not packed"):
        bench(dense, SHORT)
    with pytest.raises(CheckpointError, match="can't be read"):
        bench(tmp_path / "nowhere", SHORT)
    with pytest.raises(UsageError, match="there is no folder"):
        bench(folder, SHORT, picture=tmp_path / "nowhere" / "roof.png")
    with pytest.raises(UsageError, match="--dtype 'int8': expected float32"):
        Setting(dtype="int8")


def test_times_within_linears_leave_the_model_as_it_was() -> None:
    model = tiny.make("llama")
    linears = b._linears_of(model)
    assert len(linears) == 15
    linears["lm_head"].forward = own = lambda x: x.new_zeros(1)  # type: ignore[method-assign,assignment]
    with torch.inference_mode(), noted(linears, Clock(cuda=False)) as calls:
        assert model(torch.arange(2, 6)[None]).logits.shape == (1,)
    assert {name: len(spans) for name, spans in calls.items()} == dict.fromkeys(linears, 1)
    assert all(start <= end for spans in calls.values() for start, end in spans)
    assert linears.pop("lm_head").forward is own
    assert not any("forward" in vars(module) for module in linears.values())


def test_shares_and_medians() -> None:
    a = Times([1.0], [0.1, 0.3], [1.0], {"layers.0.q": [0.2], "lm_head": [0.5]})
    c = a + Times([3.0], [0.2], [1.0], {"layers.0.q": [0.4], "layers.1.q": [0.4]})
    assert c.inside == {"layers.0.q": [0.2, 0.4], "lm_head": [0.5], "layers.1.q": [0.4]}
    assert c.figures() == pytest.approx(
        {"prefill_ms": 2000, "decode_ms": 200, "tokens_per_second": 5, "outside_share": 0.5}
    )


def test_a_shared_tensor_counts_once() -> None:
    tied, apart = tiny.make("llama", tied=True), tiny.make("llama")
    assert weight_bytes(apart) - weight_bytes(tied) == tiny.VOCAB * 40 * 4
