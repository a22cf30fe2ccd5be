"""Fidelity agrees with its definitions, is paired, and its errors are honest."""

import json
from math import log
from typing import Any

import pytest
import torch

from qexport.errors import CheckpointError, UsageError
from qexport.evaluate.fidelity import RUN, compare, divergence, fidelity, mean_and_error, summary
from qexport.evaluate.original import Original
from qexport.evaluate.perplexity import perplexity
from qexport.evaluate.windows import cut
from tests import tiny


def text(length: int) -> torch.Tensor:
    return torch.randint(2, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny.make("llama")


@pytest.fixture(scope="module")
def model() -> Any:
    out = tiny.make("llama")
    with torch.no_grad():
        for i, p in enumerate(out.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.02)
    return out


def test_model_against_itself_is_perfect(original: Any) -> None:
    found = fidelity(original, original, [cut("t", text(200), seqlen=100)])
    assert found["kl"] == {"mean": 0, "se": 0, "median": 0, "p99": 0, "max": 0}
    assert found["top1"] == {"value": 1, "se": 0}
    assert found["ln_ppl_ratio"] == {"value": 0, "se": 0}
    assert found["tokens"] == 198


def test_figures_follow_their_definitions(model: Any, original: Any) -> None:
    tokens = text(100)
    found = fidelity(model, original, [cut("t", tokens, seqlen=50)])
    kl, agree, ratio = [], [], []
    for part in (tokens[:50], tokens[50:]):
        with torch.no_grad():
            p, q = (m(part[None]).logits[0, :-1].double().log_softmax(-1) for m in (original, model))
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
        ratio.append((p - q)[torch.arange(49), part[1:]])
    k = torch.cat(kl)
    assert found["kl"]["mean"] == pytest.approx(k.mean().item(), rel=1e-3)
    assert found["kl"]["median"] == pytest.approx(k.quantile(0.5).item(), rel=1e-3)
    assert found["kl"]["p99"] == pytest.approx(k.quantile(0.99).item(), rel=1e-3)
    assert found["kl"]["max"] == pytest.approx(k.max().item(), rel=1e-3)
    assert found["top1"]["value"] == pytest.approx(torch.cat(agree).mean().item())
    assert found["ln_ppl_ratio"]["value"] == pytest.approx(torch.cat(ratio).mean().item(), abs=1e-6)
    assert all(found[key]["se"] > 0 for key in ("kl", "top1", "ln_ppl_ratio"))
    json.dumps(found, allow_nan=False)


def test_perplexities_come_from_the_same_pass(model: Any, original: Any) -> None:
    windows = [cut("a", text(120), seqlen=40, stride=30), cut("b", text(90), seqlen=40)]
    pairs = compare(model, Original(lambda: original), windows)
    for pair, alone, reference in zip(pairs, perplexity(model, windows), perplexity(original, windows), strict=True):
        assert pair.perplexity.value == pytest.approx(alone.value, rel=1e-6)
        assert pair.perplexity.losses == pytest.approx(alone.losses, rel=1e-5)
        assert pair.original_perplexity.value == pytest.approx(reference.value, rel=1e-6)
    one = summary(pairs[:1])
    own = pairs[0]
    assert one["ln_ppl_ratio"]["value"] == pytest.approx(
        log(own.perplexity.value / own.original_perplexity.value), abs=1e-6
    )
    assert summary(pairs)["tokens"] == sum(w.tokens for w in windows)


def test_direction_is_original_to_model() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    kl, agree, own, theirs = divergence(q, p, torch.tensor([1]))
    assert kl.item() == pytest.approx(0.9 * log(1.8) + 0.1 * log(0.2), rel=1e-5)
    assert (own.item(), theirs.item()) == (pytest.approx(log(2)), pytest.approx(log(10)))
    assert agree.shape == (1,)


def test_tokens_that_both_rule_out_do_not_count() -> None:
    logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    kl, _, own, _ = divergence(logits, logits, torch.tensor([0]))
    assert kl.item() == 0
    assert torch.isfinite(own).all()


def test_error_equals_the_usual_one_for_independent_runs() -> None:
    """Over many samples, the estimate matches the spread of the mean, also where neighbours are alike."""
    rng = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(200):
        runs = torch.randn(20, 1, generator=rng).expand(-1, RUN)
        mean, error = mean_and_error(runs.flatten() + 0.1 * torch.randn(20 * RUN, generator=rng), [10 * RUN, 10 * RUN])
        means.append(mean)
        errors.append(error)
    spread = torch.tensor(means).std().item()
    assert sum(e for e in errors if e is not None) / 200 == pytest.approx(spread, rel=0.12)


def test_error_of_equal_runs_is_that_of_their_means() -> None:
    values = torch.randn(6 * RUN, generator=torch.Generator().manual_seed(1))
    mean, error = mean_and_error(values, [3 * RUN, 3 * RUN])
    runs = values.double().reshape(6, RUN).mean(1)
    assert mean == pytest.approx(values.mean().item(), abs=1e-7)
    assert error == pytest.approx((runs.std() / 6**0.5).item())


def test_one_run_has_no_error() -> None:
    assert mean_and_error(torch.ones(RUN), [RUN]) == (1, None)
    assert mean_and_error(torch.ones(RUN), [RUN // 2, RUN // 2]) == (1, 0)  # runs do not cross windows


def test_other_vocabulary_is_refused(original: Any) -> None:
    other = tiny.make("llama")
    other.resize_token_embeddings(tiny.VOCAB + 6)
    with pytest.raises(UsageError, match=f"vocabulary of {tiny.VOCAB} tokens, found {tiny.VOCAB + 6}"):
        fidelity(original, other, [cut("t", text(50), seqlen=50)])


def test_broken_model_is_an_error(original: Any) -> None:
    broken = tiny.make("llama")
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite"):
        fidelity(broken, original, [cut("t", text(50), seqlen=50)])
