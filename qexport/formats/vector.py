"""Vector codebooks: an index names a vector of a codebook, the values of a few consecutive rows in one column."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from qexport import schema
from qexport.errors import LayoutError
from qexport.formats import _bits, _random
from qexport.schema import Extents, Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_WIDEST = 16  # bits of an index
_LONGEST = 32  # rows of a vector
_USUAL = 12  # the most that `sized` decides on: every search goes through all entries
_SHARE = 8  # percent of the bits of the indices that the codebooks may take where `sized` decides
_PEAK = 16  # a column's largest value over its deviation, which is its scale, is seldom more


@dataclass(frozen=True)
class Vector:
    """Value = (codebook entry [+ residual entry]) * column scale + column offset, but for columns kept as they are.

    With v = `vector_length`, V = ceil(n / v) and a codebook for each of G groups of columns, row r is element r % v of
    vector r // v. Fields: `indices` int32 [V, k] into `codebook` float32 [G, 2^index_bits, v]; `residual_indices` and
    `residual_codebook` alike, if `residual_bits`; `column_scales` and `column_offsets` float32 [k], if `normalize`;
    `outlier_index` int32 [c], ascending, and `outlier_values` float32 [n, c], if `outlier_columns`; `rows` int64 [],
    n, which the last vector may go past. It codes several weights at a time, so it is no `ScalarGrid`.

    VPTQ (Liu et al., arXiv:2409.17066). Different from the authors' files: the two indices of a vector, and their bits
    beyond 8, lie in streams of their own; columns stay in place; outlier columns are floats, not a codebook's.

    Attributes:
        bits: nominal bits a weight, 1 to 8, from which `sized` derives what is 0 below.
        vector_length: rows of a vector, 1 to 32; 0: decided by `sized`.
        index_bits: width of an index, 1 to 16; 0: decided by `sized`.
        residual_bits: width of a second index, whose entry is added, 1 to 16; 0: there is none.
        group_size: columns that share a codebook; need not divide k; -1 is one codebook for the matrix.
        normalize: columns have a scale and an offset.
        outlier_columns: columns kept as they are; always fewer than k.
        scale_dtype: `"float16"` or `"bfloat16"`, of all that is not an index.
    """

    name: ClassVar[str] = "vector"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "Liu et al., VPTQ, arXiv:2409.17066"

    bits: int = 2
    vector_length: int = 0
    index_bits: int = 0
    residual_bits: int = 0
    group_size: int = -1
    normalize: bool = True
    outlier_columns: int = 0
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        need = _bits.require
        ranges = (("bits", 1, 8), ("vector_length", 0, _LONGEST), ("index_bits", 0, _WIDEST))
        for option, low, high in (*ranges, ("residual_bits", 0, _WIDEST), ("outlier_columns", 0, 2**31 - 1)):
            value, allowed = getattr(self, option), f"a whole number from {low} to {high}"
            need(_bits.is_int(value, low, high), self.name, option, value, allowed)
        if not self.index_bits:
            allowed = f"at most {_WIDEST // self.bits} at {self.bits} bits, unless index_bits is given"
            need(self.bits * self.vector_length <= _WIDEST, self.name, "vector_length", self.vector_length, allowed)
        _bits.require_group_size(self.group_size, self.name)
        need(type(self.normalize) is bool, self.name, "normalize", self.normalize, "true or false")
        need(self.scale_dtype in tuple(_DTYPES), self.name, "scale_dtype", self.scale_dtype, " or ".join(_DTYPES))

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Rows in whole vectors; columns in whole groups and words, unless some are outliers; nowhere until sized."""
        if not (self.vector_length and self.index_bits):
            return {"n": 0, "k": 0}
        return {"n": self.vector_length, "k": 0 if self.outlier_columns else lcm(32, max(self.group_size, 1))}

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of codebooks, scales, offsets and outliers: a method rounds to it."""
        return _DTYPES[self.scale_dtype]

    def sized(self, n: int, k: int) -> "Vector":
        """Vector length and index width decided for an [n, k] matrix, and fewer than k outlier columns.

        With one given, the other follows from `bits`. With neither, vectors are the longest with indices of at most 12
        bits whose codebooks take at most 8 % of the bits of the indices, but at least 1 row.
        """
        v, width = self.vector_length, self.index_bits
        if not v and width:
            v = min(range(1, _LONGEST + 1), key=lambda rows: abs(width / rows - self.bits))
        elif not v:
            lengths = range(_USUAL // self.bits, 1, -1)
            v = next((rows for rows in lengths if self._codebooks_are_small(rows, n, k)), 1)
        outliers = max(min(self.outlier_columns, k - 1), 0)
        return replace(self, vector_length=v, index_bits=width or self.bits * v, outlier_columns=outliers)

    def _codebooks_are_small(self, v: int, n: int, k: int) -> bool:
        entries = (1 << self.bits * v) + ((1 << self.residual_bits) if self.residual_bits else 0)
        indices = -(-n // v) * k * (self.bits * v + self.residual_bits)
        return 100 * _bits.groups_in(k, self.group_size) * entries * v * 16 <= _SHARE * indices

    @property
    def indexed(self) -> tuple[tuple[str, str, int], ...]:
        """Indices, their codebook and their width; of a sized format."""
        main = ("indices", "codebook", self.index_bits)
        return (main, ("residual_indices", "residual_codebook", self.residual_bits)) if self.residual_bits else (main,)

    def layout(self, n: int, k: int) -> Layout:
        """Indices along k, low bytes apart from what is above, and float tensors."""
        own = self.sized(n, k)
        v, dtype, out = own.vector_length, own.dtype, {}
        vectors, groups = -(-n // v), _bits.groups_in(k, own.group_size)
        for name, codebook, width in own.indexed:
            low, of = min(width, 8), "an index" if codebook == "codebook" else "a second index"
            words, axes = (vectors, _bits.words_for(k, low)), ("vector", "word")
            out[name] = Field(words, torch.int32, axes, f"low {low} bits of {of}, bit-packed along k")
            if width > 8:
                words = (vectors, _bits.words_for(k, width - 8))
                out[f"{name}_high"] = Field(words, torch.int32, axes, f"bits of {of} from 8 on, bit-packed along k")
            doc = f"values of the rows of a vector, by {of.split(' ', 1)[1]}"
            out[codebook] = Field((groups, 2**width, v), dtype, ("group", "entry", "row"), doc)
        if own.normalize:
            out["column_scales"] = Field((k,), dtype, ("k",), "factor of each column")
            out["column_offsets"] = Field((k,), dtype, ("k",), "what is then added to each column")
        if c := own.outlier_columns:
            small = torch.uint16 if k <= 65536 else torch.int32
            out["outlier_index"] = Field((c,), small, ("outlier",), "columns kept as they are, ascending")
            out["outlier_values"] = Field((n, c), dtype, ("n", "outlier"), "their weights")
        return out

    def expected_extents(self, n: int, k: int) -> Extents:
        """None: the layout depends on n and k alone."""
        return {}

    def resolve(self, w: Tensor) -> "Vector":
        """bfloat16 if what codes w [n, k] would leave float16's normal range; the same bytes."""
        if self.scale_dtype != "float16":
            return self
        limits = torch.finfo(torch.float16)
        largest = w.abs().amax(0) if self.normalize else w.abs().max()
        wide = (largest > limits.max) | ((largest < _PEAK * limits.smallest_normal) & (largest > 0))
        return replace(self, scale_dtype="bfloat16") if wide.any() else self

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors; raises `LayoutError` for an index that does not fit."""
        n, k = int(fields["rows"]), fields["indices"].shape[1]
        own, out = self.sized(n, k), {}
        for name, _, width in own.indexed:
            indices = fields[name]
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < 2**width:
                found = f"{int(indices.min())} to {int(indices.max())}"
                raise LayoutError(f"{name}: expected values from 0 to {2**width - 1}, found {found}.")
            out[name] = _bits.pack_bits((indices & 255).to(torch.uint8), min(width, 8))
            if width > 8:
                out[f"{name}_high"] = _bits.pack_bits((indices >> 8).to(torch.uint8), width - 8)
        for name, field in own.layout(n, k).items():
            if name not in out:
                out[name] = fields[name].to(field.dtype).contiguous()
        return out

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        own = self.sized(n, k)
        out = {"rows": torch.tensor(n)}
        for name, _, width in own.indexed:
            out[name] = _bits.unpack_bits(packed[name], min(width, 8), k).to(torch.int32)
            if width > 8:
                out[name] |= _bits.unpack_bits(packed[f"{name}_high"], width - 8, k).to(torch.int32) << 8
        for name in own.layout(n, k):
            if name not in out and not name.endswith("_high"):
                out[name] = packed[name].to(torch.int32 if name == "outlier_index" else torch.float32)
        return out

    def decode(self, fields: Tensors) -> Tensor:
        """Entries looked up and added, times the scale, plus the offset, each rounded; then the outlier columns.

        float32 [n, k], differentiable in the float fields.
        """
        n, k = int(fields["rows"]), fields["indices"].shape[1]
        out = self._entries(fields["indices"], fields["codebook"])[:n]
        if "residual_indices" in fields:
            out = out + self._entries(fields["residual_indices"], fields["residual_codebook"])[:n]
        if "column_scales" in fields:
            out = out * fields["column_scales"] + fields["column_offsets"]
        if "outlier_index" in fields:
            out = out.index_copy(1, fields["outlier_index"].long(), fields["outlier_values"])
        return out.reshape(n, k)

    def _entries(self, indices: Tensor, codebook: Tensor) -> Tensor:
        """Values by row, float32 [V v, k]: indices [V, k] into codebook [G, entries, v]."""
        (vectors, k), (groups, entries, v) = indices.shape, codebook.shape
        at = indices.long()
        if groups > 1:
            at = at + torch.arange(k, device=at.device).div(self.group_size, rounding_mode="floor") * entries
        found = codebook.reshape(-1, v).index_select(0, at.view(-1))
        return found.view(vectors, k, v).transpose(1, 2).reshape(vectors * v, k)

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Fields of a sized format with every index; entries, scales and offsets are normal."""
        device, widths = rng.device, {name: width for name, _, width in self.indexed}
        out = {"rows": torch.tensor(n)}
        for name, field in self.layout(n, k).items():
            if name in widths:
                shape, top = (-(-n // self.vector_length), k), 2 ** widths[name]
                out[name] = torch.randint(0, top, shape, dtype=torch.int32, generator=rng, device=device)
            elif name == "outlier_index":
                columns = torch.randperm(k, generator=rng, device=device)[: self.outlier_columns]
                out[name] = columns.sort().values.int()
            elif not name.endswith("_high"):
                out[name] = _random.normal(rng, self.dtype, *schema.bind(field, {}))
        return out

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse numbers that are not finite, and outlier columns out of place; every index is a valid one."""
        for name, tensor in packed.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise LayoutError(f"{where}.{name}: expected finite values, found NaN or infinity.")
        if "outlier_index" in packed:
            columns = packed["outlier_index"].to(torch.int32)
            if int(columns[0]) < 0 or int(columns[-1]) >= k or bool((columns.diff() <= 0).any()):
                raise LayoutError(f"{where}.outlier_index: expected columns that ascend strictly from 0 to {k - 1}.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it can't be cut there."""
        _bits.check_cut(self.shard_multiple, n, k, rows, columns)
        own, out = self.sized(n, k), {}
        vectors = slice(rows[0] // own.vector_length, -(-rows[1] // own.vector_length))
        for name, codebook, width in own.indexed:
            out[name] = _bits.cut_words(packed[name][vectors], min(width, 8), *columns)
            if width > 8:
                out[f"{name}_high"] = _bits.cut_words(packed[f"{name}_high"][vectors], width - 8, *columns)
            out[codebook] = _bits.copy_of(packed[codebook][_bits.cut_groups(own.group_size, columns)])
        for name in own.layout(n, k).keys() - out.keys():
            part = packed[name]
            if name != "outlier_index":
                part = part[slice(*rows)] if name == "outlier_values" else part[slice(*columns)]
            out[name] = _bits.copy_of(part)
        return out


plugin = Vector
