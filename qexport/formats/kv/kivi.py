"""KIVI: keys in few levels per channel over groups of tokens, values per token over groups of channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats import _bits
from qexport.schema import Field, Layout, Tensors

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Kivi:
    """Liu et al., KIVI, arXiv:2402.02750: value = offset + code * scale, with offset and scale in float16.

    Keys share them over `group_size` tokens, channel by channel; values over `group_size` channels of a head, token by
    token. Keys are coded when a window of them is full, values one by one as they leave it. Keys are coded after their
    rotation, and nothing is calibrated. The authors keep what is in the window in float16; here it stays in the
    model's dtype.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: tokens of a group of keys, channels of a group of values; a head's last group may be shorter.
        residual_window: tokens that may stay in full precision, a multiple of the group size; 0: none that fill a
            group.
    """

    name: ClassVar[str] = "kivi"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Liu et al., KIVI, arXiv:2402.02750"
    pre_rope: ClassVar[bool] = False
    sink_tokens: ClassVar[int] = 0

    bits: int = 2
    group_size: int = 32
    residual_window: int = 128

    def __post_init__(self) -> None:
        need = _bits.require
        need(_bits.is_int(self.bits, 2, 8), "kivi", "bits", self.bits, "a whole number from 2 to 8")
        need(_bits.is_int(self.group_size, 2, 1024), "kivi", "group_size", self.group_size, "a whole number, 2 to 1024")
        window = self.residual_window
        fits = _bits.is_int(window, 0, 1 << 20) and window % self.group_size == 0
        need(
            fits,
            "kivi",
            "residual_window",
            window,
            f"0 or a multiple of the group size {self.group_size}, at most 1048576",
        )

    @property
    def keys(self) -> "PerChannel":
        """Of keys."""
        return PerChannel(self.bits, self.group_size)

    @property
    def values(self) -> "PerToken":
        """Of values."""
        return PerToken(self.bits, self.group_size)

    def static(self, heads: int, dim: int) -> Layout:
        """Nothing is calibrated."""
        return {}

    def check_static(self, tensors: Tensors, heads: int, dim: int, where: str) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class PerChannel:
    """Groups of tokens that share offset and scale channel by channel."""

    bits: int
    group: int
    fifo: ClassVar[bool] = False
    batch: ClassVar[int] = 1

    def layout(self, heads: int, dim: int) -> Layout:
        """Codes of each token, a scale and an offset of each channel."""
        width = heads * dim
        codes = (self.group, _bits.words_for(width, self.bits))
        return {
            "codes": Field(codes, torch.int32, ("token", "word"), "codes, bit-packed along heads and channels"),
            "scales": Field((width,), torch.float16, ("channel",), "distance of two levels"),
            "offsets": Field((width,), torch.float16, ("channel",), "value of code 0"),
        }

    def encode(self, x: Tensor, static: Tensors) -> dict[str, Tensor]:
        """See `Coder`."""
        flat = x.flatten(3)
        scales, offsets, codes = _levels(flat, 2, self.bits)
        return {"codes": _bits.pack_bits(codes, self.bits), "scales": scales.squeeze(2), "offsets": offsets.squeeze(2)}

    def decode(self, packed: Tensors, static: Tensors, heads: int, dim: int) -> Tensor:
        """Offset + code * scale."""
        codes: Tensor = _bits.unpack_bits(packed["codes"], self.bits, heads * dim).to(torch.float32)
        scales, offsets = (packed[name].to(torch.float32).unsqueeze(2) for name in ("scales", "offsets"))
        out: Tensor = codes.mul_(scales).add_(offsets).unflatten(-1, (heads, dim))
        return out


@dataclass(frozen=True)
class PerToken:
    """Tokens one by one, with offset and scale for each group of a head's channels."""

    bits: int
    channels: int
    group: ClassVar[int] = 1
    fifo: ClassVar[bool] = True
    batch: ClassVar[int] = 1

    def layout(self, heads: int, dim: int) -> Layout:
        """Codes of the token, a scale and an offset for each group of channels."""
        shape = (1, heads, _bits.groups_in(dim, self.channels))
        words = (1, _bits.words_for(heads * dim, self.bits))
        return {
            "codes": Field(words, torch.int32, ("token", "word"), "codes, bit-packed along heads and channels"),
            "scales": Field(shape, torch.float16, ("token", "head", "group"), "distance of two levels"),
            "offsets": Field(shape, torch.float16, ("token", "head", "group"), "value of code 0"),
        }

    def encode(self, x: Tensor, static: Tensors) -> dict[str, Tensor]:
        """See `Coder`."""
        dim, size = x.shape[-1], min(self.channels, x.shape[-1])
        short = -dim % size
        # A shorter last group is filled up with its own last channel, which changes neither its least nor its largest.
        filled = F.pad(x.flatten(0, 2), (0, short), mode="replicate").view(*x.shape[:-1], dim + short)
        scales, offsets, codes = _levels(filled.unflatten(-1, (-1, size)), -1, self.bits)
        own = codes.flatten(-2)[..., :dim].flatten(3)
        return {
            "codes": _bits.pack_bits(own, self.bits),
            "scales": scales.squeeze(-1),
            "offsets": offsets.squeeze(-1),
        }

    def decode(self, packed: Tensors, static: Tensors, heads: int, dim: int) -> Tensor:
        """Offset + code * scale."""
        codes = _bits.unpack_bits(packed["codes"], self.bits, heads * dim).to(torch.float32)
        out: Tensor = codes.unflatten(-1, (heads, dim))
        for name, act in (("scales", out.mul_), ("offsets", out.add_)):
            act(packed[name].to(torch.float32).repeat_interleave(min(self.channels, dim), -1)[..., :dim])
        return out


def _levels(x: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and offsets, float16, and codes, uint8, of x with its range along an axis cut into equal steps."""
    low, high = torch.aminmax(x, dim=axis, keepdim=True)
    offsets = low.clamp(-_LARGEST, _LARGEST).to(torch.float16)
    start = offsets.to(torch.float32)
    scales = ((high - start) / (2**bits - 1)).clamp(0, _LARGEST).to(torch.float16)
    step = scales.to(torch.float32)
    codes = ((x - start) / step.where(step > 0, torch.ones_like(step))).round_().clamp_(0, 2**bits - 1)
    return scales, offsets, codes.to(torch.uint8)


plugin = Kivi
