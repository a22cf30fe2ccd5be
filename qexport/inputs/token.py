"""One scale for each token, found when it arrives."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexport.inputs.base import (
    Codes,
    Dynamic,
    check_common,
    positive_scale,
    spread,
    spread_codes,
    symmetric_codes,
)
from qexport.schema import Tensors


@dataclass(frozen=True)
class Token(Dynamic):
    """Round each row by its own range, as ZeroQuant does (Yao et al., arXiv:2206.01861, token-wise quantization).

    Attributes:
        bits: of a code, 4 to 8.
        symmetric: scale = max |x| / (2^(bits - 1) - 1) and no zero; otherwise the range lowest to highest, 0 in it.
        decode_input: see `InputQuant`.
    """

    name: ClassVar[str] = "token"
    source: ClassVar[str] = "Yao et al., ZeroQuant, arXiv:2206.01861"

    bits: int = 8
    symmetric: bool = True
    decode_input: str = "integer"

    def __post_init__(self) -> None:
        check_common(self)

    @property
    def text(self) -> str:
        """See `InputQuant`."""
        return f"int{self.bits}, a scale{'' if self.symmetric else ' and a zero'} for each token"

    def encode(self, x: Tensor, tensors: Tensors) -> Codes:
        """See `InputQuant`."""
        if self.symmetric:
            scales = positive_scale(x.abs().amax(1, keepdim=True), 2 ** (self.bits - 1) - 1)
            return Codes(symmetric_codes(x, scales, self.bits), scales)
        scales, zeros = spread(x.amin(1, keepdim=True), x.amax(1, keepdim=True), self.bits)
        return Codes(spread_codes(x, scales, zeros, self.bits), scales, zeros)


plugin = Token
