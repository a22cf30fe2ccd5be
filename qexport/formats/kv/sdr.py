"""SDR: integers of 8 bits of each token and head keep their sign and the few bits that lead their group."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats import _bits
from qexport.formats.sdr import Sdr as Grid
from qexport.schema import Field, Layout, Tensors

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Sdr:
    """Lee et al., QRazor, arXiv:2501.13331: value = scale * signed code * 2^flag.

    Each token and head has a scale, which makes integers of 8 bits of its channels; each group of channels has a flag,
    which says how many bits were razored off. Codes are two's complement. Keys are coded after their rotation, and
    nothing is calibrated.

    Different from the paper: scales are of a token and head, found as it comes, there of a tensor; and a number takes
    the code nearest to itself rather than to its integer, so that nothing is rounded twice.

    Attributes:
        bits: width of a code with its sign, 2 to 7.
        group_size: channels of a head that share a flag; a head's last group may be shorter.
        residual_window: last tokens that stay in full precision, and up to 15 more: 16 leave together. The paper has
            none.
    """

    name: ClassVar[str] = "sdr"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Lee et al., QRazor, arXiv:2501.13331"
    pre_rope: ClassVar[bool] = False
    sink_tokens: ClassVar[int] = 0

    bits: int = 4
    group_size: int = 16
    residual_window: int = 32

    def __post_init__(self) -> None:
        need = _bits.require
        need(_bits.is_int(self.bits, 2, 7), "sdr", "bits", self.bits, "a whole number from 2 to 7")
        need(_bits.is_int(self.group_size, 2, 1024), "sdr", "group_size", self.group_size, "a whole number, 2 to 1024")
        window = self.residual_window
        need(_bits.is_int(window, 0, 1 << 20), "sdr", "residual_window", window, "a whole number from 0 to 1048576")

    @property
    def keys(self) -> "Razored":
        """Of keys."""
        return Razored(self.bits, self.group_size)

    @property
    def values(self) -> "Razored":
        """Of values."""
        return Razored(self.bits, self.group_size)

    def static(self, heads: int, dim: int) -> Layout:
        """Nothing is calibrated."""
        return {}

    def check_static(self, tensors: Tensors, heads: int, dim: int, where: str) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Razored:
    """Tokens one by one, with a scale for each head and a flag for each group of its channels."""

    bits: int
    channels: int
    group: ClassVar[int] = 1
    fifo: ClassVar[bool] = True
    batch: ClassVar[int] = 16

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.channels)

    def layout(self, heads: int, dim: int) -> Layout:
        """Codes and flags of the token, bit-packed, and a scale for each head."""
        codes = (1, _bits.words_for(heads * dim, self.bits))
        flags = (1, _bits.words_for(heads * _bits.groups_in(dim, self.channels), self._grid.flag_bits))
        return {
            "codes": Field(codes, torch.int32, ("token", "word"), "signed codes, bit-packed along heads and channels"),
            "flags": Field(flags, torch.int32, ("token", "word"), "bits razored off, packed along heads and groups"),
            "scales": Field((1, heads), torch.float16, ("token", "head"), "value of 1 in a head's integers"),
        }

    def encode(self, x: Tensor, static: Tensors) -> dict[str, Tensor]:
        """See `Coder`."""
        grid, dim = self._grid, x.shape[-1]
        scales = (x.abs().amax(-1) / grid.largest).clamp(max=_LARGEST).to(torch.float16)
        state = scales.to(torch.float32)
        # Whoever has no scale is 0 all over, or too small for one.
        grouped = self._grouped(x.where(state.unsqueeze(-1) > 0, torch.zeros_like(x)))
        state = state.where(state > 0, torch.ones_like(state)).unsqueeze(-1).expand(grouped.shape[:-1])
        rows = grouped.flatten(0, -2)
        found = grid.fit(rows, None, state.reshape(-1, 1), 0)
        codes = grid.nearest(rows, found).view(grouped.shape).flatten(-2)[..., :dim]
        flags = found["flags"].view(grouped.shape[:-1]).to(torch.uint8)
        return {
            "codes": _bits.pack_bits(codes.flatten(3), self.bits),
            "flags": _bits.pack_bits(flags.flatten(3), grid.flag_bits),
            "scales": scales,
        }

    def decode(self, packed: Tensors, static: Tensors, heads: int, dim: int) -> Tensor:
        """Signed code times 2^flag, an exact integer, times the scale."""
        grid, groups = self._grid, _bits.groups_in(dim, self.channels)
        signed = grid.signed(_bits.unpack_bits(packed["codes"], self.bits, heads * dim)).unflatten(-1, (heads, dim))
        flags = _bits.unpack_bits(packed["flags"], grid.flag_bits, heads * groups).unflatten(-1, (heads, groups))
        powers = torch.exp2(flags.to(torch.float32)).repeat_interleave(min(self.channels, dim), -1)[..., :dim]
        out: Tensor = signed.mul_(powers).mul_(packed["scales"].to(torch.float32).unsqueeze(-1))
        return out

    def _grouped(self, x: Tensor) -> Tensor:
        """Channels [..., dim] in groups [..., groups, channels]; a shorter last one is filled up with 0."""
        size = min(self.channels, x.shape[-1])
        out: Tensor = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        return out


plugin = Sdr
