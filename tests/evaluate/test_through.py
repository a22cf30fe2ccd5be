"""Evaluation through a quantized cache: what queries read is packed, and a result says how much of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qexport.errors import UsageError
from qexport.evaluate.record import read_results
from qexport.evaluate.run import evaluate
from qexport.evaluate.through import Through
from qexport.formats.kv.kivi import Kivi
from tests import finished, tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save("llama", tmp_path_factory.mktemp("dense") / "tiny")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_with_nothing_packed_logits_are_the_models_own(model: Any) -> None:
    ids = torch.randint(2, 250, (2, 75))
    own = model(input_ids=ids, use_cache=False).logits
    through = Through(model, Kivi(4, 32, 4096), {})
    assert torch.allclose(through.logits(ids, 70), own[:, -70:], atol=1e-5)
    assert through.reads == 2 * 2 * 75 * 76 // 2
    assert through.packed_reads == 0
    with pytest.raises(UsageError, match="no key that a query read was quantized: expected texts longer than the 4096"):
        through.to_json()


def test_it_is_what_decoding_a_group_at_a_time_gives(model: Any) -> None:
    ids = torch.randint(2, 250, (1, 75))
    through = Through(model, Kivi(2, 8, 0), {})
    found = through.logits(ids, 75)
    cache, parts = through.cache(), []
    for part in ids.split(8, 1):
        parts.append(model(input_ids=part, past_key_values=cache).logits)
    assert torch.equal(found, torch.cat(parts, 1))
    assert through.to_json()["quantized_read_fraction"] == cache.quantized_read_fraction > 0.9


def test_the_document_says_what_was_read_through(packed: Path, text: Path) -> None:
    (packed / "results.jsonl").unlink(missing_ok=True)
    plain = evaluate(packed, texts=[text], seqlen=128, windows=2)
    found = evaluate(
        packed, texts=[text], seqlen=128, windows=2, against=packed, kv="kivi-2bit", kv_options={"residual_window": "0"}
    )
    kv = found["kv"]
    assert "kv" not in plain
    assert kv["name"] == "kivi-2bit"
    assert kv["options"]["residual_window"] == 0
    assert kv["chunk"] == 32
    assert kv["tokens"] == 128
    assert kv["quantized_read_fraction"] == 1
    assert 0 < kv["bytes"] <= kv["capacity_bytes"] <= 1.3 * kv["bytes"]
    assert kv["fp16_bytes"] == 2 * 2 * 2 * 2 * 8 * 128  # layers, sides, bytes, heads, dim, tokens
    assert found["fidelity"]["kl"]["mean"] > 0
    assert read_results(packed)[-1]["details"]["kv"] == kv


def test_none_is_the_models_own_cache(packed: Path, text: Path) -> None:
    plain = evaluate(packed, texts=[text], seqlen=64, windows=1)
    assert evaluate(packed, texts=[text], seqlen=64, windows=1, kv="none")["perplexity"] == plain["perplexity"]
    with pytest.raises(UsageError, match="names no cache for residual_window to change"):
        evaluate(packed, texts=[text], kv_options={"residual_window": 0})
    with pytest.raises(UsageError, match="'none' takes no options"):
        evaluate(packed, texts=[text], kv="none", kv_options={"residual_window": 0})


def test_a_window_that_holds_everything_is_an_error(packed: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="Use a longer --seqlen, or -s kv.residual_window=0"):
        evaluate(packed, texts=[text], seqlen=64, kv="kivi-4bit")
