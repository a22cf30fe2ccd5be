"""The contract of a format's kernel for CPUs: few rows of x, floats, times a packed weight."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qexport.schema import Tensors

FEW = 32  # rows of x up to which a kernel is asked; from there on a weight is decoded, and BLAS multiplies
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of x, with the numbers that loops know them by


class Weight(Protocol):
    """A weight [n, k] laid out for products."""

    def product(self, x: Tensor) -> Tensor:
        """Of x [..., k], contiguous, in one of `DTYPES`, and the transposed weight: [..., n] in that dtype.

        Sums are float32 and rounded once.
        """
        ...


@runtime_checkable
class Joinable(Weight, Protocol):
    """A weight that others, which meet the same x, can be joined with."""

    def joined(self, others: Sequence[Weight]) -> tuple[Weight, list[Weight]] | None:
        """One weight of the rows of this and the others, and all of them anew as parts of it, which hold no copy.

        None if they can't be joined. A column of a product is the same bits, whichever weight it is made by.
        """
        ...


class Kernel(Protocol):
    """What `qexport/kernels/cpu/<format>.py` calls `plugin`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why this processor can't multiply by an [n, k] matrix in this format, or None."""
        ...

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> Weight:
        """The stored tensors in the layout of the kernel; done once, at load."""
        ...
