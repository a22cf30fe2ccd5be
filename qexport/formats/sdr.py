"""SDR: significant data razoring. Integers of 8 or 16 bits keep their sign and the few bits that lead their group."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats import _bits, _random
from qexport.formats.base import Integers, RowWise
from qexport.schema import Field, Layout, Tensors

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sdr(RowWise):
    """Value = scale * signed code * 2^flag, with one scale a row and one flag a group.

    A row's scale makes integers of `base_bits` bits of its weights. Of these a group keeps the sign and the `bits` - 1
    bits from the leading one of its largest magnitude on; its flag says how many bits were razored off below.

    Fields: `codes` uint8 [n, k], the low `bits` bits of each signed code; `flags` float32 [n, groups]; `scales` float32
    [n, groups], the same along a row.

    QRazor (Lee et al., arXiv:2501.13331). Different from the paper: a weight takes the code nearest to itself rather
    than to its integer, so that nothing is rounded twice.

    Attributes:
        bits: width of a code with its sign, 2 to 8.
        group_size: columns that share a flag; need not divide k (the last group is shorter); -1 is one a row.
        base_bits: 8 or 16, width of the integers.
        sign_magnitude: codes are a sign (top bit) and a magnitude, as in the paper; otherwise two's complement.
    """

    name: ClassVar[str] = "sdr"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Lee et al., QRazor, arXiv:2501.13331"

    bits: int = 4
    group_size: int = 16
    base_bits: int = 8
    sign_magnitude: bool = False

    def __post_init__(self) -> None:
        need = _bits.require
        need(
            self.base_bits in (8, 16) and type(self.base_bits) is int, self.name, "base_bits", self.base_bits, "8 or 16"
        )
        need(_bits.is_int(self.bits, 2, 8), self.name, "bits", self.bits, "a whole number from 2 to 8")
        _bits.require_group_size(self.group_size, self.name)
        signed = type(self.sign_magnitude) is bool
        need(signed, self.name, "sign_magnitude", self.sign_magnitude, "true or false")

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows in 32s because flags are packed along n; columns in whole groups and whole words."""
        return {"n": 32, "k": lcm(32, max(self.group_size, 1))}

    @property
    def largest(self) -> int:
        """The largest base integer, 127 or 32767: shifted codes then always fit the base width."""
        return int(2 ** (self.base_bits - 1) - 1)

    @property
    def flag_bits(self) -> int:
        """Width of a flag: it is at most `base_bits` - `bits`."""
        return (self.base_bits - self.bits).bit_length()

    def layout(self, n: int, k: int) -> Layout:
        """Codes along k, flags along n, and the scale of each row."""
        groups, words = _bits.groups_in(k, self.group_size), _bits.words_for(k, self.bits)
        out = {"nibbles": Field((n, words), torch.int32, ("n", "word"), "signed codes, bit-packed along k")}
        if self.flag_bits:
            across = (groups, _bits.words_for(n, self.flag_bits))
            out["flags"] = Field(across, torch.int32, ("group", "word"), "bits razored off, bit-packed along n")
        return out | {"scales": Field((n,), torch.float32, ("n",), "value of 1 in a row's integers")}

    def resolve(self, w: Tensor) -> "Sdr":
        """Itself: scales are float32."""
        return self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for a code or flag that does not fit, or scales that vary."""
        scales = fields["scales"]
        if not scales.equal(scales[:, :1].expand_as(scales)):
            raise LayoutError("scales: expected one scale a row, found several.")
        out = {"nibbles": _bits.pack_bits(fields["codes"], self.bits)}
        if self.flag_bits:
            out["flags"] = _bits.pack_across(fields["flags"].to(torch.uint8), self.flag_bits)
        return out | {"scales": scales[:, 0].contiguous()}

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        groups = _bits.groups_in(k, self.group_size)
        flags = torch.zeros(n, groups, dtype=torch.float32, device=packed["scales"].device)
        if self.flag_bits:
            flags = _bits.unpack_across(packed["flags"], self.flag_bits, n).to(torch.float32)
        return {
            "codes": _bits.unpack_bits(packed["nibbles"], self.bits, k),
            "flags": flags,
            "scales": packed["scales"].unsqueeze(1).expand(n, groups).contiguous(),
        }

    def decode(self, fields: Tensors) -> Tensor:
        """Signed code times 2^flag, an exact integer, times the scale; float32 [n, k]."""
        out = self.signed(fields["codes"])
        for part, groups in _bits.grouped(out, self.group_size):
            part.mul_(torch.exp2(fields["flags"])[:, groups, None]).mul_(fields["scales"][:, groups, None])
        return out

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields with every code and flag, and a scale for each row."""
        groups = _bits.groups_in(k, self.group_size)
        flags = torch.randint(0, self.base_bits - self.bits + 1, (n, groups), generator=rng, device=rng.device)
        scales = _random.scales(rng, torch.float32, n, 1, size=2.0**-self.base_bits)
        codes = _random.codes(rng, self.bits, n, k)
        return {"codes": codes, "flags": flags.float(), "scales": scales.expand(n, groups)}

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse scales that are not finite or are zero, and flags beyond the base width. Raises `LayoutError`."""
        scales = packed["scales"]
        if not (torch.isfinite(scales) & (scales != 0)).all():
            raise LayoutError(f"{where}.scales: expected finite scales other than 0, found NaN, infinity or 0.")
        if self.flag_bits:
            flags = _bits.unpack_across(packed["flags"], self.flag_bits, n)
            if int(flags.max()) > self.base_bits - self.bits:
                most = self.base_bits - self.bits
                raise LayoutError(f"{where}.flags: expected at most {most}, found {int(flags.max())}.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        out = {"nibbles": _bits.cut_words(packed["nibbles"][slice(*rows)], self.bits, *columns)}
        if self.flag_bits:
            groups = _bits.cut_groups(self.group_size, columns)
            out["flags"] = _bits.cut_words(packed["flags"][groups], self.flag_bits, *rows)
        return out | {"scales": _bits.copy_of(packed["scales"][slice(*rows)])}

    # ---- IntegerFormat ----------------------------------------------------------------------------

    @property
    def not_integers(self) -> str | None:
        """Shifted codes have the width of the base."""
        return None if self.base_bits == 8 else f"its integers have {self.base_bits} bits; 8 can be multiplied"

    @property
    def integer_group(self) -> int:
        """A row has one scale: flags are in the integers."""
        return -1

    @property
    def integer_bits(self) -> int:
        """That of the base."""
        return 8

    def integers(self, packed: Tensors, n: int, k: int) -> Integers:
        """Codes shifted by their group's flag, one scale a row."""
        fields = self.unpack(packed, n, k)
        whole = self.signed(fields["codes"])
        for part, groups in _bits.grouped(whole, self.group_size):
            part.mul_(torch.exp2(fields["flags"])[:, groups, None])
        return Integers(whole.to(torch.int8), packed["scales"].unsqueeze(1), None, -1)

    # ---- ScalarGrid -------------------------------------------------------------------------------

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> Tensor:
        """The scale of each row of w [n, k], float32 [n, 1]; an all-zero row has the scale 1."""
        scales = (w.abs().amax(1, keepdim=True) / self.largest).clamp(min=_SMALLEST)
        return scales.masked_fill(scales == _SMALLEST, 1.0)

    def fit(self, w: Tensor, weight: Tensor | None, state: Tensor, j0: int) -> dict[str, Tensor]:
        """Flags of a group w [n, g] from the leading bit of its largest integer; float32 [n, 1]."""
        integers = (w.abs().amax(1, keepdim=True) / state).round().clamp(max=self.largest)
        length = torch.frexp(integers).exponent.to(torch.float32)  # of m >= 1 its length in bits; of 0, 0
        return {"flags": (length - (self.bits - 1)).clamp(min=0), "scales": state}

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """round(w / (scale 2^flag)), half to even, clamped to the codes there are; the low bits, uint8 [n, c]."""
        top = 2 ** (self.bits - 1)
        signed = (w / params["scales"] / torch.exp2(params["flags"])).round_()
        signed.clamp_(1 - top if self.sign_magnitude else -top, top - 1)
        below = signed < 0
        low: Tensor = signed.abs() + below * top if self.sign_magnitude else signed + below * (2 * top)
        return low.to(torch.uint8)

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """Signed code times 2^flag times the scale, float32 [n, c]."""
        return self.signed(codes).mul_(torch.exp2(params["flags"])).mul_(params["scales"])

    def signed(self, codes: Tensor) -> Tensor:
        """Codes as signed numbers, float32."""
        top = 2 ** (self.bits - 1)
        low: Tensor = codes.to(torch.float32)
        if self.sign_magnitude:
            return low.where(low < top, top - low)
        return low.where(low < top, low - 2 * top)


plugin = Sdr
