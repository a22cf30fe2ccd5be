"""Perplexity: exp of the mean negative log probability that the model gives to the tokens that are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.errors import CheckpointError
from qexport.evaluate.bootstrap import parts_of
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Windows
from qexport.events import Advanced, Observer, Started, ignore

PHASE = "evaluate"
CHUNK = 256  # positions whose logits are held in float32 at a time
EXP_LIMIT = 700.0  # exp(709.8) overflows; a model this far off is broken, and its losses say so


@dataclass(frozen=True)
class Perplexity:
    """Result on one text.

    Attributes:
        windows: what was scored.
        loss: negative log probability of each scored token, nats, float32 [tokens], in the order of the text.
    """

    windows: Windows
    loss: Tensor

    @property
    def losses(self) -> list[float]:
        """Mean loss of each window's scored tokens."""
        return [part.double().mean().item() for part in torch.split(self.loss, list(self.windows.scored))]

    @property
    def value(self) -> float:
        """The exponential of the mean loss over scored tokens, which over equal windows is that of windows."""
        return exp(min(self.loss.double().mean().item(), EXP_LIMIT))

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        w = self.windows
        return {
            "value": self.value, "tokens": w.tokens, "losses": self.losses,
            "seqlen": w.seqlen, "stride": w.stride, "bos": w.bos,
        }  # fmt: skip


def observations(windows: Windows, **values: Tensor) -> dict[str, list[float]]:
    """What a bootstrap draws: means over the windows, each in as many equal parts as `parts_of` says.

    Args:
        windows: what was scored.
        **values: float [tokens] each, in the order of the text.

    Returns:
        A list of means for each name, to six decimals, and `predictions`: how many each is the mean of.
    """
    parts = parts_of(len(windows.scored))
    sizes = [piece.numel() for n in windows.scored for piece in torch.tensor_split(torch.empty(n), min(parts, n))]
    means = {
        name: [round(x.mean().item(), 6) for x in torch.split(own.double(), sizes)] for name, own in values.items()
    }
    return {**means, "predictions": [float(n) for n in sizes]}


def predict(model: Any, text: Windows, span: range, through: Through | None = None) -> list[tuple[Tensor, Tensor]]:
    """Logits and targets of some windows of a text, in one pass over all of them.

    Args:
        model: any causal language model of the transformers kind.
        text: the windows.
        span: which of them.
        through: the model with a quantized cache, to read through that.

    Returns:
        For each window logits [scored, vocabulary] in the model's dtype and targets int64 [scored], on the device of
        the logits.
    """
    ids, scored = text.ids[span.start : span.stop], text.scored[span.start : span.stop]
    if through is not None:
        found = through.logits(ids, max(scored) + 1)  # the last token too: it may complete a group
    else:
        found = model(input_ids=ids.to(model.device), use_cache=False).logits
    targets = ids.to(found.device)
    return [(row[-n - 1 : -1], own[-n:]) for row, own, n in zip(found, targets, scored, strict=True)]


def spans(windows: int, batch: int) -> list[range]:
    """Windows that run together."""
    return [range(start, min(start + batch, windows)) for start in range(0, windows, batch)]


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
    model: Any,
    windows: Sequence[Windows],
    *,
    batch: int = 1,
    through: Through | None = None,
    observer: Observer = ignore,
) -> list[Perplexity]:
    """Perplexity of each tokenised text.

    Args:
        model: causal language model in eval mode.
        windows: one entry a text.
        batch: windows that run together; they are equally long, so none is padded.
        through: see `predict`.
        observer: told after each window.

    Raises:
        CheckpointError: a prediction is not finite.
    """
    observer(Started(PHASE, sum(len(w.scored) for w in windows), "window"))
    done, results = 0, []
    for text in windows:
        losses: list[Tensor] = []
        for span in spans(len(text.scored), batch):
            for i, (logits, targets) in zip(span, predict(model, text, span, through), strict=True):
                found = token_losses(logits, targets)
                require_finite(found, text.name, i)
                losses.append(found.cpu())
                done += 1
                observer(Advanced(PHASE, done, f"{text.name}: loss {found.mean():.4f}"))
        results.append(Perplexity(text, torch.cat(losses)))
    return results
