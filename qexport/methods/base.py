"""The contract of a method that works on linear layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from qexport.formats.base import Format
from qexport.schema import Extents, Tensors
from qexport.statistics import Statistic

Stats: TypeAlias = Mapping[type[Statistic], Tensor]


@dataclass(frozen=True)
class Result:
    """What a method decided for one weight.

    Attributes:
        fields: the format's fields, not packed; columns in the order of `perm` if there is one.
        perm: int64 [k], or None. Column j of `fields` is input feature `perm[j]`: y = decode(fields) x[perm].
        diagnostics: numbers for the report, such as `damp` when it was raised, or `outlier_rate`.
    """

    fields: Tensors
    perm: Tensor | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """What solving linears takes, so that `plan` can say how long a job will run.

    Attributes:
        flops: floating-point operations of matrix products and factorisations.
        touched: weights that elementwise operations read, once for each operation.
        calls: tensor operations, each of which costs its launch however small it is.
    """

    flops: float = 0.0
    touched: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.flops + other.flops, self.touched + other.touched, self.calls + other.calls)

    def __rmul__(self, times: float) -> "Effort":
        return Effort(times * self.flops, times * self.touched, times * self.calls)


class LinearMethod(Protocol):
    """A frozen dataclass whose fields are the paper's hyperparameters (`-s damp=0.02` on the command line)."""

    source: ClassVar[str]

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics of the input that it asks for."""
        ...

    @property
    def permutes(self) -> bool:
        """Whether results carry a permutation of the input features."""
        ...

    def reject(self, fmt: Format) -> str | None:
        """Why the method can't use a format, or None."""
        ...

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """Data-dependent extents that its results will about have in a format, for size prediction."""
        ...

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """What solving linears that share an input takes, n rows in all; statistics and packing aside."""
        ...

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """Choose the fields of w, float32 [n, k]."""
        ...

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Choose the fields of linears that share an input, float32 [n_i, k] each; a result for each, in order."""
        ...
