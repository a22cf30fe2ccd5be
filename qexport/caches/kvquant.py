"""KVQuant: thresholds of keys by percentile, codebooks by k-means with the loss's sensitivity as weights, Q-Norm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.caches import _lines
from qexport.errors import CalibrationError
from qexport.formats.kv.base import KVFormat
from qexport.formats.kv.nuq import Levels, Nuq
from qexport.schema import Tensors

_LARGEST = 6e4  # a threshold, well within float16
_NARROWEST = (2**-9, 2**-14)  # half a range, relative to its middle and absolute: its ends stay apart in float16

_LEAST_IMPORTANT = 2**-10
_KINDS = ("counts", "weights")


@dataclass(frozen=True)
class KvQuant:
    """Hooper et al., KVQuant, arXiv:2401.18079, section 3.

    Thresholds of a channel of keys leave half of `outlier_rate` of its tokens beyond each. Codebooks are k-means of
    what lies within, as fractions of the range; each number weighs as much as the loss changes with it, which is taken
    as the square of its gradient (the diagonal of the Fisher information). Q-Norm's numbers give what is decoded the
    mean and deviation of what was coded. First tokens of a sequence, which the format does not code, are left out.

    Keys beyond their thresholds that find no slot take a code at the end of the range, so they count there in k-means;
    values beyond their token's range all find a slot, and are left out.

    Different from the paper and its code: channels of keys have an importance, the root of their mean squared gradient,
    by which slots are given (see `Nuq`); weights are times the square of the range, as the loss is of numbers and not
    of fractions; k-means is of a histogram and finds the best there is, instead of the best that 50 rounds find from
    random starts; and percentiles, k-means and Q-Norm need memory that does not grow with the number of tokens.

    Attributes:
        fisher: weigh numbers by their squared gradients; otherwise equally.
        bins: of the histograms, from -1 to 1.
    """

    source: ClassVar[str] = "Hooper et al., KVQuant, arXiv:2401.18079"
    passes: ClassVar[Mapping[str, bool]] = {"ranges": False, "codebooks": True}

    fisher: bool = True
    bins: int = 1024

    def reject(self, fmt: KVFormat) -> str | None:
        """Only codebooks will do."""
        return None if isinstance(fmt, Nuq) else "it finds codebooks, which this format has not"

    def start(self, fmt: KVFormat, width: int, tokens: int) -> dict[str, Tensor]:
        """Empty lists of the least and largest keys, and empty histograms."""
        assert isinstance(fmt, Nuq)
        kept = _lines.extremes_for(tokens, fmt.outlier_rate / 2)
        out = {f"{side}_{kind}": torch.zeros(self.bins, dtype=torch.float64) for side in "kv" for kind in _KINDS}
        if fmt.per_channel:
            # The largest are kept with their signs turned, so that both are lists of the least.
            out |= {f"k_{end}": torch.full((kept, width), torch.inf) for end in ("least", "largest")}
            out["k_squares"] = torch.zeros(width, dtype=torch.float64)
        return out | {"seen": torch.zeros(1, dtype=torch.int64)}

    def see(self, fmt: KVFormat, name: str, state: Tensors, data: Tensors) -> dict[str, Tensor]:
        """See `CacheMethod`."""
        assert isinstance(fmt, Nuq)
        own = {key: t[:, fmt.sink_tokens :].flatten(2).flatten(0, 1) for key, t in data.items()}
        out = dict(state)
        if name == "ranges":
            out["seen"] = state["seen"] + own["keys"].shape[0]
            if fmt.per_channel:
                out["k_least"] = _lines.keep_least(state["k_least"], own["keys"])
                out["k_largest"] = _lines.keep_least(state["k_largest"], -own["keys"])
            return out
        for coder, which in ((fmt.keys, "key"), (fmt.values, "value")):
            ranges = coder.range_of(own[f"{which}s"], thresholds(fmt, state))
            x = coder.normalised(own[f"{which}s"], ranges)
            if coder.calibrated:
                x = x.clamp_(-1, 1)
                out["k_squares"] = state["k_squares"] + own["key_grads"].double().square().sum(0)
            weight = (own[f"{which}_grads"] * ranges["scales"]).square()
            for kind, each in zip(_KINDS, (None, weight), strict=True):
                at = f"{coder.side}_{kind}"
                out[at] = _lines.add_to(state[at], x, each)
        return out

    def finish(self, fmt: KVFormat, state: Tensors) -> dict[str, Tensor]:
        """Thresholds, codebooks and Q-Norm's numbers, float16; raises `CalibrationError` if no token was seen."""
        assert isinstance(fmt, Nuq)
        if not int(state["seen"]):
            raise CalibrationError(
                f"no sequence was longer than the {fmt.sink_tokens} first tokens, which stay as they are. "
                "Give longer ones."
            )
        out = thresholds(fmt, state)
        if "k_squares" in state:
            out["k_importance"] = importance(state["k_squares"])
        for coder in (fmt.keys, fmt.values):
            counts, weights = (state[f"{coder.side}_{kind}"] for kind in _KINDS)
            lut = self._codebook(coder, counts, weights, uniform=fmt.uniform)
            out[f"{coder.side}_lut"] = lut
            if fmt.qnorm:
                out[f"{coder.side}_qnorm"] = matching(counts, lut)
        return {name: out[name] for name in fmt.static(1, 1)}

    def _codebook(self, coder: Levels, counts: Tensor, weights: Tensor, *, uniform: bool) -> Tensor:
        size = 2**coder.bits
        if uniform:
            return torch.linspace(-1, 1, size).to(torch.float16)
        weighed = self.fisher and bool(weights.sum() > 0)
        return _lines.levels(_lines.middles(self.bins), weights if weighed else counts, size).to(torch.float16)


