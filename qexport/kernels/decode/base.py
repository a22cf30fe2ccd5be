"""The contract of a format's decoder for CPUs."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from qexport.schema import Tensors

Fill = Callable[[int, Tensor], None]  # write rows, from a first one on, into float32 [rows, k], contiguous


class Decoder(Protocol):
    """What `qexport/kernels/decode/<format>.py` calls `plugin`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> Fill:
        """What writes rows of the [n, k] weight, equal to those of `fmt.decode` bit for bit."""
        ...
