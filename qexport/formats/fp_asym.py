"""Small floating-point and normal-float codes, with a scale of their own for the positive and the negative weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats import _bits, _random
from qexport.formats.base import RowWise
from qexport.schema import Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Levels in the order of the codes. Floats: sign, then magnitude. Normal floats ascend; NF4 is Dettmers et al., QLoRA,
# arXiv:2305.14314, quantiles of the normal distribution with a 0 among them, and NF3 its 3-bit relative as AFPQ has it.
_FP4, _FP3 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (0.0, 1.0, 2.0, 4.0)
TABLES: Mapping[str, tuple[float, ...]] = {
    "fp4": (*_FP4, *(-x for x in _FP4)),
    "fp3": (*_FP3, *(-x for x in _FP3)),
    "nf4": (
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    "nf3": (-1.0, -0.53502274, -0.2469314, 0.0, 0.18333752, 0.38199395, 0.62298566, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class FpAsym(RowWise):
    """Value = level(code) times the scale of its sign: `scales_pos` for levels above 0, `scales_neg` for the others.

    Fields: `codes` uint8 [n, k]; `scales_pos` float32 [n, groups] and, with two scales, `scales_neg` alike.

    AFPQ (Zhang et al., arXiv:2311.01792): weights of a group are seldom spread alike on both sides of 0. With one scale
    it is the plain format, FP4 (E2M1), FP3 or NF4, NF3.

    Attributes:
        code: `"fp4"`, `"fp3"`, `"nf4"` or `"nf3"`.
        group_size: columns that share scales; need not divide k (the last group is shorter); -1 is one group a row.
        two_scales: one for each sign.
        scale_dtype: `"float16"` or `"bfloat16"`.
    """

    name: ClassVar[str] = "fp_asym"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Zhang et al., AFPQ, arXiv:2311.01792"

    code: str = "nf4"
    group_size: int = 128
    two_scales: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        need = _bits.require
        need(self.code in tuple(TABLES), self.name, "code", self.code, ", ".join(TABLES))
        _bits.require_group_size(self.group_size, self.name)
        need(type(self.two_scales) is bool, self.name, "two_scales", self.two_scales, "true or false")
        need(self.scale_dtype in tuple(_DTYPES), self.name, "scale_dtype", self.scale_dtype, " or ".join(_DTYPES))

    @property
    def bits(self) -> int:
        """Width of a code."""
        return len(TABLES[self.code]).bit_length() - 1

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows anywhere; columns in whole groups and whole words."""
        return {"n": 1, "k": lcm(32, max(self.group_size, 1))}

    def layout(self, n: int, k: int) -> Layout:
        """Codes along k and the scales."""
        shape, dtype = (n, _bits.groups_in(k, self.group_size)), _DTYPES[self.scale_dtype]
        words, axes = (n, _bits.words_for(k, self.bits)), ("n", "group")
        out = {
            "qweight": Field(words, torch.int32, ("n", "word"), "codes, bit-packed along k"),
            "scales_pos": Field(shape, dtype, axes, "value of level 1" + " above 0" * self.two_scales),
        }
        if self.two_scales:
            out["scales_neg"] = Field(shape, dtype, axes, "value of level 1 below 0")
        return out

    def resolve(self, w: Tensor) -> "FpAsym":
        """bfloat16 scales if one of w [n, k] would leave float16's normal range; the same bytes."""
        if self.scale_dtype != "float16":
            return self
        limits = torch.finfo(torch.float16)
        for part, _ in _bits.grouped(w, self.group_size):
            for scale in self._range(part):
                if ((scale > limits.max) | ((scale < limits.smallest_normal) & (scale > 0))).any():
                    return replace(self, scale_dtype="bfloat16")
        return self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for a code that does not fit."""
        dtype, scales = _DTYPES[self.scale_dtype], ("scales_pos", "scales_neg")[: 1 + self.two_scales]
        packed = {"qweight": _bits.pack_bits(fields["codes"], self.bits)}
        return packed | {name: fields[name].to(dtype).contiguous() for name in scales}

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        scales = {name: t.to(torch.float32) for name, t in packed.items() if name.startswith("scales")}
        return {"codes": _bits.unpack_bits(packed["qweight"], self.bits, k), **scales}

    def decode(self, fields: Tensors) -> Tensor:
        """Level times scale, float32 [n, k]: one rounding."""
        out = self._levels(fields["codes"])
        for part, groups in _bits.grouped(out, self.group_size):
            part.mul_(self._scale_of(part, fields["scales_pos"], fields.get("scales_neg"), (slice(None), groups, None)))
        return out

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields with every code, and scales."""
        shape, dtype = (n, _bits.groups_in(k, self.group_size)), _DTYPES[self.scale_dtype]
        names = ("scales_pos", "scales_neg")[: 1 + self.two_scales]
        scales = {name: _random.scales(rng, dtype, *shape) for name in names}
        return {"codes": _random.codes(rng, self.bits, n, k), **scales}

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse scales that are not finite or are zero; every code is a valid one. Raises `LayoutError`."""
        for name in ("scales_pos", "scales_neg")[: 1 + self.two_scales]:
            if not (torch.isfinite(packed[name]) & (packed[name] != 0)).all():
                raise LayoutError(f"{where}.{name}: expected finite scales other than 0, found NaN, infinity or 0.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        own, groups = slice(*rows), _bits.cut_groups(self.group_size, columns)
        scales = {name: _bits.copy_of(t[own, groups]) for name, t in packed.items() if name != "qweight"}
        return {"qweight": _bits.cut_words(packed["qweight"][own], self.bits, *columns), **scales}

    # ---- ScalarGrid -------------------------------------------------------------------------------

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> None:
        """Nothing is decided ahead of the groups."""

    def fit(self, w: Tensor, weight: Tensor | None, state: None, j0: int) -> dict[str, Tensor]:
        """Scales of a group w [n, g], float32 [n, 1]: its outermost weights become the outermost levels.

        A side without weights, or with a scale too small for `scale_dtype`, gets the scale 1.
        """
        names = ("scales_pos", "scales_neg")
        stored = [scale.to(_DTYPES[self.scale_dtype]).to(torch.float32) for scale in self._range(w)]
        return {name: s.masked_fill(s == 0, 1).unsqueeze(1) for name, s in zip(names, stored, strict=False)}

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """The code of the level nearest to w over the scale of its sign; uint8 [n, c]."""
        scaled = w / self._scale_of(w, params["scales_pos"], params.get("scales_neg"), ...)
        table = TABLES[self.code]
        levels = sorted(set(table))  # +0 and -0 are one level, whose code is that of +0
        codes = torch.tensor([table.index(level) for level in levels], dtype=torch.uint8, device=w.device)
        bounds = torch.tensor([(a + b) / 2 for a, b in pairwise(levels)], dtype=torch.float32, device=w.device)
        return codes[torch.bucketize(scaled.contiguous(), bounds)]

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """Level times scale, float32 [n, c]."""
        out = self._levels(codes)
        return out.mul_(self._scale_of(out, params["scales_pos"], params.get("scales_neg"), ...))

    def _levels(self, codes: Tensor) -> Tensor:
        return torch.tensor(TABLES[self.code], dtype=torch.float32, device=codes.device)[codes.long()]

    def _scale_of(self, x: Tensor, pos: Tensor, neg: Tensor | None, where: object) -> Tensor:
        """The scale for the sign of each x."""
        return pos[where] if neg is None else torch.where(x > 0, pos[where], neg[where])  # type: ignore[index]

    def _range(self, w: Tensor) -> tuple[Tensor, ...]:
        """Unrounded scales along the last axis, which is dropped: of both signs, or the larger one."""
        lo, hi = _bits.range_of(w)
        table = TABLES[self.code]
        pos, neg = hi.clamp(min=0) / max(table), lo.clamp(max=0) / min(table)
        return (pos, neg) if self.two_scales else (torch.maximum(pos, neg),)


plugin = FpAsym
