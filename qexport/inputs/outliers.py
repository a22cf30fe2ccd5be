"""LLM.int8(): a few features with huge values are multiplied as floats, all others as integers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.inputs.base import BY_TENSORS, Codes, Rounding, check_common, require
from qexport.schema import Extents, Field, Layout, Tensors

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Outliers:
    """Features in which any |x| reaches a threshold stay floats (Dettmers et al., arXiv:2208.07339).

    They meet the weight as its codes say, decoded; the others are rounded by a scale for each token, which is found
    without them. As published, features are chosen anew for each call from all its rows, so a row's result depends on
    what shares its batch.

    Attributes:
        threshold: of |x|.
        static: features that reached the threshold in calibration, always the same.
        bits: of a code, 4 to 8.
        decode_input: see `InputQuant`.
    """

    name: ClassVar[str] = "outliers"
    source: ClassVar[str] = "Dettmers et al., LLM.int8(), arXiv:2208.07339"

    threshold: float = 6.0
    static: bool = False
    bits: int = 8
    decode_input: str = "integer"

    def __post_init__(self) -> None:
        check_common(self)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        ok = number and 0 < self.threshold <= _LARGEST
        require(ok, self.name, "threshold", self.threshold, f"a number above 0, at most {_LARGEST:.2g}")
        require(type(self.static) is bool, self.name, "static", self.static, "true or false")

    @property
    def text(self) -> str:
        """See `InputQuant`."""
        when = "in calibration" if self.static else "in a call"
        return f"int{self.bits}, a scale for each token; features that reach {self.threshold:g} {when} stay floats"

    @property
    def calibrated(self) -> bool:
        """Only for a static list."""
        return self.static

    def reject(self, fmt: Any) -> str | None:
        """Any format whose weights are integers will do."""
        return None

    def layout(self, k: int) -> Layout:
        """The features, if they are static."""
        field = Field(("input_outliers",), torch.int32, ("outlier",), "features that stay floats, in rising order")
        return {"input_quant_columns": field} if self.static else {}

    def expected_extents(self, k: int) -> Extents:
        """About one in a hundred."""
        return {"input_outliers": k // 100} if self.static else {}

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """See `InputQuant`."""
        reached = torch.maximum(high, -low) >= self.threshold
        return {"quant_columns": reached.nonzero().flatten().to(torch.int32)} if self.static else {}

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Refuse features that are none, or not in rising order. Raises `LayoutError`."""
        if not self.static:
            return
        found = tensors["input_quant_columns"].long()
        if found.numel() and not (int(found[0]) >= 0 and int(found[-1]) < k and (found.diff() > 0).all()):
            raise LayoutError(f"{where}.input_quant_columns: expected rising numbers from 0 to {k - 1}.")

    def encode(self, x: Tensor, tensors: Tensors, by: Rounding = BY_TENSORS) -> Codes:
        """See `InputQuant`."""
        if self.static:
            columns = tensors["input_quant_columns"].long()
        else:
            columns = (x.abs().amax(0) >= self.threshold).nonzero().flatten()
        if columns.numel():
            x = x.index_fill(1, columns, 0.0)
        return Codes(*by.rounded(x, self.bits), columns=columns if columns.numel() else None)


plugin = Outliers
