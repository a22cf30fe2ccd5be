"""Choosing tokens: what transformers would choose from, and what a setting may be."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from qexport.chat import sampling
from qexport.chat.sampling import Settings, changed, next_token, settings_of, unheeded
from qexport.errors import CheckpointError, UsageError


def logits(size: int = 1000, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def expected(values: Tensor, before: list[int], settings: Settings) -> Tensor:
    """Probabilities by transformers' own processors, in the order of its `generate`."""
    ids, scores = torch.tensor([before]), values[None]
    scores = theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(ids, scores)
    scores = theirs.TemperatureLogitsWarper(settings.temperature)(ids, scores)
    if settings.top_k:
        scores = theirs.TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1:
        scores = theirs.TopPLogitsWarper(settings.top_p)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize("top_k", [0, 1, 40, 300, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.02])
def test_tokens_have_the_probabilities_that_transformers_gives_them(
    scale: float, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(0.8, top_p, top_k, 1.3)
    values, before = logits(scale=scale), [5, 5, 17, 900]
    found = torch.zeros(1000)

    def multinomial(likely: Tensor, count: int, generator: Any) -> Tensor:
        asked.append(likely)
        return torch.tensor([len(asked) - 1])

    asked: list[Tensor] = []
    monkeypatch.setattr(sampling.torch, "multinomial", multinomial)
    first = next_token(values, before, settings, torch.Generator())
    found[first] = asked[0][0]
    for place in range(1, len(asked[0])):
        found[next_token(values, before, settings, torch.Generator())] = asked[0][place]
    torch.testing.assert_close(found / found.sum(), expected(values, before, settings), rtol=1e-4, atol=1e-7)


def test_a_seed_repeats_and_temperature_0_is_greedy() -> None:
    values, settings = logits(), Settings(1.0)

    def drawn(seed: int) -> list[int]:
        random = torch.Generator().manual_seed(seed)
        return [next_token(values, [], settings, random) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert next_token(values, [], Settings(0.0, top_k=3), torch.Generator()) == int(values.argmax())
    best = int(values.argmax())
    assert next_token(values, [best], Settings(repetition_penalty=1e6), torch.Generator()) != best


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_an_error(value: float) -> None:
    values = logits()
    values[3] = value
    with pytest.raises(CheckpointError, match="not finite"):
        next_token(values, [], Settings(), torch.Generator())


def test_settings_are_the_checkpoints_and_what_it_leaves_unsaid_is_as_in_generate() -> None:
    assert settings_of(GenerationConfig()) == Settings(0.0, 1.0, 50, 1.0, 512)
    assert settings_of(GenerationConfig(do_sample=True)).temperature == 1.0
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=99)
    assert settings_of(config) == Settings(0.6, 0.9, 20, 1.0, 99)
    assert settings_of(GenerationConfig(do_sample=False, top_p=0.9)) == Settings(0.0, 0.9)
    assert unheeded(config) == []
    assert unheeded(GenerationConfig(num_beams=4, min_p=0.1, no_repeat_ngram_size=0)) == ["num_beams", "min_p"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "no setting 'temprature'; there are temperature, top_p"),
        ("temperature", "hot", "temperature 'hot': expected a number"),
        ("temperature", "-1", "temperature -1.0: expected 0"),
        ("temperature", "nan", "temperature nan: expected 0"),
        ("top_k", "1.5", "top_k '1.5': expected a whole number"),
        ("top_p", "0", "top_p 0.0: expected more than 0"),
        ("repetition_penalty", "0", "repetition_penalty 0.0: expected more than 0"),
        ("max_new_tokens", "0", "max_new_tokens 0: expected 1"),
        ("seed", "-1", "seed -1: expected a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(Settings(), name, text)


def test_a_setting_is_changed_as_typed() -> None:
    assert changed(Settings(), "temperature", "0.7") == Settings(0.7)
    assert changed(Settings(seed=4), "seed", "none") == Settings()
    assert changed(Settings(), "seed", "7").seed == 7
