"""Perplexity agrees with the definition, however windows, chunks and strides fall."""

import json
from math import exp
from typing import Any

import pytest
import torch

from qexport.errors import CheckpointError
from qexport.evaluate.perplexity import CHUNK, Perplexity, perplexity, token_losses
from qexport.evaluate.windows import cut
from tests import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make("llama")


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Negative log probability of ids[1:] given what stands before."""
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    return -logp[torch.arange(len(ids) - 1), ids[1:]]


def test_value_is_exp_of_mean_of_window_losses(model: Any) -> None:
    tokens = text(100)
    (found,) = perplexity(model, [cut("t", tokens, seqlen=32)])
    losses = [by_hand(model, tokens[i : i + 32]).mean().item() for i in (0, 32, 64)]
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.value == pytest.approx(exp(sum(losses) / 3), rel=1e-5)


def test_overlapping_windows_weigh_tokens_equally(model: Any) -> None:
    tokens = text(60)
    (found,) = perplexity(model, [cut("t", tokens, seqlen=24, stride=10)])
    first = by_hand(model, tokens[:24])
    rest = [by_hand(model, tokens[i : i + 24])[-10:] for i in (10, 20, 30)]
    assert found.value == pytest.approx(exp(torch.cat([first, *rest]).mean().item()), rel=1e-5)
    assert found.windows.tokens == 23 + 30


def test_bos_is_context_and_never_a_target(model: Any) -> None:
    tokens = text(31)
    (found,) = perplexity(model, [cut("t", tokens, seqlen=32, bos=0)])
    assert found.losses[0] == pytest.approx(
        by_hand(model, torch.cat([torch.tensor([0]), tokens])).mean().item(), rel=1e-5
    )


def test_chunks_do_not_change_losses() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2 * CHUNK + 7, 11, generator=rng), text(2 * CHUNK + 7) % 11
    whole = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_losses(logits, targets), whole)


def test_results_are_json_and_progress_is_told(model: Any) -> None:
    events: list[Any] = []
    found = perplexity(model, [cut("a", text(70), seqlen=32), cut("b", text(40), seqlen=32)], observer=events.append)
    data = json.loads(json.dumps(found[0].to_json()))
    assert sorted(data) == ["bos", "losses", "seqlen", "stride", "tokens", "value"]
    assert (data["tokens"], data["seqlen"], data["stride"], data["bos"], len(data["losses"])) == (62, 32, 32, False, 2)
    assert events[0].total == 3
    assert [event.done for event in events[1:]] == [1, 2, 3]


def test_half_precision_models_are_scored_in_float32(model: Any) -> None:
    windows = [cut("t", text(64), seqlen=32)]
    half = tiny.make("llama", dtype=torch.bfloat16)
    assert perplexity(half, windows)[0].value == pytest.approx(perplexity(model, windows)[0].value, rel=0.05)


def test_broken_model_is_an_error_not_a_nan() -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"t, window 0: 31 of 31 predictions are not finite.*qexport verify"):
        perplexity(model, [cut("t", text(64), seqlen=32)])


def test_absurd_losses_do_not_overflow() -> None:
    windows = cut("t", text(32), seqlen=32)
    assert Perplexity(windows, torch.full((31,), 5000.0)).value < float("inf")
