"""Rotation: spread every weight over all input features, so that none is large."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.formats.base import Format
from qexport.formats.specs import InputSpec
from qexport.statistics import MeanSquare, Statistic
from qexport.transforms.base import Change, Site, tied

_LEAST = 1e-8


@dataclass(frozen=True)
class Rotation:
    """A randomised Hadamard rotation of every linear's input, as in QuaRot (Ashkboos et al., arXiv:2404.00456).

    Rows of the weight are rotated too, so that the product stays the same. By default each linear rotates its own input
    when it runs, in every architecture, at the price of two or three small products a token. The paper rotates the
    hidden states between layers once, in the weights of what writes and reads them: that is `fold`.

    A rotation spreads rounding errors over all features, also over the few whose activations are large. So they are
    balanced first, by QuIP's rule (Chee et al., arXiv:2307.13304): columns times (mean x^2 / mean w^2)^(1/4), features
    over it. Of all scales these make mean w^2 times mean x^2, each over all features, the least.

    Attributes:
        balance: scale before rotating. This needs data; without it a rotation needs none.
        fold: rotate the hidden states between layers in the model's weights. Linears that read them do nothing when
            they run, and are not balanced; the others rotate their input as ever. Tied head and embedding become two.
    """

    source: ClassVar[str] = "Ashkboos et al., QuaRot, arXiv:2404.00456; balance: Chee et al., QuIP, arXiv:2307.13304"
    trials: ClassVar[int] = 0
    judges: ClassVar[int] = 1
    variants: ClassVar[tuple[()]] = ()

    balance: bool = True
    fold: bool = False

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The mean square of each feature, for the balance."""
        return frozenset({MeanSquare}) if self.balance else frozenset()

    @property
    def steps(self) -> InputSpec:
        """The rotation, and a scale before it."""
        return InputSpec(scale=self.balance, hadamard=True)

    @property
    def turns(self) -> bool:
        """Only when it is folded."""
        return self.fold

    def reject(self, fmt: Format) -> str | None:
        """Any format will do."""
        return None

    def decide(self, site: Site) -> Change:
        """Random signs, and the scale; the rest of the rotation is fixed."""
        k, device = site.weights[0].shape[1], site.weights[0].device
        signs = torch.randint(0, 2, (k,), generator=site.rng).float().mul_(2).sub_(1).to(device)
        return Change(_balance(site) if self.balance else None, signs)


def _balance(site: Site) -> Tensor:
    """Positive float32 [k], of mean 1; 1 for features that never are anything but 0."""
    square = torch.cat([w.square() for w in site.weights]).mean(0)
    square, wanted = tied(square, site.ties), tied(site.stats[MeanSquare], site.ties)
    ratio = torch.where(square > _LEAST * square.mean(), wanted / square, 0.0)
    if not float(ratio.max()) > 0:
        return torch.ones_like(ratio)
    scale = ratio.clamp(min=_LEAST * float(ratio.mean())).pow(0.25)
    return scale / scale.mean()


plugin = Rotation
