"""One scale for a whole input, found in calibration."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.inputs.base import (
    BY_TENSORS,
    Codes,
    Rounding,
    calibrated_scale,
    check_common,
    check_scale,
    positive_scale,
    spread,
    spread_codes,
    symmetric_codes,
)
from qexport.schema import Extents, Field, Layout, Tensors


@dataclass(frozen=True)
class PerTensor:
    """Round by the range that calibration saw; what lies beyond is clipped (SmoothQuant's levels O2 and O3).

    Attributes:
        bits: of a code, 4 to 8.
        symmetric: scale = max |x| / (2^(bits - 1) - 1) and no zero; otherwise the range lowest to highest, 0 in it.
        decode_input: see `InputQuant`.
    """

    name: ClassVar[str] = "tensor"
    source: ClassVar[str] = "Xiao et al., SmoothQuant, arXiv:2211.10438, table 2, O3"
    calibrated: ClassVar[bool] = True

    bits: int = 8
    symmetric: bool = True
    decode_input: str = "integer"

    def __post_init__(self) -> None:
        check_common(self)

    @property
    def text(self) -> str:
        """See `InputQuant`."""
        return f"int{self.bits}, one calibrated scale{'' if self.symmetric else ' and zero'}"

    def reject(self, fmt: Any) -> str | None:
        """Any format whose weights are integers will do."""
        return None

    def layout(self, k: int) -> Layout:
        """The scale and, if asymmetric, the zero."""
        out = {"input_quant_scale": Field((1,), torch.float32, ("one",), "distance of two levels of the input")}
        if not self.symmetric:
            text = f"code of 0, less {2 ** (self.bits - 1)}"
            out["input_quant_zero"] = Field((1,), torch.int32, ("one",), text)
        return out

    def expected_extents(self, k: int) -> Extents:
        """There are none."""
        return {}

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """See `InputQuant`."""
        if self.symmetric:
            largest = torch.maximum(high.max(), -low.min()).reshape(1)
            return {"quant_scale": positive_scale(largest, 2 ** (self.bits - 1) - 1)}
        scale, zero = spread(low.min().reshape(1), high.max().reshape(1), self.bits)
        return {"quant_scale": scale, "quant_zero": zero}

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Refuse a scale that is none, and a zero that is no code. Raises `LayoutError`."""
        check_scale(tensors, where)
        top = 2 ** (self.bits - 1)
        if not self.symmetric and not -top <= int(tensors["input_quant_zero"]) < top:
            found = int(tensors["input_quant_zero"])
            raise LayoutError(f"{where}.input_quant_zero: expected {-top} to {top - 1}, found {found}.")

    def encode(self, x: Tensor, tensors: Tensors, by: Rounding = BY_TENSORS) -> Codes:
        """See `InputQuant`."""
        scales = calibrated_scale(x, tensors)
        if self.symmetric:
            return Codes(symmetric_codes(x, scales, self.bits), scales)
        zeros = tensors["input_quant_zero"].reshape(1, 1).expand(x.shape[0], 1)
        return Codes(spread_codes(x, scales, zeros, self.bits), scales, zeros)


plugin = PerTensor
