"""The contract of a format's kernel for CPUs: few rows of x, floats, times a packed weight."""

from typing import Any, Protocol

from torch import Tensor

from qexport.schema import Tensors

FEW = 32  # rows of x up to which a kernel is asked; from there on a weight is decoded, and BLAS multiplies


class Weight(Protocol):
    """A weight [n, k] laid out for products."""

    def product(self, x: Tensor) -> Tensor:
        """Of x float32 [m, k], contiguous, and the transposed weight: float32 [m, n]."""
        ...


class Kernel(Protocol):
    """What `qexport/kernels/cpu/<format>.py` calls `plugin`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why this processor can't multiply by an [n, k] matrix in this format, or None."""
        ...

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> Weight:
        """The stored tensors in the layout of the kernel; done once, at load."""
        ...
