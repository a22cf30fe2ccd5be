"""The contract of a format, and what every format gets from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qexport import schema
from qexport.schema import Extents, Layout, Tensors


@runtime_checkable
class Format(Protocol):
    """A frozen dataclass whose fields are the format's options.

    *Fields* are the logical tensors: `codes` (uint8 [n, k]) or indices, and parameters, float32 tensors whose values
    are exactly representable in their stored dtype. *Packed* tensors are what lies on disk, as `layout` says.

    Contract, checked by `tests/formats` for every format:
        `unpack(pack(f), n, k)` equals `f` bit for bit;
        `decode(slice(p, n0, n1, k0, k1))` equals `decode(p)[n0:n1, k0:k1]` at multiples of `shard_multiple`;
        `layout`'s bytes are the bytes of `pack`'s result.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    source: ClassVar[str]

    @property
    def shard_multiple(self) -> Mapping[str, int]:
        """Where a matrix may be cut: `{"n": 32, "k": 128}`; 0 means that the axis can't be cut."""
        ...

    def layout(self, n: int, k: int) -> Layout:
        """Stored tensors of an [n, k] matrix. The single source of truth for names, dtypes, shapes and sizes."""
        ...

    def expected_extents(self, n: int, k: int) -> Extents:
        """Likely values of data-dependent extents, for size prediction only."""
        ...

    def sized(self, n: int, k: int) -> "Format":
        """The same format with the options that depend on the size of an [n, k] matrix decided; done twice, as once."""
        ...

    def resolve(self, w: Tensor) -> "Format":
        """The same format with the options that depend on the weights decided (such as bf16 scales); same bytes."""
        ...

    def pack(self, fields: Tensors) -> dict[str, Tensor]:
        """Fields to stored tensors."""
        ...

    def unpack(self, packed: Tensors, n: int, k: int) -> dict[str, Tensor]:
        """Exact inverse of `pack`."""
        ...

    def decode(self, fields: Tensors) -> Tensor:
        """Fields to float32 [n, k]. This defines the format."""
        ...

    def random(self, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Random fields, for tests and benchmarks: all codes there are, and weights about 1 large."""
        ...

    def check_content(self, packed: Tensors, n: int, k: int, where: str) -> None:
        """Read the contents for values that could make a reader go out of bounds; raises `LayoutError`."""
        ...

    def slice(
        self, packed: Tensors, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Stored tensors of the sub-matrix `[rows[0]:rows[1], columns[0]:columns[1]]` of an [n, k] matrix."""
        ...


@runtime_checkable
class ScalarGrid(Protocol):
    """A format that codes weights one by one, group by group along k: all that RTN, GPTQ and AWQ need.

    Parameters have the group as axis 1, so the parameters of a matrix are those of its groups concatenated there.
    """

    group_size: int

    @property
    def row_block(self) -> int:
        """Rows that share parameters: 1, or a number that row ranges handed to `fit` must start at a multiple of."""
        ...

    @property
    def clips(self) -> bool:
        """Whether fitting a group to less than its range may lower its error, so that a search is worth its time."""
        ...

    def begin(self, w: Tensor, hess_diag: Tensor | None = None) -> Any:
        """Row-level and fixed state, decided from the whole matrix w [n, k] before any group is coded."""
        ...

    def fit(self, w: Tensor, weight: Tensor | None, state: Any, j0: int) -> dict[str, Tensor]:
        """Parameters of the group w [n, g] that starts at column j0, already rounded to their stored dtype.

        Args:
            w: float32 [n, g].
            weight: importance of each column, float32 [g], or None.
            state: what `begin` returned.
            j0: first column.
        """
        ...

    def nearest(self, w: Tensor, params: Tensors) -> Tensor:
        """Codes, uint8 [n, c], of c columns of one group."""
        ...

    def value(self, codes: Tensor, params: Tensors) -> Tensor:
        """Values, float32 [n, c], of c columns of one group."""
        ...


class RowWise:
    """What most scalar formats have in common; the others say otherwise."""

    @property
    def row_block(self) -> int:
        """Rows share nothing."""
        return 1

    @property
    def clips(self) -> bool:
        """The fit spans the whole range: a shrunk one may have less error."""
        return True

    def expected_extents(self, n: int, k: int) -> Extents:
        """None: the layout depends on n and k alone."""
        return {}

    def sized(self, n: int, k: int) -> Self:
        """Itself: no option depends on the size."""
        return self


@dataclass(frozen=True, eq=False)
class Integers:
    """A weight as integers: w = scales * (codes - zeros), in groups along k.

    Attributes:
        codes: int8 [n, k].
        scales: float32 [n, groups].
        zeros: int32 [n, groups]; None: all 0.
        group_size: columns of a group; -1 for one a row. The last group may be shorter.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int


@runtime_checkable
class IntegerFormat(Protocol):
    """A format whose weights are integers of eight bits times a scale: inputs can be multiplied by it as integers."""

    group_size: int

    @property
    def integer_group(self) -> int:
        """Columns that share a scale, `Integers.group_size`; -1 for a whole row."""
        ...

    @property
    def integer_bits(self) -> int:
        """Width of the signed `Integers.codes`."""
        ...

    @property
    def not_integers(self) -> str | None:
        """Why it is not so with these options, or None."""
        ...

    def integers(self, packed: Tensors, n: int, k: int) -> Integers:
        """Stored tensors as integers; `decode` is the product of what is in there."""
        ...


class ScalarFormat(Format, ScalarGrid, Protocol):
    """A format that is a scalar grid."""


def dequantize(fmt: Format, packed: Tensors, n: int, k: int) -> Tensor:
    """Stored tensors to float32 [n, k]."""
    return fmt.decode(fmt.unpack(packed, n, k))


def rounded(grid: ScalarFormat, w: Tensor) -> Tensor:
    """What w, float32 [n, k], comes back as when each weight goes to the nearest value of its group's grid."""
    state = grid.begin(w)
    k = w.shape[1]
    size = k if grid.group_size == -1 else grid.group_size
    out = torch.empty_like(w)
    for j in range(0, k, size):
        params = grid.fit(w[:, j : j + size], None, state, j)
        out[:, j : j + size] = grid.value(grid.nearest(w[:, j : j + size], params), params)
    return out


def bits_per_weight(fmt: Format, n: int, k: int, extents: Extents | None = None) -> float:
    """Stored bytes times 8 over n k, every tensor counted; `extents` default to the expected ones."""
    found = fmt.expected_extents(n, k) if extents is None else extents
    return 8 * schema.nbytes(fmt.layout(n, k), found) / (n * k)
