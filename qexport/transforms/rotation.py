"""Rotation: spread every weight over all input features, so that none is large."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qexport.formats.base import Format
from qexport.formats.specs import InputSpec
from qexport.statistics import Statistic
from qexport.transforms.base import Change, Site


@dataclass(frozen=True)
class Rotation:
    """A randomised Hadamard rotation of every linear's input, as in QuaRot (Ashkboos et al., arXiv:2404.00456).

    Rows of the weight are rotated too, so that the product stays the same. Different from the paper: it rotates the
    hidden states between layers once for all linears that read them, which no model with tied embeddings and no
    LayerNorm allows without further matrices; here each linear rotates its own input when it runs, in every
    architecture, at k log k operations a token.
    """

    source: ClassVar[str] = "Ashkboos et al., QuaRot, arXiv:2404.00456"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    steps: ClassVar[InputSpec] = InputSpec(hadamard=True)
    trials: ClassVar[int] = 0

    def reject(self, fmt: Format) -> str | None:
        """Any format will do."""
        return None

    def decide(self, site: Site) -> Change:
        """Random signs; the rest of the rotation is fixed."""
        k = site.weights[0].shape[1]
        signs = torch.randint(0, 2, (k,), generator=site.rng).float().mul_(2).sub_(1)
        return Change(signs=signs.to(site.weights[0].device))


plugin = Rotation
