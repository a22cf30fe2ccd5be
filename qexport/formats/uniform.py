"""Evenly spaced levels in groups along k: the grid of RTN, GPTQ and AWQ."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats import _bits, _random
from qexport.formats.base import Integers, RowWise
from qexport.schema import Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Uniform(RowWise):
    """Value = (code - zero) * scale, with one scale and one integer zero for each group of a row.

    Fields: `codes` uint8 [n, k]; `scales` float32 [n, groups]; `zeros` float32 [n, groups], unless symmetric: then the
    zero of every group is 2^(bits - 1) and not stored.

    Min-max fit. Symmetric: scale = max |w| / (2^(bits - 1) - 1); code 0 lies one step beyond the largest weight.
    Asymmetric: the range [lo, hi] always takes in 0, so that 0 is a level and the zero fits in `bits` bits.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; need not divide k (the last group is shorter); -1 is one group a row.
        symmetric: no zeros are stored.
        scale_dtype: `"float16"` or `"bfloat16"`.
    """

    name: ClassVar[str] = "uniform"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Jacob et al., arXiv:1712.05877, in groups along k"

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        need = _bits.require
        need(_bits.is_int(self.bits, 2, 8), self.name, "bits", self.bits, "a whole number from 2 to 8")
        _bits.require_group_size(self.group_size, self.name)
        need(type(self.symmetric) is bool, self.name, "symmetric", self.symmetric, "true or false")
        need(self.scale_dtype in tuple(_DTYPES), self.name, "scale_dtype", self.scale_dtype, " or ".join(_DTYPES))

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows in 32s because zeros are packed along n; columns in whole groups and whole words."""
        return {"n": 1 if self.symmetric else 32, "k": lcm(32, max(self.group_size, 1))}

    def layout(self, n: int, k: int) -> Layout:
        """Codes along k, scales, and zeros along n."""
        groups = _bits.groups_in(k, self.group_size)
        shape, scale_dtype = (n, _bits.words_for(k, self.bits)), _DTYPES[self.scale_dtype]
        out = {
            "qweight": Field(shape, torch.int32, ("n", "word"), "codes, bit-packed along k"),
            "scales": Field((n, groups), scale_dtype, ("n", "group"), "distance of two levels"),
        }
        if not self.symmetric:
            shape = (groups, _bits.words_for(n, self.bits))
            out["qzeros"] = Field(shape, torch.int32, ("group", "word"), "codes of zero, bit-packed along n")
        return out

    def resolve(self, w: Tensor) -> "Uniform":
        """bfloat16 scales if that of a nonzero group of w [n, k] would leave float16's normal range; the same bytes."""
        if self.scale_dtype != "float16":
            return self
        limits = torch.finfo(torch.float16)
        for part, _ in _bits.grouped(w, self.group_size):
            scale = self._range(part)[1]
            if ((scale > limits.max) | ((scale < limits.smallest_normal) & (scale > 0))).any():
                return replace(self, scale_dtype="bfloat16")
        return self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for a code that does not fit in `bits` bits."""
        out = {
            "qweight": _bits.pack_bits(fields["codes"], self.bits),
            "scales": fields["scales"].to(_DTYPES[self.scale_dtype]).contiguous(),
        }
        if not self.symmetric:
            out["qzeros"] = _bits.pack_across(fields["zeros"].to(torch.uint8), self.bits)
        return out

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        out = {
            "codes": _bits.unpack_bits(packed["qweight"], self.bits, k),
            "scales": packed["scales"].to(torch.float32),
        }
        if not self.symmetric:
            out["zeros"] = _bits.unpack_across(packed["qzeros"], self.bits, n).to(torch.float32)
        return out

    def decode(self, fields: Tensors) -> Tensor:
        """(code - zero) * scale, float32 [n, k]: an exact difference, one rounding."""
        out = fields["codes"].to(torch.float32)
        for part, groups in _bits.grouped(out, self.group_size):
            zeros = 2 ** (self.bits - 1) if self.symmetric else fields["zeros"][:, groups, None]
            part.sub_(zeros).mul_(fields["scales"][:, groups, None])
        return out

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields with every code, scales and zeros."""
        groups, dtype = _bits.groups_in(k, self.group_size), _DTYPES[self.scale_dtype]
        scales = _random.scales(rng, dtype, n, groups, size=2.0**-self.bits)
        out = {"codes": _random.codes(rng, self.bits, n, k), "scales": scales}
        return out if self.symmetric else out | {"zeros": _random.codes(rng, self.bits, n, groups).float()}

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse scales that are not finite or are zero; every code is a valid one. Raises `LayoutError`."""
        scales = packed["scales"]
        if not (torch.isfinite(scales) & (scales != 0)).all():
            raise LayoutError(f"{where}.scales: expected finite scales other than 0, found NaN, infinity or 0.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        own, groups = slice(*rows), _bits.cut_groups(self.group_size, columns)
        out = {
            "qweight": _bits.cut_words(packed["qweight"][own], self.bits, *columns),
            "scales": _bits.copy_of(packed["scales"][own, groups]),
        }
        if not self.symmetric:
            out["qzeros"] = _bits.cut_words(packed["qzeros"][groups], self.bits, *rows)
        return out

    # ---- IntegerFormat ----------------------------------------------------------------------------

    @property
    def not_integers(self) -> str | None:
        """Always integers."""
        return None

    @property
    def integer_group(self) -> int:
        """Those of the codes."""
        return self.group_size

    @property
    def integer_bits(self) -> int:
        """That of the codes."""
        return self.bits

    def integers(self, packed: Tensors, n: int, k: int) -> Integers:
        """Codes less 2^(bits - 1), so that they are signed, and zeros likewise."""
        middle = 2 ** (self.bits - 1)
        codes = _bits.unpack_bits(packed["qweight"], self.bits, k).to(torch.int16).sub_(middle).to(torch.int8)
        zeros = None
        if not self.symmetric:
            zeros = _bits.unpack_across(packed["qzeros"], self.bits, n).to(torch.int32).sub_(middle)
        return Integers(codes, packed["scales"].to(torch.float32), zeros, self.group_size)

    # ---- ScalarGrid -------------------------------------------------------------------------------

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> None:
        """Nothing is decided ahead of the groups."""

    def fit(self, w: Tensor, weight: Tensor | None, state: None, j0: int) -> dict[str, Tensor]:
        """Min-max parameters of a group w [n, g]: `scales` and, if asymmetric, `zeros`, float32 [n, 1].

        An all-zero group, and one whose scale is too small for `scale_dtype`, get the scale 1 and decode to 0.
        """
        lo, scale = self._range(w)
        scale = scale.to(_DTYPES[self.scale_dtype]).to(torch.float32)
        scale.masked_fill_(scale == 0, 1)
        if self.symmetric:
            return {"scales": scale}
        # lo <= 0: abs is the sign change that leaves no negative zero, which integers could not give back.
        return {"scales": scale, "zeros": lo.div_(scale).abs_().round_().clamp_(max=2**self.bits - 1)}

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """round(zero + w / scale), half to even, clamped to the codes there are; uint8 [n, c]."""
        scales = params["scales"]
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if self.symmetric else params["zeros"]
        return torch.addcdiv(zeros, w, scales).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """(code - zero) * scale, float32 [n, c]."""
        if self.symmetric:
            return codes.to(torch.float32).sub_(2 ** (self.bits - 1)).mul_(params["scales"])
        return torch.sub(codes, params["zeros"]).mul_(params["scales"])

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Lower end of the range and distance of two levels, unrounded, along the last axis (kept); NaN stays NaN."""
        lo, hi = (t.unsqueeze(-1) for t in _bits.range_of(w))
        if self.symmetric:
            return lo, torch.maximum(hi, -lo).div_(2 ** (self.bits - 1) - 1)
        lo, hi = lo.clamp_(max=0), hi.clamp_(min=0)
        return lo, (hi - lo).div_(2**self.bits - 1)


plugin = Uniform
