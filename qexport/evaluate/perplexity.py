"""Perplexity: exp of the mean negative log probability that the model gives to the tokens that are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.errors import CheckpointError
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Windows
from qexport.events import Advanced, Observer, Started, ignore

PHASE = "evaluate"
CHUNK = 256  # positions whose logits are held in float32 at a time
_EXP_LIMIT = 700.0  # exp(709.8) overflows; a model this far off is broken, and its losses say so


@dataclass(frozen=True)
class Perplexity:
    """Result on one text.

    Attributes:
        windows: what was scored.
        losses: mean negative log probability of each window's scored tokens, nats.
    """

    windows: Windows
    losses: tuple[float, ...]

    @property
    def value(self) -> float:
        """The exponential of the mean loss over scored tokens, which over equal windows is that of windows."""
        total = sum(loss * count for loss, count in zip(self.losses, self.windows.scored, strict=True))
        return exp(min(total / self.windows.tokens, _EXP_LIMIT))

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        w = self.windows
        return {
            "value": self.value, "tokens": w.tokens, "losses": list(self.losses),
            "seqlen": w.seqlen, "stride": w.stride, "bos": w.bos,
        }  # fmt: skip


def predict(model: Any, ids: Tensor, scored: int, through: Through | None = None) -> tuple[Tensor, Tensor]:
    """Logits and targets of the last `scored` predictions of one window.

    Args:
        model: any causal language model of the transformers kind.
        ids: int64 [length].
        scored: at most length - 1.
        through: the model with a quantized cache, to read through that.

    Returns:
        Logits [scored, vocabulary] in the model's dtype and targets int64 [scored], on the device of the logits.
    """
    end = ids.numel() - 1
    if through is not None:
        logits = through.logits(ids[None], scored + 1)[0, :-1]  # the last token too: it may complete a group
        return logits, ids[end + 1 - scored :].to(logits.device)
    logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    return logits[end - scored : end], ids[end + 1 - scored :].to(logits.device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log probability of each target, nats, float32 [tokens]; a few positions in float32 at a time."""
    parts = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts])


def require_finite(losses: Tensor, name: str, window: int) -> None:
    """Raise `CheckpointError` when a window's losses hold NaN or infinity."""
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise CheckpointError(
            f"{name}, window {window}: {bad} of {losses.numel()} predictions are not finite. Either the weights are "
            "damaged (run `qexport verify`), or the compute dtype is too narrow (evaluate in float32)."
        )


@torch.inference_mode()
def perplexity(
    model: Any, windows: Sequence[Windows], *, through: Through | None = None, observer: Observer = ignore
) -> list[Perplexity]:
    """Perplexity of each tokenised text, window by window at batch 1.

    Args:
        model: causal language model in eval mode.
        windows: one entry a text.
        through: see `predict`.
        observer: told after each window.

    Raises:
        CheckpointError: a prediction is not finite.
    """
    observer(Started(PHASE, sum(len(w.scored) for w in windows), "window"))
    done, results = 0, []
    for text in windows:
        losses: list[float] = []
        for i, scored in enumerate(text.scored):
            found = token_losses(*predict(model, text.ids[i], scored, through))
            require_finite(found, text.name, i)
            losses.append(found.double().mean().item())
            done += 1
            observer(Advanced(PHASE, done, f"{text.name}: loss {losses[-1]:.4f}"))
        results.append(Perplexity(text, tuple(losses)))
    return results
