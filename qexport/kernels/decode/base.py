"""The contract of a format's decoder for CPUs."""

from typing import Any, Protocol

from torch import Tensor

from qexport.kernels.cpu.base import Weight
from qexport.schema import Tensors


class Rows(Weight, Protocol):
    """A weight [n, k] whose rows are decoded when they are needed; nothing is laid out for it."""

    def __call__(self, first: int, out: Tensor) -> None:
        """Write rows, from a first one on, into float32 [rows, k], contiguous: bit for bit those of `fmt.decode`."""
        ...


class Decoder(Protocol):
    """What `qexport/kernels/decode/<format>.py` calls `plugin`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> Rows:
        """The weight of the stored tensors, which it reads as long as it is used."""
        ...
