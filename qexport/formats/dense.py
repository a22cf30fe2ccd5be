"""Weights as they are, in one float dtype: for a module that stays whole among quantized ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.formats._bits import check_cut, copy_of, require
from qexport.schema import Extents, Field, Layout, Tensors

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Dense:
    """One float tensor. It has no codes, so it is not a `ScalarGrid`; `from_weight` makes its fields.

    Attributes:
        dtype: `"float16"`, `"bfloat16"` or `"float32"`.
    """

    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "the model's own weights"

    dtype: str = "float16"

    def __post_init__(self) -> None:
        require(self.dtype in tuple(_DTYPES), self.name, "dtype", self.dtype, " or ".join(_DTYPES))

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Any cut will do."""
        return {"n": 1, "k": 1}

    def layout(self, n: int, k: int) -> Layout:
        """The weight."""
        return {"weight": Field((n, k), _DTYPES[self.dtype], ("n", "k"), "the weight itself")}

    def expected_extents(self, n: int, k: int) -> Extents:
        """None: the layout depends on n and k alone."""
        return {}

    def sized(self, n: int, k: int) -> "Dense":
        """Itself: no option depends on the size."""
        return self

    def resolve(self, w: Tensor) -> "Dense":
        """bfloat16 instead of float16 where w [n, k] would overflow; the same bytes."""
        overflows = self.dtype == "float16" and bool((w.abs() > torch.finfo(torch.float16).max).any())
        return replace(self, dtype="bfloat16") if overflows else self

    def from_weight(self, w: Tensor) -> dict[str, Tensor]:
        """Fields for w [n, k]: rounded to the stored dtype, float32."""
        return {"weight": w.to(_DTYPES[self.dtype]).to(torch.float32)}

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors."""
        return {"weight": fields["weight"].to(_DTYPES[self.dtype]).contiguous()}

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`: `weight` float32 [n, k]."""
        return {"weight": packed["weight"].to(torch.float32)}

    def decode(self, fields: Tensors) -> Tensor:
        """The weight, float32 [n, k]; a copy, so that it can be worked on in place."""
        return fields["weight"].to(torch.float32, copy=True)

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """A normal weight."""
        return self.from_weight(torch.randn(n, k, generator=rng, device=rng.device))

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Refuse NaN and infinity; raises `LayoutError`."""
        if not torch.isfinite(packed["weight"]).all():
            raise LayoutError(f"{where}.weight: expected finite values, found NaN or infinity.")

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of a sub-matrix; raises `LayoutError` when it lies outside of the matrix."""
        check_cut(self.shard_multiple, n, k, rows, columns)
        return {"weight": copy_of(packed["weight"][slice(*rows), slice(*columns)])}


plugin = Dense
