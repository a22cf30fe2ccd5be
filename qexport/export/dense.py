"""Decoded weights: every tool loads them, and sees what the packed checkpoint computes with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.export._folder import write_folder
from qexport.export.base import Module, Packed, with_transformers
from qexport.schema import Tensors

_INPUTS = ("refuse", "float")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_FLOATS = """Inputs of linears that the packed checkpoint rounds to integers **stay floats** here: logits are those of
its weights alone, and what is measured below is not this model."""


@dataclass(frozen=True)
class Dense:
    """A model without quantization, in one dtype.

    Attributes:
        dtype: of all floating-point tensors. float32 is exact: decoding is done in it.
        inputs: what becomes of inputs that the packed checkpoint rounds to integers, which no dense model does:
            `"refuse"`, or they stay `"float"`, which card and tags then say.
    """

    source: ClassVar[str] = "safetensors of transformers 5"
    needs: ClassVar[tuple[str, ...]] = ("transformers",)

    dtype: str = "float32"
    inputs: str = "refuse"

    def __post_init__(self) -> None:
        if self.inputs not in _INPUTS:
            raise UsageError(f"inputs {self.inputs!r}: expected {' or '.join(_INPUTS)}.")
        if self.dtype not in _DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected {', '.join(_DTYPES)}.")

    @property
    def tags(self) -> tuple[str, ...]:
        """Whether inputs may have been rounded before."""
        return ("dense",) if self.inputs == "refuse" else ("dense", "float-inputs")

    @property
    def tolerance(self) -> float:
        """float32 differs in nothing but the order of sums; what the others round, a model carries on."""
        return {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[self.dtype]

    @property
    def loading(self) -> Mapping[str, Any]:
        """In its own dtype's full precision: what is compared is what was stored."""
        return {"dtype": "float32"}

    def how(self, name: str) -> str:
        """With transformers."""
        return with_transformers(name, "transformers", "" if self.inputs == "refuse" else _FLOATS)

    def refuse(self, module: Module) -> str | None:
        """Every weight can be decoded; no input is rounded any more."""
        if self.inputs == "float" or module.spec.input.quant is None:
            return None
        return (
            "its input is rounded to integers when it runs, which no dense model does. With -s inputs=float it stays "
            "a float there, and the card says so; --to compressed-tensors takes --input token and tensor as they are"
        )

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Nothing."""
        return []

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """Nothing."""
        return []

    def write(self, packed: Packed, out: Path) -> None:
        """Decode module by module."""
        write_folder(packed, out, self._decoded, None, _DTYPES[self.dtype])

    def _decoded(self, module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
        weight = module.decoded(tensors).to(_DTYPES[self.dtype])
        weight = weight.T.contiguous() if module.transposed else weight
        return {module.name.rpartition(".")[0] if module.kind == "expert" else f"{module.name}.weight": weight}


plugin = Dense
