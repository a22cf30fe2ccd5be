"""QRazor's significant data razoring of an input: 16-bit integers, of which each group keeps a few leading bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.inputs.base import (
    BY_TENSORS,
    LARGEST,
    Codes,
    Rounding,
    calibrated_scale,
    check_common,
    check_scale,
    positive_scale,
    require,
)
from qexport.schema import Extents, Field, Layout, Tensors


@dataclass(frozen=True)
class Sdr:
    """Integers of 16 bits, cut to `bits` from the leading bit of the group's largest on (Lee et al., arXiv:2501.13331).

    A group's codes are signed and shifted left by its flag, so that all are 16-bit integers again. They are multiplied
    as two planes of eight bits, 256 * high + low: the sums are those of the paper's unit, which shifts the partial sum
    of each group, to the last bit.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: features that share a flag, in the order in which the weight's columns are stored.
        static: one calibrated scale, as published; otherwise a scale for each token.
        decode_input: see `InputQuant`.
    """

    name: ClassVar[str] = "sdr"
    source: ClassVar[str] = "Lee et al., QRazor, arXiv:2501.13331"

    bits: int = 8
    group_size: int = 16
    static: bool = True
    decode_input: str = "integer"

    def __post_init__(self) -> None:
        check_common(self, least=2)
        ok = type(self.group_size) is int and 1 <= self.group_size < 2**31
        require(ok, self.name, "group_size", self.group_size, "a whole number from 1 on")
        require(type(self.static) is bool, self.name, "static", self.static, "true or false")

    @property
    def text(self) -> str:
        """See `InputQuant`."""
        scale = "one calibrated scale" if self.static else "a scale for each token"
        return f"16-bit integers razored to {self.bits} bits in groups of {self.group_size}, {scale}"

    @property
    def calibrated(self) -> bool:
        """Only for a static scale."""
        return self.static

    def reject(self, fmt: Any) -> str | None:
        """Groups of the input and of the weight must line up."""
        own, other = self.group_size, fmt.group_size
        if other == -1 or own % other == 0 or other % own == 0:
            return None
        return f"groups of {own} of the input don't line up with the weight's groups of {other}"

    def layout(self, k: int) -> Layout:
        """The scale, if it is static."""
        field = Field((1,), torch.float32, ("one",), "value of 1 in the 16-bit integers of the input")
        return {"input_quant_scale": field} if self.static else {}

    def expected_extents(self, k: int) -> Extents:
        """There are none."""
        return {}

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """See `InputQuant`."""
        if not self.static:
            return {}
        return {"quant_scale": positive_scale(torch.maximum(high.max(), -low.min()).reshape(1), LARGEST)}

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Refuse a scale that is none. Raises `LayoutError`."""
        if self.static:
            check_scale(tensors, where)

    def encode(self, x: Tensor, tensors: Tensors, by: Rounding = BY_TENSORS) -> Codes:
        """See `InputQuant`."""
        scales = calibrated_scale(x, tensors) if self.static else positive_scale(x.abs().amax(1, keepdim=True), LARGEST)
        return Codes(by.razored(x, scales, self.bits, self.group_size), scales)


plugin = Sdr