def thresholds(fmt: Nuq, state: Tensors) -> dict[str, Tensor]:
    """Thresholds of keys as they are stored, float16 [width], or nothing if the format has none."""
    if not fmt.per_channel:
        return {}
    seen, part = int(state["seen"]), fmt.outlier_rate / 2
    lower = _lines.quantile(state["k_least"], seen, part)
    upper = -_lines.quantile(state["k_largest"], seen, part)
    middle = ((upper + lower) / 2).clamp(-_LARGEST, _LARGEST)
    relative, absolute = _NARROWEST
    half = torch.maximum((upper - lower) / 2, middle.abs() * relative).clamp(absolute)
    ends = {"k_lower": middle - half, "k_upper": middle + half}
    return {name: t.clamp(-65504, 65504).to(torch.float16) for name, t in ends.items()}


def importance(squares: Tensor) -> Tensor:
    """Roots of summed squared gradients relative to the largest, float64 [width] to float16 [width]; 1 if all are 0."""
    roots = squares.sqrt()
    if not float(roots.max()):
        return torch.ones_like(roots, dtype=torch.float16)
    return (roots / roots.max()).clamp(min=_LEAST_IMPORTANT).to(torch.float16)


def matching(counts: Tensor, lut: Tensor) -> Tensor:
    """Q-Norm: scale and offset that give the codebook's numbers, as often as they are taken, mean and deviation of x.

    Args:
        counts: histogram of x over -1 to 1, float64 [bins].
        lut: sorted, float16.

    Returns:
        float16 [2].
    """
    x, own = _lines.middles(counts.shape[0]), lut.to(torch.float64)
    taken = own[torch.bucketize(x, (own[1:] + own[:-1]) / 2)]
    total = counts.sum().clamp(min=1)
    means = [(counts * t).sum() / total for t in (x, taken)]
    deviations = [((counts * (t - m).square()).sum() / total).sqrt() for t, m in zip((x, taken), means, strict=True)]
    scale = deviations[0] / deviations[1] if deviations[1] > 0 else torch.ones((), dtype=torch.float64)
    return torch.stack([scale, means[0] - means[1] * scale]).to(torch.float16)


plugin = KvQuant
