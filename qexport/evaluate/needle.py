"""A needle in a haystack: is a fact from far back in a long text still there when it is asked for?

A sentence with a number is put into a text at some depth, the text ends with the beginning of the same sentence, and
the model goes on greedily. The score is the part of the number's tokens that come out right before the first wrong one.
Texts, names and numbers are drawn from a seed, so that two models or caches are asked the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.calibration import encode
from qexport.errors import SourceError, UsageError
from qexport.evaluate.through import Through
from qexport.events import Advanced, Observer, Started, ignore
from qexport.formats.kv.base import chunk_of

PHASE = "needle"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NAMES = ("Alma", "Boris", "Clara", "Diego", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
_DIGITS = 6


@dataclass(frozen=True)
class Question:
    """One text with its needle.

    Attributes:
        prompt: int64 [tokens], up to where the number is to come.
        answer: int64 [tokens], the number.
    """

    prompt: Tensor
    answer: Tensor


def question(tokenizer: Any, hay: Tensor, length: int, depth: float, seed: int, bos: int | None = None) -> Question:
    """A text of `length` tokens, answer included, with a needle.

    Args:
        tokenizer: of the model.
        hay: int64 [tokens], text to hide it in; taken up again from the front when it is too short.
        length: tokens.
        depth: where the needle is, 0 for the start and 1 for the end.
        seed: of name, number, and the place in `hay` where the text starts.
        bos: token to put first.

    Raises:
        UsageError: so few tokens have no room for a needle and its question.
    """
    rng = random.Random(seed)
    name = rng.choice(_NAMES)
    number = "".join(rng.choice("123456789") for _ in range(_DIGITS))
    ask = f"\n\nThe pass key of {name} is"
    needle = encode(tokenizer, f"\n\nThe pass key of {name} is {number}.\n\n")
    end = encode(tokenizer, ask)
    answer = encode(tokenizer, f"{ask} {number}.")[len(end) :]
    first = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    room = length - len(needle) - len(end) - len(answer) - len(first)
    if room < 1:
        raise UsageError(
            f"needle: expected texts of at least {length - room + 1} tokens, found {length}. Use a longer --seqlen."
        )
    start = rng.randrange(len(hay))
    text = hay[(start + torch.arange(room)) % len(hay)]
    place = round(depth * room)
    return Question(torch.cat([first, text[:place], needle, text[place:], end]), answer)


@torch.inference_mode()
def score(model: Any, asked: Question, through: Through | None = None) -> tuple[float, float]:
    """How well a model answers.

    Args:
        model: causal language model in eval mode.
        asked: the question.
        through: the model with a quantized cache, to read through that.

    Returns:
        The part of the answer's tokens that are right before the first wrong one, and the mean negative log
        probability of the answer's tokens, nats.
    """
    cache: Any = None if through is None else through.cache()
    chunk = len(asked.prompt) if through is None else chunk_of(through.fmt)
    losses, right, wrong = [], 0, False
    parts = [*asked.prompt.split(chunk), *asked.answer[:-1].split(1)]
    for number, part in enumerate(parts):
        out = model(input_ids=part[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        place = number - (len(parts) - len(asked.answer))
        if place >= 0:
            logits, target = out.logits[0, -1].float(), asked.answer[place].to(out.logits.device)
            losses.append(F.cross_entropy(logits, target).item())
            wrong = wrong or int(logits.argmax()) != int(target)
            right += not wrong
    if through is not None:
        through.note(cache)
    return right / len(asked.answer), sum(losses) / len(losses)


def needle(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    repeats: int = 2,
    bos: int | None = None,
    seed: int = 0,
    through: Through | None = None,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Ask for needles at every depth of texts of every length.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        text: to hide them in.
        lengths: of the texts, tokens.
        depths: of the needles, 0 to 1.
        repeats: questions for each length and depth.
        bos: token to put first in every text.
        seed: of everything drawn.
        through: see `score`.
        observer: told after each length and depth.

    Returns:
        `{lengths, depths, repeats, seed, score, loss, mean}`: `score` and `loss` have a row for each length and a
        number for each depth, means over the repeats; see `score`. `mean` is that of all scores.

    Raises:
        UsageError: a length leaves no room.
        SourceError: the text is empty.
    """
    hay = encode(tokenizer, text)
    if not len(hay):
        raise SourceError("needle: the text to hide it in is empty.")
    observer(Started(PHASE, len(lengths) * len(depths), "place"))
    scores: list[list[float]] = []
    losses: list[list[float]] = []
    for length in lengths:
        rows: list[tuple[float, float]] = []
        for depth in depths:
            seeds = [seed + 1000 * repeat + round(100 * depth) + length for repeat in range(repeats)]
            asked = [question(tokenizer, hay, length, depth, own, bos) for own in seeds]
            found = [score(model, one, through) for one in asked]
            rows.append((sum(s for s, _ in found) / repeats, sum(x for _, x in found) / repeats))
            done = len(scores) * len(depths) + len(rows)
            observer(Advanced(PHASE, done, f"{length} tokens, depth {depth:.0%}: {rows[-1][0]:.2f}"))
        scores.append([s for s, _ in rows])
        losses.append([x for _, x in rows])
    total = sum(map(sum, scores)) / (len(lengths) * len(depths))
    return {
        "lengths": list(lengths), "depths": list(depths), "repeats": repeats, "seed": seed, "score": scores,
        "loss": losses, "mean": total,
    }  # fmt: skip


def usual_lengths(tokenizer: Any, seqlen: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and all of a length, as far as half of it is left for the text around a needle."""
    least = 2 * len(encode(tokenizer, 2 * f"\n\nThe pass key of {max(_NAMES, key=len)} is {'1' * _DIGITS}.\n\n"))
    return tuple(n for n in (seqlen // 8, seqlen // 4, seqlen // 2) if n >= least) + (seqlen,)
