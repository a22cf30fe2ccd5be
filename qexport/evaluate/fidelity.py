"""Fidelity: how far a model's predictions are from those of the model it was made from, on the same windows.

Perplexity has the noise of the text in it; differences between two models on the same tokens do not. KL(original ||
model) is the information lost, in nats a token. The log perplexity ratio is a difference of means over the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.errors import UsageError
from qexport.evaluate.original import Original
from qexport.evaluate.perplexity import PHASE, Perplexity, observations, predict, require_finite, spans
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Windows
from qexport.events import Advanced, Observer, Started, ignore

RUN = 128  # consecutive predictions that count as one observation for a standard error
_CHUNK = 128


@dataclass(frozen=True)
class Pairs:
    """Both models' predictions of one text, token by token; all float32 [tokens], in the order of the text.

    Attributes:
        windows: what was scored.
        kl: KL(original || model), nats.
        agree: 1 where both put the same token first.
        loss: negative log probability under the model.
        original_loss: the same under the original.
    """

    windows: Windows
    kl: Tensor
    agree: Tensor
    loss: Tensor
    original_loss: Tensor

    @property
    def perplexity(self) -> Perplexity:
        """Perplexity of the model, from the same pass."""
        return Perplexity(self.windows, self.loss)

    @property
    def original_perplexity(self) -> Perplexity:
        """Perplexity of the original."""
        return Perplexity(self.windows, self.original_loss)

    def observations(self) -> dict[str, list[float]]:
        """What a bootstrap draws."""
        own = {"kl": self.kl, "top1": self.agree, "loss": self.loss, "original_loss": self.original_loss}
        return observations(self.windows, **own)


def divergence(logits: Tensor, original: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(original || model), top-1 agreement, and the losses of model and original.

    Args:
        logits: [tokens, vocabulary] of the model.
        original: [tokens, vocabulary] of the original.
        targets: int64 [tokens].

    Returns:
        Four float32 [tokens]. KL is never below 0: what rounding takes below is 0.
    """
    rows = []
    parts = (torch.split(x, _CHUNK) for x in (logits, original, targets))
    for q, p, target in zip(*parts, strict=True):
        log_q, log_p = F.log_softmax(q.float(), -1), F.log_softmax(p.float(), -1)
        mass = log_p.exp()
        # A token that the original rules out contributes nothing, even where the model rules it out too.
        kl = torch.where(mass > 0, mass * (log_p - log_q), 0.0).sum(-1).clamp(min=0)
        own, theirs = (-x.gather(1, target[:, None])[:, 0] for x in (log_q, log_p))
        rows.append(torch.stack([kl, (q.argmax(-1) == p.argmax(-1)).float(), own, theirs]))
    kl, agree, own, theirs = torch.cat(rows, 1)
    return kl, agree, own, theirs


@torch.inference_mode()
def compare(
    model: Any,
    original: Original,
    windows: Sequence[Windows],
    *,
    batch: int = 1,
    through: Through | None = None,
    observer: Observer = ignore,
) -> list[Pairs]:
    """Run both models over the same windows; where the original has to run, both stay in memory.

    Args:
        model: causal language model in eval mode.
        original: the model it was made from.
        windows: one entry a text.
        batch: windows that run together.
        through: the model with a quantized cache, to read through that; the original reads as ever.
        observer: told after each window.

    Raises:
        UsageError: the vocabularies differ.
        CheckpointError: a prediction is not finite.
    """
    observer(Started(PHASE, sum(len(w.scored) for w in windows), "window"))
    done, results = 0, []
    for text in windows:
        found: list[Tensor] = []
        for span in spans(len(text.scored), batch):
            ours, theirs = predict(model, text, span, through), original.logits(text, span)
            for i, (logits, targets), reference in zip(span, ours, theirs, strict=True):
                if logits.shape != reference.shape:
                    raise UsageError(
                        f"--against: expected a vocabulary of {logits.shape[1]} tokens, found {reference.shape[1]}. "
                        "Name the model that this one was made from."
                    )
                rows = torch.stack(divergence(logits, reference.to(logits.device), targets)).cpu()
                require_finite(rows, text.name, i)
                found.append(rows)
                done += 1
                observer(Advanced(PHASE, done, f"{text.name}: KL {rows[0].mean():.4f}"))
        results.append(Pairs(text, *torch.cat(found, 1)))
    return results


def mean_and_error(values: Tensor, scored: Sequence[int]) -> tuple[float, float | None]:
    """Mean over tokens and its standard error.

    Neighbouring tokens are not independent, so the error is taken between runs of up to 128 consecutive predictions
    of one window: with run totals s_r of n_r tokens and N tokens in R runs,
    se = sqrt(R / (R - 1) * sum_r (s_r - n_r * mean)^2) / N. Treating tokens as independent gives less, and too little.

    Args:
        values: [tokens], in the order of the text.
        scored: tokens of each window.

    Returns:
        The mean, and its standard error or None where there is only one run.
    """
    x = values.double()
    mean = x.mean()
    runs = [run for part in torch.split(x, list(scored)) for run in torch.split(part, RUN)]
    if len(runs) < 2:
        return mean.item(), None
    spread = torch.stack([(run - mean).sum() for run in runs]).square().sum()
    return mean.item(), (spread * len(runs) / (len(runs) - 1)).sqrt().item() / x.numel()


def summary(pairs: Sequence[Pairs]) -> dict[str, Any]:
    """All texts together, as it stands in the results."""
    scored = [count for pair in pairs for count in pair.windows.scored]
    kl = torch.cat([pair.kl for pair in pairs])
    mean, se = mean_and_error(kl, scored)
    median, p99 = torch.quantile(kl.double(), torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    top1, top1_se = mean_and_error(torch.cat([pair.agree for pair in pairs]), scored)
    ratio, ratio_se = mean_and_error(torch.cat([pair.loss.double() - pair.original_loss for pair in pairs]), scored)
    return {
        "kl": {"mean": mean, "se": se, "median": median, "p99": p99, "max": kl.max().item()},
        "top1": {"value": top1, "se": top1_se},
        "ln_ppl_ratio": {"value": ratio, "se": ratio_se},
        "tokens": kl.numel(),
    }


def fidelity(model: Any, original: Any, windows: Sequence[Windows], *, observer: Observer = ignore) -> dict[str, Any]:
    """`compare`, then `summary`: KL, top-1 agreement and log perplexity ratio with their standard errors."""
    return summary(compare(model, Original(lambda: original), windows, observer=observer))
