"""NUQ: codes into a calibrated codebook, keys per channel and values per token, and a few outliers of each token."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats import _bits
from qexport.schema import Field, Layout, Tensors

_LARGEST = torch.finfo(torch.float16).max
_WIDEST = 1 << 16  # channels that 16 bits can number
_FARTHEST = 2.0  # of a codebook, whose numbers lie between the ends of a range, -1 and 1
_STRONGEST = 16.0  # of Q-Norm's scale, which is near 1


@dataclass(frozen=True)
class Nuq:
    """Hooper et al., KVQuant, arXiv:2401.18079: value = offset + range * codebook[code], and outliers on top.

    A codebook of 2^bits float16 numbers holds for the keys of a layer, another one for its values. Offset and range of
    keys are calibrated for each channel (the middle and half the distance of `k_lower` and `k_upper`); those of values
    are found for each token, from what its outliers leave. With Q-Norm a codebook is stretched and moved when it is
    read. Each token has the same number of slots for outliers: a slot adds to a channel what the code left of the
    value, in float16. The slots go to the largest of these, by rank; among keys each counts as many times as its
    channel is important, which is calibrated too.

    Different from the paper: there slots go to what is farthest beyond the ends of the range, and no channel is more
    important than another.

    Attributes:
        bits: width of a code, 2 to 4.
        outlier_rate: part of a token's channels that have a slot, rounded up to an even number of slots; 0: no slots.
        sink_tokens: first tokens of a sequence, which stay in full precision; the paper has 1.
        residual_window: last tokens that stay in full precision, and up to 15 more: 16 leave together. The paper has
            none.
        qnorm: what is read has the mean and the deviation of what was coded; the paper uses it at 2 bits.
        pre_rope: keys are coded as they were before their rotation by position.
        per_channel: keys have a calibrated range for each channel; otherwise they are coded like values.
        uniform: codebooks hold evenly spaced numbers.
    """

    name: ClassVar[str] = "nuq"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Hooper et al., KVQuant, arXiv:2401.18079"

    bits: int = 4
    outlier_rate: float = 0.01
    sink_tokens: int = 4
    residual_window: int = 32
    qnorm: bool = False
    pre_rope: bool = True
    per_channel: bool = True
    uniform: bool = False

    def __post_init__(self) -> None:
        need, rate = _bits.require, self.outlier_rate
        need(_bits.is_int(self.bits, 2, 4), "nuq", "bits", self.bits, "a whole number from 2 to 4")
        number = type(rate) in (int, float) and 0 <= rate <= 0.5
        need(number, "nuq", "outlier_rate", rate, "a number from 0 to 0.5")
        for name in ("sink_tokens", "residual_window"):
            value = getattr(self, name)
            need(_bits.is_int(value, 0, 1 << 20), "nuq", name, value, "a whole number from 0 to 1048576")
        for name in ("qnorm", "pre_rope", "per_channel", "uniform"):
            need(type(getattr(self, name)) is bool, "nuq", name, getattr(self, name), "true or false")

    @property
    def keys(self) -> "Levels":
        """Of keys."""
        return Levels("k", self.bits, self.outlier_rate, self.qnorm, self.per_channel)

    @property
    def values(self) -> "Levels":
        """Of values."""
        return Levels("v", self.bits, self.outlier_rate, self.qnorm, False)

    def static(self, heads: int, dim: int) -> Layout:
        """Thresholds of keys, and a codebook each."""
        return {**self.keys.static(heads * dim), **self.values.static(heads * dim)}

    def check_static(self, tensors: Tensors, heads: int, dim: int, where: str) -> None:
        """Refuse what is not finite, empty ranges, codebooks out of order or range. Raises `LayoutError`."""
        for name in self.static(heads, dim):
            if not torch.isfinite(tensors[name]).all():
                raise LayoutError(f"{where}.{name}: expected finite numbers, found NaN or infinity.")
        if self.per_channel and not (tensors["k_upper"] > tensors["k_lower"]).all():
            raise LayoutError(f"{where}.k_upper: expected more than k_lower in every channel, found as much or less.")
        if "k_importance" in self.static(heads, dim) and not (tensors["k_importance"] > 0).all():
            raise LayoutError(f"{where}.k_importance: expected numbers above 0, found others.")
        for side in "kv":
            lut = tensors[f"{side}_lut"].to(torch.float32)
            if not (lut[1:] >= lut[:-1]).all():
                raise LayoutError(f"{where}.{side}_lut: expected sorted numbers, found {lut.tolist()}.")
            if float(lut.abs().max()) > _FARTHEST:
                most = float(lut.abs().max())
                raise LayoutError(f"{where}.{side}_lut: expected numbers up to {_FARTHEST:g}, found {most:g}.")
            if self.qnorm:
                scale, offset = tensors[f"{side}_qnorm"].tolist()
                if not (1 / _STRONGEST <= scale <= _STRONGEST and abs(offset) <= _FARTHEST):
                    raise LayoutError(
                        f"{where}.{side}_qnorm: expected a scale near 1 and an offset near 0, found "
                        f"{scale:g}, {offset:g}."
                    )


@dataclass(frozen=True)
class Levels:
    """Tokens one by one: codes into a codebook, and slots.

    Attributes:
        side: `"k"` or `"v"`, with which the names of calibrated tensors begin.
        bits: width of a code.
        rate: part of the channels that have a slot.
        qnorm: the codebook is stretched and moved when it is read.
        calibrated: each channel has a calibrated range; otherwise each token finds its own.
    """

    side: str
    bits: int
    rate: float
    qnorm: bool
    calibrated: bool
    group: ClassVar[int] = 1
    fifo: ClassVar[bool] = True
    batch: ClassVar[int] = 16

    def slots(self, width: int) -> int:
        """Outliers of a token of so many channels, an even number if there are channels enough."""
        return min(2 * ceil(self.rate / 2 * width), width)

    def static(self, width: int) -> Layout:
        """What calibration finds."""
        out = {}
        if self.calibrated:
            out = {
                f"{self.side}_lower": Field((width,), torch.float16, ("channel",), "value that -1 stands for"),
                f"{self.side}_upper": Field((width,), torch.float16, ("channel",), "value that 1 stands for"),
            }
            if self.rate:
                about = "what an error in the channel costs, relative to others"
                out[f"{self.side}_importance"] = Field((width,), torch.float16, ("channel",), about)
        out[f"{self.side}_lut"] = Field((2**self.bits,), torch.float16, ("code",), "codebook, sorted, about -1 to 1")
        if self.qnorm:
            out[f"{self.side}_qnorm"] = Field((2,), torch.float16, ("number",), "scale and offset of the codebook")
        return out

    def layout(self, heads: int, dim: int) -> Layout:
        """Codes and slots of a token, and its range where that is not calibrated."""
        width = heads * dim
        _bits.require(width <= _WIDEST, "nuq", "heads times dim", width, f"at most {_WIDEST}")
        words, slots = (1, _bits.words_for(width, self.bits)), (1, self.slots(width))
        out = {"codes": Field(words, torch.int32, ("token", "word"), "codes, bit-packed along heads and channels")}
        if not self.calibrated:
            out["offsets"] = Field((1,), torch.float16, ("token",), "value that 0 stands for")
            out["scales"] = Field((1,), torch.float16, ("token",), "distance from there to what 1 stands for")
        if slots[1]:
            at = "their channels; lower 16 bits, so that channels from 32768 on are negative"
            out["outlier_values"] = Field(slots, torch.float16, ("token", "slot"), "what is added to channels")
            out["outlier_channels"] = Field(slots, torch.int16, ("token", "slot"), at)
        return out

    def range_of(self, flat: Tensor, static: Tensors) -> dict[str, Tensor]:
        """Offsets and ranges, rounded as they are stored.

        Args:
            flat: float32 [..., width].
            static: of the layer.

        Returns:
            `offsets` and `scales`, float32: [width] if they are calibrated, else [..., 1].
        """
        if self.calibrated:
            lower, upper = (static[f"{self.side}_{end}"].to(torch.float32) for end in ("lower", "upper"))
            return {"offsets": (upper + lower) / 2, "scales": (upper - lower) / 2}
        # As many are left out at each end as half the slots; at least one stays.
        out = min(self.slots(flat.shape[-1]) // 2, (flat.shape[-1] - 1) // 2)
        lower = flat.topk(out + 1, -1, largest=False).values.amax(-1, keepdim=True)
        upper = flat.topk(out + 1, -1).values.amin(-1, keepdim=True)
        offsets = _stored((upper + lower) / 2)
        return {"offsets": offsets, "scales": _stored(torch.maximum(upper - offsets, offsets - lower))}

    def normalised(self, flat: Tensor, ranges: Tensors) -> Tensor:
        """(x - offset) / range; 0 where a range is empty."""
        scales = ranges["scales"]
        return ((flat - ranges["offsets"]) / scales.where(scales > 0, torch.ones_like(scales))).mul_(scales > 0)

    def encode(self, x: Tensor, static: Tensors) -> dict[str, Tensor]:
        """See `Coder`."""
        flat = x.flatten(3)
        ranges = self.range_of(flat, static)
        lut = static[f"{self.side}_lut"].to(torch.float32)
        codes = torch.bucketize(self.normalised(flat, ranges), (lut[1:] + lut[:-1]) / 2)
        out = {"codes": _bits.pack_bits(codes.to(torch.uint8), self.bits)}
        if not self.calibrated:
            out |= {name: t.squeeze(-1).to(torch.float16) for name, t in ranges.items()}
        if slots := self.slots(flat.shape[-1]):
            left = flat - self._dense(codes, ranges, static)
            cost = left.abs()
            if self.calibrated:
                cost *= static[f"{self.side}_importance"].to(torch.float32)
            at = cost.topk(slots, -1).indices
            out["outlier_values"] = left.gather(-1, at).clamp_(-_LARGEST, _LARGEST).to(torch.float16)
            out["outlier_channels"] = at.to(torch.int32).to(torch.int16)
        return out

    def decode(self, packed: Tensors, static: Tensors, heads: int, dim: int) -> Tensor:
        """Offset + range * codebook[code], and what is in the slots."""
        codes = _bits.unpack_bits(packed["codes"], self.bits, heads * dim).to(torch.int64)
        if self.calibrated:
            ranges = self.range_of(torch.empty(0), static)
        else:
            ranges = {name: packed[name].to(torch.float32).unsqueeze(-1) for name in ("offsets", "scales")}
        out = self._dense(codes, ranges, static)
        if "outlier_values" in packed:
            at = packed["outlier_channels"].to(torch.int64) & (_WIDEST - 1)
            out.scatter_(-1, at, out.gather(-1, at) + packed["outlier_values"].to(torch.float32))
        whole: Tensor = out.unflatten(-1, (heads, dim))
        return whole

    def _dense(self, codes: Tensor, ranges: Tensors, static: Tensors) -> Tensor:
        """What the codes [..., width] stand for without the slots, float32."""
        lut = static[f"{self.side}_lut"].to(torch.float32)
        if self.qnorm:
            scale, offset = static[f"{self.side}_qnorm"].to(torch.float32)
            lut = lut * scale + offset
        return lut[codes].mul_(ranges["scales"]).add_(ranges["offsets"])


def _stored(x: Tensor) -> Tensor:
    """Rounded to float16, never to infinity."""
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float16).to(torch.float32)


plugin = Nuq
