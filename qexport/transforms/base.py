"""The contract of a transform, and what it decides: how the input of linears changes, and their columns with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qexport.formats._rotation import rotate
from qexport.formats.base import Format
from qexport.formats.specs import InputSpec
from qexport.statistics import AbsMean, FeatureRange, Hessian, MeanSquare, Statistic


@dataclass(frozen=True, eq=False)
class Change:
    """W x = W' x' with W' = R(W · scale · signs) and x' = R(signs · x / scale), R being `formats._rotation`'s matrix.

    Attributes:
        scale: float32 [k], positive; None: 1 everywhere.
        signs: float32 [k], of 1 and -1; None: no rotation at all.
    """

    scale: Tensor | None = None
    signs: Tensor | None = None

    def weight(self, w: Tensor) -> Tensor:
        """W' for W, float32 [n, k]."""
        w = w if self.scale is None else w * self.scale
        return w if self.signs is None else rotate(w * self.signs)

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian of x' for that of x, float32 [k, k]."""
        if self.scale is not None:
            h = h / self.scale / self.scale.unsqueeze(1)
        if self.signs is None:
            return h
        return rotate(rotate(h * self.signs * self.signs.unsqueeze(1)).T)

    def statistics(self, stats: Mapping[type[Statistic], Tensor]) -> dict[type[Statistic], Tensor]:
        """Statistics of x' for those of x; after a rotation there are none of single features."""
        kept: dict[type[Statistic], Tensor] = {k: self.hessian(s) for k, s in stats.items() if k is Hessian}
        for kind, power in ((AbsMean, 1), (FeatureRange, 1), (MeanSquare, 2)):
            if kind in stats and self.signs is None:
                kept[kind] = stats[kind] if self.scale is None else stats[kind] / self.scale**power
        return kept

    def then(self, later: "Change") -> "Change":
        """Both, this one first; a scale can't follow a rotation."""
        if later.scale is None:
            return Change(self.scale, later.signs if self.signs is None else self.signs)
        assert self.signs is None
        scale = later.scale if self.scale is None else self.scale * later.scale
        return Change(scale, later.signs)

    @property
    def stored(self) -> dict[str, Tensor]:
        """What the treatment of the input stores: factors of x, and signs."""
        out = {} if self.scale is None else {"scale": self.scale.reciprocal()}
        return out if self.signs is None else {**out, "signs": self.signs}


@dataclass(frozen=True)
class Site:
    """Linears that share an input, as a transform sees them.

    Attributes:
        weights: float32 [n_i, k].
        fmts: their formats.
        stats: what the transform needs of their input.
        ties: int64 [k]; features of the same number must get the same scale. None: all are free.
        loss: given other weights W' for these linears and the change of their input that goes with them, the mean
            squared change of the layer's output that they cause, over a few calibration sequences. It takes in what
            else happens to the input, rounding above all.
        rng: for whatever is random.
    """

    weights: Sequence[Tensor]
    fmts: Sequence[Format]
    stats: Mapping[type[Statistic], Tensor]
    ties: Tensor | None
    loss: Callable[[Sequence[Tensor], Change], float]
    rng: torch.Generator


def tied(values: Tensor, ties: Tensor | None) -> Tensor:
    """Each value [k] replaced by the mean of those that it is tied to; see `Site`."""
    if ties is None:
        return values
    count = int(ties.max()) + 1
    sums = torch.zeros(count, device=values.device).index_add_(0, ties, values)
    return (sums / ties.bincount(minlength=count).clamp(min=1))[ties]


def tied_max(values: Tensor, ties: Tensor | None) -> Tensor:
    """Each value [k] replaced by the largest of those that it is tied to; see `Site`."""
    if ties is None:
        return values
    out = torch.full((int(ties.max()) + 1,), -torch.inf, device=values.device)
    return out.scatter_reduce_(0, ties, values, "amax")[ties]


class Transform(Protocol):
    """A frozen dataclass whose fields are the paper's hyperparameters (`-s grid=10` on the command line)."""

    source: ClassVar[str]

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics of the input that it asks for."""
        ...

    @property
    def steps(self) -> InputSpec:
        """What it makes a linear do to its input where nothing before the linear can do it."""
        ...

    @property
    def turns(self) -> bool:
        """Whether it rotates the hidden states between layers in the model's weights; see `models.stream`."""
        ...

    @property
    def trials(self) -> int:
        """How often it asks for the loss of a site."""
        ...

    @property
    def judges(self) -> int:
        """Calibration sequences that a loss is taken over, as far as a micro-batch holds them."""
        ...

    @property
    def variants(self) -> "Sequence[Transform]":
        """Transforms one of which takes its place in the whole model, see `qexport.choose`; none: it stays."""
        ...

    def reject(self, fmt: Format) -> str | None:
        """Why it can't prepare weights for a format, or None."""
        ...

    def decide(self, site: Site) -> Change:
        """What is best for a site."""
        ...
