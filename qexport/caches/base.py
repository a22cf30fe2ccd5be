"""The contract of a method that finds what a cache format needs to know of a layer before it can code.

A method keeps a state for each layer, a few tensors that grow with no number of tokens. It is shown the layer's keys
and values in one or more passes over the same sequences; between any two of them the state may be saved and read again.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from qexport.formats.kv.base import KVFormat
from qexport.schema import Tensors


class CacheMethod(Protocol):
    """A frozen dataclass whose fields are its hyperparameters."""

    source: ClassVar[str]
    passes: ClassVar[Mapping[str, bool]]
    """Passes over the sequences, in order, each with whether it needs gradients."""

    def reject(self, fmt: KVFormat) -> str | None:
        """Why it can't calibrate a format, or None."""
        ...

    def start(self, fmt: KVFormat, width: int, tokens: int) -> dict[str, Tensor]:
        """State of a layer before the first pass.

        Args:
            fmt: to calibrate.
            width: heads times channels of a head.
            tokens: that a pass will show at most.
        """
        ...

    def see(self, fmt: KVFormat, name: str, state: Tensors, data: Tensors) -> dict[str, Tensor]:
        """State after some sequences more.

        Args:
            fmt: to calibrate.
            name: of the pass.
            state: before.
            data: of the layer: `keys` and `values`, float32 [b, t, h, d], as the format codes them, and `key_grads` and
                `value_grads` in a pass that needs them.
        """
        ...

    def finish(self, fmt: KVFormat, state: Tensors) -> dict[str, Tensor]:
        """What `KVFormat.static` describes, from the state after all passes."""
        ...
