"""A stack of packed experts in place of a 3-D parameter; each is decoded when a token is sent to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qexport.errors import LayoutError
from qexport.formats.specs import LinearSpec
from qexport.runtime.dispatch import Choice
from qexport.runtime.packed import Packed
from qexport.schema import Extents


class PackedView(Packed):
    """One expert's packed weight; calling it gives the decoded one, so that offloading hooks take part."""

    choice = Choice("reference", "experts are decoded one by one, whenever a token is sent to them")

    def forward(self, dtype: torch.dtype, transposed: bool) -> Tensor:
        """The weight [n, k], or [k, n] when the model holds it transposed, contiguous, in a dtype."""
        if self.place.type == "meta":
            return torch.empty((self.k, self.n) if transposed else (self.n, self.k), dtype=dtype, device="meta")
        return self.decoded(dtype, transposed=transposed)


class QuantStack(nn.Module):
    """Stands in for a stacked parameter of experts, [E, n, k] or transposed [E, k, n]; `stack[e]` decodes one expert.

    Tensors are named `<path of the parameter>.<e>.<field>`. The model must run its experts one by one (transformers
    calls that the `eager` experts implementation).

    Args:
        specs: what each expert stores.
        n: out features.
        k: in features.
        extents: data-dependent extents of each expert.
        dtype: the model's dtype, in which experts are handed out.
        transposed: whether the model holds [k, n] for each expert.
        device: where the empty buffers are made.
    """

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        n: int,
        k: int,
        *,
        extents: Sequence[Extents],
        dtype: torch.dtype,
        transposed: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.n, self.k, self.dtype, self.transposed = n, k, dtype, transposed
        for e, (spec, found) in enumerate(zip(specs, extents, strict=True)):
            self.add_module(str(e), PackedView(spec, n, k, extents=found, device=device))

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter that this replaces."""
        return torch.Size((len(self), *((self.k, self.n) if self.transposed else (self.n, self.k))))

    @property
    def views(self) -> tuple[PackedView, ...]:
        """The experts, in order."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            if index.numel() != 1:
                raise LayoutError(
                    f"packed experts are decoded one at a time: expected one index, found {tuple(index.shape)}. "
                    "Use experts_implementation='eager'."
                )
            index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        weight: Tensor = self.views[index](self.dtype, self.transposed)
        return weight

    def __iter__(self) -> Any:
        return (self[e] for e in range(len(self)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantStack":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follows model.to(dtype), as the parameter would
        return self
