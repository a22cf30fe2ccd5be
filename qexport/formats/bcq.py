"""BCQ: binary-coded weights. Each is a sum of a few signed numbers of its group; the signs are stored as bit planes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport import schema
from qexport.errors import LayoutError
from qexport.formats import _binary, _bits, _random
from qexport.formats.base import RowWise
from qexport.schema import Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ROUNDS = 15
EARLY = 6  # rounds after which the better of two starts has shown itself
_SPREAD = 0.8  # of the range: where evenly spaced levels start from


@dataclass(frozen=True)
class Bcq(RowWise):
    """Value = offset + alpha_0 b_0 + alpha_1 b_1 + ..., with every b_i = 2 bit_i - 1 and the sum taken in this order.

    Fields: `codes` uint8 [n, k], whose bit i is the bit of plane i; `alpha` float32 [n, groups, bits]; `offset` float32
    [n, groups], unless it is left out.

    Planes as in LUT-GEMM (Park et al., arXiv:2206.09557), fitted in alternation (Xu et al., arXiv:1802.00150). The
    offset is a plane that is +1 everywhere: without it the levels lie symmetrically around 0. Evenly spaced levels are
    the case alpha_i = scale 2^i / 2, so every `uniform` weight is one of these too; see `from_uniform`.

    Attributes:
        bits: planes, 1 to 8.
        group_size: columns that share alpha and offset; need not divide k (the last group is shorter); -1 is one a row.
        offset: `"same"` stores it in `scale_dtype`, `"float32"` as that, `"none"` has none.
        scale_dtype: `"float16"`, `"bfloat16"` or `"float32"`, of alpha.
    """

    name: ClassVar[str] = "bcq"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Park et al., LUT-GEMM, arXiv:2206.09557"

    bits: int = 4
    group_size: int = 128
    offset: str = "same"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        need = _bits.require
        need(_bits.is_int(self.bits, 1, 8), self.name, "bits", self.bits, "a whole number from 1 to 8")
        _bits.require_group_size(self.group_size, self.name)
        need(self.offset in ("same", "float32", "none"), self.name, "offset", self.offset, "same, float32 or none")
        need(self.scale_dtype in tuple(_DTYPES), self.name, "scale_dtype", self.scale_dtype, ", ".join(_DTYPES))

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows anywhere; columns in whole groups and whole words."""
        return {"n": 1, "k": lcm(32, max(self.group_size, 1))}

    @property
    def clips(self) -> bool:
        """The fit minimises the squared error itself: a shrunk range has nothing to offer."""
        return False

    def layout(self, n: int, k: int) -> Layout:
        """Planes of bits along k, and the numbers that they are the signs of."""
        groups, kept = _bits.groups_in(k, self.group_size), _DTYPES[self.scale_dtype]
        planes = (self.bits, n, _bits.words_for(k, 1))
        out = {
            "binary": Field(planes, torch.int32, ("plane", "n", "word"), "bit planes along k; 1 is +1, 0 is -1"),
            "alpha": Field((n, groups, self.bits), kept, ("n", "group", "plane"), "what each plane is the sign of"),
        }
        if self.offset != "none":
            dtype = torch.float32 if self.offset == "float32" else kept
            out["offset"] = Field((n, groups), dtype, ("n", "group"), "constant of a group")
        return out

    def resolve(self, w: Tensor) -> "Bcq":
        """bfloat16 if a nonzero group of w [n, k] has alphas outside of float16's normal range; the same bytes."""
        if self.scale_dtype != "float16":
            return self
        limits = torch.finfo(torch.float16)
        for part, _ in _bits.grouped(w, self.group_size):
            largest = part.abs().amax(-1)
            small = largest / 2**self.bits < limits.smallest_normal
            if ((largest > limits.max) | (small & (largest > 0))).any():
                return replace(self, scale_dtype="bfloat16")
        return self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for a code that does not fit in `bits` bits."""
        codes = fields["codes"]
        _bits.check_codes(codes, self.bits)
        out = {"binary": torch.stack([_bits.pack_bits(codes >> i & 1, 1) for i in range(self.bits)])}
        for name, field in self.layout(*codes.shape).items():
            if name not in out:
                out[name] = fields[name].to(field.dtype).contiguous()
        return out

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        codes = torch.zeros(n, k, dtype=torch.uint8, device=packed["binary"].device)
        for i in range(self.bits):
            codes |= _bits.unpack_bits(packed["binary"][i], 1, k) << i
        numbers = {name: packed[name].to(torch.float32) for name in packed if name in ("alpha", "offset")}
        return {"codes": codes, **numbers}

    def decode(self, fields: Tensors) -> Tensor:
        """Offset, then plane after plane added or subtracted; float32 [n, k]."""
        codes = fields["codes"]
        out = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        own, grouped = _bits.grouped(codes, self.group_size), _bits.grouped(out, self.group_size)
        for (bits, groups), (part, _) in zip(own, grouped, strict=True):
            if self.offset != "none":
                part += fields["offset"][:, groups, None]
            for i in range(self.bits):
                signs = (bits >> i & 1).to(torch.float32).mul_(2).sub_(1)
                part += signs.mul_(fields["alpha"][:, groups, i, None])
        return out

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields with every code; alphas and offsets are normal."""
        out = {"codes": _random.codes(rng, self.bits, n, k)}
        for name, field in self.layout(n, k).items():
            if name != "binary":
                out[name] = _random.normal(rng, field.dtype, *schema.bind(field, {}))
        return out

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse numbers that are not finite; every bit is a valid one. Raises `LayoutError`."""
        for name in ("alpha", "offset"):
            if name in packed and not torch.isfinite(packed[name]).all():
                raise LayoutError(f"{where}.{name}: expected finite values, found NaN or infinity.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        own, groups = slice(*rows), _bits.cut_groups(self.group_size, columns)
        out = {"binary": _bits.cut_words(packed["binary"][:, own], 1, *columns)}
        return out | {name: _bits.copy_of(packed[name][own, groups]) for name in packed if name != "binary"}

    # ---- ScalarGrid -------------------------------------------------------------------------------

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> None:
        """Nothing is decided ahead of the groups."""

    def fit(self, w: Tensor, weight: Tensor | None, state: None, j0: int) -> dict[str, Tensor]:
        """Alternating least squares; see `alternated`."""
        return self.alternated(w, weight, _ROUNDS, evenly=True)

    def alternated(self, w: Tensor, weight: Tensor | None, rounds: int, *, evenly: bool) -> dict[str, Tensor]:
        """Fit a group w [n, g] from the greedy start and, if `evenly`, from evenly spaced levels too.

        Both starts get the first `EARLY` rounds; then each row goes on from the better one. With no rounds the start is
        the result.
        """
        w, unit = _binary.normalised(w)
        constant, early = self.offset != "none", min(rounds, EARLY)
        found = _binary.alternate(w, weight, *_binary.greedy(w, weight, self.bits, constant), early)
        if evenly:
            start = _binary.spread(w, self.bits, constant, _SPREAD)
            found = _binary.better(w, weight, found, _binary.alternate(w, weight, *start, early))
        return self.rounded(*_binary.alternate(w, weight, *found, rounds - early), unit)

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """Codes of the nearest levels, uint8 [n, c]."""
        _, bounds, codes = self._tables(params)
        return _binary.nearest_code(w, bounds, codes)

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """Levels of the codes, float32 [n, c]."""
        return self._tables(params)[0].gather(1, codes.long())

    def rounded(self, alpha: Tensor, offset: Tensor | None, unit: Tensor) -> dict[str, Tensor]:
        """Parameters of one group, as they will be stored, from alpha [n, bits] and offset [n] in units [n, 1].

        Derived from them for `nearest` and `value`: `_levels`, and what `sorted_levels` makes of these.
        """
        kept = _DTYPES[self.scale_dtype]
        out = {"alpha": (alpha * unit).to(kept).to(torch.float32).unsqueeze(1)}
        if offset is not None:
            constant = offset * unit.squeeze(1)
            out["offset"] = (constant.to(kept).to(torch.float32) if self.offset == "same" else constant).unsqueeze(1)
        levels, bounds, codes = self._tables(out)
        return {**out, "_levels": levels, "_bounds": bounds, "_codes": codes}

    def _tables(self, params: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        if "_levels" in params:
            return params["_levels"], params["_bounds"], params["_codes"]
        offset = params.get("offset")
        levels = _binary.levels_of(params["alpha"].squeeze(1), None if offset is None else offset.squeeze(1))
        return levels, *_binary.sorted_levels(levels)


def from_uniform(fields: Tensors, bits: int, group_size: int) -> tuple[Bcq, dict[str, Tensor]]:
    """The same weights as bit planes: fields of a `uniform` weight to a format and fields that decode to equal bits.

    Plane i carries bit i of the code, alpha_i = scale 2^(i - 1), offset = scale ((2^bits - 1) / 2 - zero). All of it is
    multiples of scale / 2 with fewer than 24 bits, so that float32 sums are exact.

    Args:
        fields: `codes` uint8 [n, k], `scales` float32 [n, groups] and, unless symmetric, `zeros` float32 [n, groups].
        bits: width of the codes.
        group_size: of both.
    """
    scales = fields["scales"]
    zeros = fields["zeros"] if "zeros" in fields else torch.full_like(scales, 2.0 ** (bits - 1))
    alpha = scales.unsqueeze(-1) * 2.0 ** torch.arange(-1, bits - 1, dtype=torch.float32, device=scales.device)
    # Half of a float16 scale may have no place in float16.
    exact = next(name for name, dtype in _DTYPES.items() if alpha.to(dtype).to(torch.float32).equal(alpha))
    fmt = Bcq(bits=bits, group_size=group_size, offset="float32", scale_dtype=exact)
    return fmt, {"codes": fields["codes"], "alpha": alpha, "offset": scales * ((2**bits - 1) / 2 - zeros)}


plugin = Bcq
