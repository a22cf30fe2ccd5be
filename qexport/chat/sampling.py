"""Which token comes next: the settings of a checkpoint or a user, and how they choose from logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CheckpointError, UsageError

ANSWER = 512  # tokens of an answer at most, where neither checkpoint nor user says
_TOP_K = 50  # what transformers takes where a checkpoint does not say
_FIRST = 256  # tokens that are looked at for `top_p` before all are sorted
_OTHERS = {  # what a generation config may ask for beside these settings, and the value that asks for nothing
    "num_beams": 1, "min_p": None, "typical_p": 1.0, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "penalty_alpha": None,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; others divide the logits.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only so many of the likeliest tokens; 0 for all.
        repetition_penalty: of tokens that were read or written before; 1 for none. Keskar et al., arXiv:1909.05858.
        max_new_tokens: of an answer.
        seed: of what is random; None for another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = _TOP_K
    repetition_penalty: float = 1.0
    max_new_tokens: int = ANSWER
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0; 1 is none"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 on, or none"),
        ):
            if not fits:
                raise UsageError(f"{name} {getattr(self, name)}: expected {expected}.")


NAMES = tuple(field.name for field in fields(Settings))


def settings_of(config: Any) -> Settings:
    """Those of a model's generation config of transformers; what it leaves unsaid is as in its `generate`."""
    found = {name: getattr(config, name, None) for name in NAMES if name != "seed"}
    if not getattr(config, "do_sample", None):
        found["temperature"] = 0.0
    elif found["temperature"] is None:
        found["temperature"] = 1.0
    return Settings(**{name: value for name, value in found.items() if value is not None})


def unheeded(config: Any) -> Sequence[str]:
    """What a generation config asks for that isn't among the settings."""
    return [name for name, nothing in _OTHERS.items() if getattr(config, name, None) not in (None, nothing)]


def changed(settings: Settings, name: str, text: str) -> Settings:
    """With another value, as typed; raises `UsageError`."""
    if name not in NAMES:
        raise UsageError(f"there is no setting {name!r}; there are {', '.join(NAMES)}.")
    whole = name in ("top_k", "max_new_tokens", "seed")
    try:
        value: Any = None if (name, text) == ("seed", "none") else int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"{name} {text!r}: expected a {'whole ' * whole}number.") from None
    return replace(settings, **{name: value})


def next_token(logits: Tensor, before: Sequence[int], settings: Settings, random: torch.Generator) -> int:
    """Choose from logits [vocabulary].

    Args:
        logits: of the last position, in any dtype.
        before: all tokens before it, for the penalty.
        settings: how.
        random: on the logits' device.

    Raises:
        CheckpointError: a logit is NaN, or all are infinite.
    """
    logits = logits.float()
    if not torch.isfinite(logits.max()):
        raise CheckpointError("the model's predictions are not finite. `qexport verify DIR` checks the files.")
    if settings.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(before)), device=logits.device)
        own, penalty = logits[seen], settings.repetition_penalty
        logits = logits.index_put((seen,), torch.where(own < 0, own * penalty, own / penalty))
    if settings.temperature == 0:
        return int(logits.argmax())
    likely, tokens = _likeliest(logits / settings.temperature, settings)
    return int(tokens[torch.multinomial(likely, 1, generator=random)])


def _likeliest(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Probabilities of those that `top_k` and `top_p` leave, and which tokens they are, the likeliest first.

    To sort a whole vocabulary takes as long as a small model's layers, so at first only some are.
    """
    size = logits.shape[0]
    count = min(settings.top_k or size, size)
    if count == size and settings.top_p == 1:
        return logits.softmax(-1), torch.arange(size, device=logits.device)
    whole = None if count < size else logits.softmax(-1)  # `top_p` is a part of what `top_k` leaves
    for some in sorted({min(_FIRST, count), count}):
        values, tokens = logits.topk(some)
        likely = values.softmax(-1) if whole is None else whole[tokens]
        if some == count or (whole is not None and likely.sum() >= settings.top_p):
            break
    keep = likely.cumsum(-1) - likely < settings.top_p  # the first one always
    return likely[keep], tokens[keep]
