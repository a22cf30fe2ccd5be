"""SpQR: small groups whose scales and zeros are quantized themselves, and a sparse matrix of outliers on top."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats import _bits, _random
from qexport.schema import Extents, Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_USUAL_RATE = 0.01
_FINEST = 1 / 64  # least step of the second level, relative to its largest value: its zero stays within -64..0
_LEAST_SCALE = 2**-10  # least scale of a group, relative to the step of its block: none decodes to 0


@dataclass(frozen=True)
class Spqr:
    """Value = scale * (code - zero) [+ outlier], with scale and zero quantized over blocks of consecutive rows.

        scale = scale_step * (scale_code - scale_zero)        zero = zero_step * (zero_code - zero_zero)

    Fields: `codes` uint8 [n, k]; `scale_codes` and `zero_codes` uint8 [n, groups]; `stats` float32 [blocks, groups, 4],
    (scale_step, scale_zero, zero_step, zero_zero) of each block of `stats_group` rows; the outliers as a CSR matrix,
    `outlier_rows` int32 [n + 1], `outlier_columns` int32 [nnz], ascending within a row, `outlier_values` float32 [nnz]:
    the weight *minus its dense value*, in `outlier_dtype`'s precision.

    Outlier fields may be left out: a method that uses the format as a mere `ScalarGrid` has none.

    Follows Dettmers et al., SpQR, arXiv:2306.03078. Different from the authors' code: outliers are a difference, so the
    reader adds and the dense part needs no hole; a group's range always takes in 0, so that its zero lies in
    0..2^bits - 1 and one lopsided group can't coarsen the zeros of its 15 neighbours (of normally distributed groups of
    16, one in 30,000 is touched); an all-zero group decodes to 0, or as close as `scale_dtype` comes.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; need not divide k (the last group is shorter); -1 is one group a row.
        scale_bits: width of a scale's code, 1 to 8.
        zero_bits: width of a zero's code, 1 to 8.
        stats_group: consecutive rows whose scales and zeros share steps; the last block may have fewer.
        scale_dtype: `"float16"` or `"bfloat16"`, of the steps and of the outliers.
    """

    name: ClassVar[str] = "spqr"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Dettmers et al., arXiv:2306.03078"

    bits: int = 3
    group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    stats_group: int = 16
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        need, whole = _bits.require, _bits.is_int
        need(whole(self.bits, 2, 8), self.name, "bits", self.bits, "a whole number from 2 to 8")
        _bits.require_group_size(self.group_size, self.name)
        for option in ("scale_bits", "zero_bits"):
            value = getattr(self, option)
            need(whole(value, 1, 8), self.name, option, value, "a whole number from 1 to 8")
        need(whole(self.stats_group, 1, 2**16), self.name, "stats_group", self.stats_group, "a number from 1 to 65536")
        need(self.scale_dtype in tuple(_DTYPES), self.name, "scale_dtype", self.scale_dtype, " or ".join(_DTYPES))

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows in whole blocks and 32s, because second-level codes are packed along n; columns in groups and words."""
        return {"n": lcm(32, self.stats_group), "k": lcm(32, max(self.group_size, 1))}

    @property
    def row_block(self) -> int:
        """Rows that share second-level steps."""
        return self.stats_group

    @property
    def outlier_dtype(self) -> torch.dtype:
        """Stored dtype of outlier values: a method rounds to it."""
        return _DTYPES[self.scale_dtype]

    @property
    def clips(self) -> bool:
        """The fit spans the whole range: a shrunk one may have less error."""
        return True

    def layout(self, n: int, k: int) -> Layout:
        """Codes along k, second-level codes along n, steps of each block, and the outliers in CSR form."""
        groups, steps = _bits.groups_in(k, self.group_size), _DTYPES[self.scale_dtype]
        across, word, blocks = ("group", "word"), torch.int32, -(-n // self.stats_group)
        scale_words, zero_words = _bits.words_for(n, self.scale_bits), _bits.words_for(n, self.zero_bits)
        columns = torch.uint16 if k <= 65536 else torch.int32
        four = "scale_step, scale_zero, zero_step, zero_zero"
        return {
            "qweight": Field((n, _bits.words_for(k, self.bits)), word, ("n", "word"), "codes, bit-packed along k"),
            "qscales": Field((groups, scale_words), word, across, "codes of the scales, bit-packed along n"),
            "qzeros": Field((groups, zero_words), word, across, "codes of the zeros, bit-packed along n"),
            "stats": Field((blocks, groups, 4), steps, ("block", "group", "stat"), f"{four} of a block of rows"),
            "outlier_rows": Field((n + 1,), torch.int32, ("n",), "where each row's outliers start; the last is nnz"),
            "outlier_columns": Field(("nnz",), columns, ("nnz",), "column of each outlier, ascending within a row"),
            "outlier_values": Field(("nnz",), steps, ("nnz",), "what is added to the dense value"),
        }

    def expected_extents(self, n: int, k: int) -> Extents:
        """`nnz` at the paper's usual rate of 1 %; a method that knows better says so."""
        return {"nnz": round(_USUAL_RATE * n * k)}

    def sized(self, n: int, k: int) -> "Spqr":
        """Itself: no option depends on the size."""
        return self

    def resolve(self, w: Tensor) -> "Spqr":
        """bfloat16 where float16 would overflow, or hold a step of w [n, k] in fewer than bfloat16's 8 bits."""
        if self.scale_dtype != "float16":
            return self
        limits = torch.finfo(torch.float16)
        wide = bool((w.abs() > limits.max).any())
        for part, _ in _bits.grouped(w, self.group_size):
            _, hi, step = self._steps(self._blocks(self._first(*_bits.range_of(part))[0]), self.scale_bits)
            wide = wide or bool(((step < limits.smallest_normal / 4) & (hi > 0)).any())
        return replace(self, scale_dtype="bfloat16") if wide else self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for a code that does not fit."""
        fields = _with_outliers(fields)
        n, k = fields["codes"].shape
        out = {
            "qweight": _bits.pack_bits(fields["codes"], self.bits),
            "qscales": _bits.pack_across(fields["scale_codes"], self.scale_bits),
            "qzeros": _bits.pack_across(fields["zero_codes"], self.zero_bits),
        }
        for name, field in self.layout(n, k).items():
            if name not in out:
                out[name] = fields[name].to(field.dtype).contiguous()
        return out

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        return {
            "codes": _bits.unpack_bits(packed["qweight"], self.bits, k),
            "scale_codes": _bits.unpack_across(packed["qscales"], self.scale_bits, n),
            "zero_codes": _bits.unpack_across(packed["qzeros"], self.zero_bits, n),
            "stats": packed["stats"].to(torch.float32),
            "outlier_rows": packed["outlier_rows"],
            "outlier_columns": packed["outlier_columns"].to(torch.int32),
            "outlier_values": packed["outlier_values"].to(torch.float32),
        }

    def decode(self, fields: Tensors) -> Tensor:
        """The dense part, scale * (code - zero), then the outliers added; float32 [n, k]."""
        fields = _with_outliers(fields)
        out = fields["codes"].to(torch.float32)
        scales, zeros = self.parameters(fields)
        for part, groups in _bits.grouped(out, self.group_size):
            part.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
        rows, columns = _row_of(fields["outlier_rows"], fields["outlier_values"]), fields["outlier_columns"].long()
        out[rows, columns] = out[rows, columns] + fields["outlier_values"]  # positions are unique: any order will do
        return out

    def parameters(self, fields: Tensors) -> tuple[Tensor, Tensor]:
        """Scales and zeros of all groups, both levels joined: float32 [n, groups] each."""
        return self._scales(fields), self._zeros(fields)

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields with every code of both levels, positive scales, and outliers at the usual rate."""
        groups, dtype = _bits.groups_in(k, self.group_size), _DTYPES[self.scale_dtype]
        live = torch.rand(n, k, generator=rng, device=rng.device) < _USUAL_RATE
        starts = torch.nn.functional.pad(live.sum(1).cumsum(0), (1, 0))
        sizes = (2.0 ** -(self.bits + self.scale_bits), 1.0, 2.0 ** (self.bits - self.zero_bits), 1.0)
        stats = [_random.scales(rng, dtype, -(-n // self.stats_group), groups, size=size) for size in sizes]
        stats[1].neg_()
        return {
            "codes": _random.codes(rng, self.bits, n, k),
            "scale_codes": _random.codes(rng, self.scale_bits, n, groups),
            "zero_codes": _random.codes(rng, self.zero_bits, n, groups),
            "stats": torch.stack(stats, 2),
            "outlier_rows": starts.int(),
            "outlier_columns": live.nonzero()[:, 1].int(),
            "outlier_values": _random.normal(rng, dtype, int(starts[-1])),
        }

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse numbers that are not finite, scales that are not positive and a CSR matrix that is none."""
        for name in ("stats", "outlier_values"):
            if not torch.isfinite(packed[name]).all():
                raise LayoutError(f"{where}.{name}: expected finite values, found NaN or infinity.")
        codes = _bits.unpack_across(packed["qscales"], self.scale_bits, n)
        scales = self._scales({"scale_codes": codes, "stats": packed["stats"].to(torch.float32)})
        if not ((scales > 0) & (scales < inf)).all():
            raise LayoutError(f"{where}.stats: expected steps that make every scale positive and finite.")
        _check_csr(packed["outlier_rows"], packed["outlier_columns"], k, where)

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        groups = _bits.cut_groups(self.group_size, columns)
        blocks = slice(rows[0] // self.stats_group, -(-rows[1] // self.stats_group))
        row = _row_of(packed["outlier_rows"], packed["outlier_values"])
        column = packed["outlier_columns"].to(torch.int32)
        inside = (row >= rows[0]) & (row < rows[1]) & (column >= columns[0]) & (column < columns[1])
        counts = torch.bincount(row[inside] - rows[0], minlength=rows[1] - rows[0])
        starts = torch.zeros(rows[1] - rows[0] + 1, dtype=torch.int32, device=row.device)
        starts[1:] = counts.cumsum(0)
        dtype = self.layout(rows[1] - rows[0], columns[1] - columns[0])["outlier_columns"].dtype
        return {
            "qweight": _bits.cut_words(packed["qweight"][slice(*rows)], self.bits, *columns),
            "qscales": _bits.cut_words(packed["qscales"][groups], self.scale_bits, *rows),
            "qzeros": _bits.cut_words(packed["qzeros"][groups], self.zero_bits, *rows),
            "stats": _bits.copy_of(packed["stats"][blocks, groups]),
            "outlier_rows": starts,
            "outlier_columns": (column[inside] - columns[0]).to(dtype),
            "outlier_values": packed["outlier_values"][inside],
        }

    # ---- ScalarGrid -------------------------------------------------------------------------------

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> None:
        """Nothing is decided ahead of the groups."""

    def fit(self, w: Tensor, weight: Tensor | None, state: None, j0: int) -> dict[str, Tensor]:
        """Both levels for a group w [n, g].

        Returns:
            `scale_codes`, `zero_codes` uint8 [n, 1], `stats` float32 [blocks, 1, 4], and, derived from these for
            `nearest` and `value`, `_scales` and `_zeros` float32 [n, 1].
        """
        n = w.shape[0]
        scale, zero = (self._blocks(t) for t in self._first(*_bits.range_of(w)))
        blank = scale == 0
        if blank.any():
            least = scale.masked_fill(blank, inf).amin(1, keepdim=True)
            scale = torch.where(blank, least.masked_fill(least == inf, 1), scale)
            least = zero.masked_fill(blank, inf).amin(1, keepdim=True)
            zero = torch.where(blank, least.masked_fill(least == inf, 0), zero)
        scale_codes, scale_step, scale_zero = self._second(scale, self.scale_bits, -_LEAST_SCALE)
        zero_codes, zero_step, zero_zero = self._second(zero, self.zero_bits, 0)
        if blank.any():
            zero_codes, zero_zero = self._meet_zero(zero, blank, zero_step, zero_zero)
        out = {
            "scale_codes": scale_codes.to(torch.uint8).view(-1, 1)[:n],
            "zero_codes": zero_codes.to(torch.uint8).view(-1, 1)[:n],
            "stats": torch.stack((scale_step, scale_zero, zero_step, zero_zero), dim=-1),
        }
        return {**out, "_scales": self._scales(out), "_zeros": self._zeros(out)}

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """round(zero + w / scale), half to even, clamped to the codes there are; uint8 [n, c]."""
        scaled = torch.addcdiv(self._zeros(params), w, self._scales(params))
        return scaled.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """The dense part alone, scale * (code - zero); float32 [n, c]."""
        return torch.sub(codes, self._zeros(params)).mul_(self._scales(params))

    # ---- the two levels ---------------------------------------------------------------------------

    def spread(self, lo: Tensor, hi: Tensor) -> dict[str, Tensor]:
        """First-level parameters of groups that range from lo to hi, float32 [n, 1]: unrounded, for trial fits."""
        scale, zero = self._first(lo, hi)
        blank = scale == 0
        return {"_scales": scale.masked_fill_(blank, 1), "_zeros": zero.masked_fill_(blank, 0)}

    def _first(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Unrounded scale and zero of each range, in its shape; those of an all-zero one are 0 and NaN."""
        lo = lo.clamp(max=0)
        scale = (hi.clamp(min=0) - lo).div_(2**self.bits - 1)
        return scale, lo.div_(scale).abs_()

    def _blocks(self, values: Tensor) -> Tensor:
        """[n, ...] to [blocks, stats_group, ...]; the last row fills up the last block: its range stays the same."""
        short, rest = -values.shape[0] % self.stats_group, values.shape[1:]
        if short:
            values = torch.cat((values, values[-1:].expand(short, *rest)))
        return values.view(-1, self.stats_group, *rest)

    def _steps(self, blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Least, largest and distance of two levels of each block, unrounded, [blocks, 1, ...]."""
        lo, hi = torch.aminmax(blocks, dim=1, keepdim=True)
        return lo, hi, torch.maximum((hi - lo).div_(2**bits - 1), hi * _FINEST)

    def _second(self, blocks: Tensor, bits: int, largest_zero: float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, float32 [blocks, stats_group], step and zero [blocks, 1], both as they are stored."""
        dtype = _DTYPES[self.scale_dtype]
        limits = torch.finfo(dtype)
        lo, _, step = self._steps(blocks, bits)
        step = step.clamp_(min=limits.smallest_normal * limits.eps).to(dtype).to(torch.float32)
        zero = lo.div_(step).neg_().clamp_(max=largest_zero).to(dtype).to(torch.float32)
        return torch.addcdiv(zero, blocks, step).round_().clamp_(0, 2**bits - 1), step, zero

    def _meet_zero(self, blocks: Tensor, blank: Tensor, step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and zero of the second level of zeros, moved so that all-zero groups can be 0.

        They are only if their zero is an integer. So the zeros of their block all move by what the one closest to an
        integer lacks.
        """
        levels = torch.arange(2**self.zero_bits, device=blocks.device).sub(zero).mul_(step)
        off = levels - levels.round()
        closest = off.abs().argmin(1, keepdim=True)
        moved = (zero + off.gather(1, closest).div_(step)).to(_DTYPES[self.scale_dtype]).to(torch.float32)
        zero = torch.where(blank.any(1, keepdim=True), moved, zero)
        codes = torch.addcdiv(zero, blocks, step).round_().clamp_(0, 2**self.zero_bits - 1)
        return torch.where(blank, closest, codes), zero

    def _levels(self, codes: Tensor, stats: Tensor, at: int) -> Tensor:
        """The second level, step * (code - zero): uint8 [n, groups] to float32."""
        n, groups = codes.shape
        levels = torch.sub(self._blocks(codes), stats[:, None, :, at + 1]).mul_(stats[:, None, :, at])
        return levels.view(-1, groups)[:n]

    def _scales(self, params: Tensors) -> Tensor:
        known = params.get("_scales")
        return self._levels(params["scale_codes"], params["stats"], 0) if known is None else known

    def _zeros(self, params: Tensors) -> Tensor:
        known = params.get("_zeros")
        return self._levels(params["zero_codes"], params["stats"], 2) if known is None else known


def _with_outliers(fields: Tensors) -> Tensors:
    """The fields, with empty outlier fields if there are none."""
    if "outlier_rows" in fields:
        return fields
    codes = fields["codes"]
    return {
        **fields,
        "outlier_rows": codes.new_zeros(codes.shape[0] + 1, dtype=torch.int32),
        "outlier_columns": codes.new_zeros(0, dtype=torch.int32),
        "outlier_values": codes.new_zeros(0, dtype=torch.float32),
    }


def _row_of(starts: Tensor, values: Tensor) -> Tensor:
    """Row of each entry of a CSR matrix, int64 [nnz]."""
    rows = torch.arange(starts.shape[0] - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff().long(), output_size=values.shape[0])


def _check_csr(starts: Tensor, columns: Tensor, k: int, where: str) -> None:
    """Raise `LayoutError` unless row starts and columns make a CSR matrix that a kernel can follow blindly."""
    nnz = columns.shape[0]
    if int(starts[0]) != 0 or int(starts[-1]) != nnz or bool((starts[1:] < starts[:-1]).any()):
        raise LayoutError(f"{where}.outlier_rows: expected 0, never less than the one before, ending with {nnz}.")
    columns = columns.to(torch.int32)
    if nnz and not 0 <= int(columns.min()) <= int(columns.max()) < k:
        found = f"{int(columns.min())} to {int(columns.max())}"
        raise LayoutError(f"{where}.outlier_columns: expected columns from 0 to {k - 1}, found {found}.")
    row = _row_of(starts, columns)
    if bool(((row[1:] == row[:-1]) & (columns[1:] <= columns[:-1])).any()):
        raise LayoutError(f"{where}.outlier_columns: expected columns that ascend strictly within each row.")


plugin = Spqr
