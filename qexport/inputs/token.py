"""One scale for each token, found when it arrives."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexport.inputs.base import BY_TENSORS, Codes, Dynamic, Rounding, check_common, spread, spread_codes
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

    def encode(self, x: Tensor, tensors: Tensors, by: Rounding = BY_TENSORS) -> Codes:
        """See `InputQuant`."""
        if self.symmetric:
            return Codes(*by.rounded(x, self.bits))
        scales, zeros = spread(x.amin(1, keepdim=True), x.amax(1, keepdim=True), self.bits)
        return Codes(spread_codes(x, scales, zeros, self.bits), scales, zeros)


plugin = Token
