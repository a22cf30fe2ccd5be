"""Weights whose arrays loops read by their addresses."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from qexport.kernels._threads import many
from qexport.kernels.cpu.base import DTYPES


class LaidOut(ABC):
    """A weight [n, k], which owns numpy's arrays in the order of its loops.

    Attributes:
        shape: n and k.
        small: products that one thread works off before others would have started.
    """

    shape: tuple[int, int]
    small: ClassVar[int] = 1 << 18

    @cached_property
    @abstractmethod
    def given(self) -> tuple[Any, ...]:
        """The loops, by one thread and by all; tuples by whose lengths they are compiled; addresses and sizes.

        Once made it is kept: to ask an array for its address takes a microsecond.
        """

    def product(self, x: Tensor) -> Tensor:
        """See `Weight`."""
        n, k = self.shape
        m, y = x.numel() // k, x.new_empty(*x.shape[:-1], n)
        by_one, by_all, widths, numbers = self.given
        run = by_all if many(m * n * k, self.small) else by_one
        run(*widths, x.data_ptr(), y.data_ptr(), m, DTYPES[x.dtype], numbers)
        return y

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose arrays lie elsewhere."""
        return {name: value for name, value in vars(self).items() if name != "given"}
