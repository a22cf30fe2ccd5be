"""The weights of one decoder layer as its transforms leave them, and what else of the layer they change.

A transform decides on the model's own weights. Its scale then goes into the producer of the input where the plan has a
fold for it: the producer's rows or gain are divided, once and for all, and the linears' columns multiplied. Otherwise
the linears treat their input themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.models import Fold, Source, WeightView
from qexport.plan import ModulePlan, Plan
from qexport.statistics import Hessian, Statistic
from qexport.transforms.base import Change, Site

Loss = Callable[[Sequence[Tensor]], float]
Found = dict[type[Statistic], Tensor]


@dataclass
class Layer:
    """Weights of one layer.

    Attributes:
        plan: what is done.
        source: of the weights.
        device: where they are wanted.
        rows: factors of the rows of linears that produce a scaled input, by module, float32 [n].
        columns: factors of columns whose scale was folded, by module, float32 [k].
        dense: tensors that stay dense and were changed, by state-dict name, in their stored dtype.
    """

    plan: Plan
    source: Source
    device: torch.device

    def __post_init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}

    def weight(self, view: WeightView) -> Tensor:
        """A weight as it is to be quantized, up to what happens to its input when it runs; float32 [n, k]."""
        w = self.source.view(view).to(self.device)
        if view.name in self.rows:
            w = w * self.rows[view.name].unsqueeze(1)
        return w * self.columns[view.name] if view.name in self.columns else w

    def transform(
        self, members: Sequence[ModulePlan], stats: Found, loss: Loss, rng: torch.Generator
    ) -> tuple[Found, Change]:
        """Decide on linears that share an input, and fold what can be folded.

        Args:
            members: all that is quantized of the linears.
            stats: of their input, as the model has it.
            loss: see `Site`.
            rng: for whatever is random.

        Returns:
            The statistics of the input that they get from now on, and what they do to it when they run.
        """
        fold = self.plan.folds.get(members[0].view.name)
        views, fmts = [m.view for m in members], [m.spec.weight for m in members]
        change = Change()
        for transform in self.plan.transforms.values():
            weights = [change.weight(self.source.view(v).to(self.device)) for v in views]
            ties = None if fold is None else fold.features.to(self.device)
            change = change.then(transform.decide(Site(weights, fmts, stats, ties, loss, rng)))
        if fold is None or change.scale is None:
            return stats, change
        folded = Change(scale=self._fold(fold, change.scale))
        for view in views:
            self.columns[view.name] = folded.scale  # type: ignore[assignment]
        kept = {kind: folded.hessian(s) if kind is Hessian else s for kind, s in stats.items()}
        return kept, Change(signs=change.signs)

    def _fold(self, fold: Fold, scale: Tensor) -> Tensor:
        """Divide a producer's output by a scale [k]; returns the scale that its stored values amount to."""
        features = fold.features.to(scale.device)
        own = torch.ones(int(features.max()) + 1, device=scale.device)
        own[features] = scale
        weight, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
        if fold.linear:
            self.rows[fold.producer] = own.reciprocal()
        else:
            # What rounding the gain to its stored dtype does to it, the scale of the columns takes back.
            gain = self._dense(weight).float().to(own.device) + fold.unit
            stored = (gain / own - fold.unit).to(self.source.meta(weight)[0])
            reached = stored.float() + fold.unit
            own = torch.where(reached == 0, torch.ones_like(own), gain / reached)
            self.dense[weight] = stored.cpu()
        if bias in self.plan.anatomy.parameters:
            self.dense[bias] = (self._dense(bias).float().to(own.device) / own).to(self.source.meta(bias)[0]).cpu()
        return own[features]

    def _dense(self, name: str) -> Tensor:
        return self.dense[name] if name in self.dense else self.source.read(name)
