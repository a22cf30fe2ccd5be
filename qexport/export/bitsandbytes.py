"""bitsandbytes, the 8-bit integers of LLM.int8() that transformers reads: one scale for each row, no zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.errors import PlanError, UsageError
from qexport.export._folder import write_folder
from qexport.export._uniform import rounded_always, uniform_of, uniform_only
from qexport.export.base import Module, Packed, with_transformers
from qexport.formats import _bits
from qexport.inputs.outliers import Outliers
from qexport.inputs.token import Token
from qexport.schema import Tensors

_WORKS = "--method rtn --bits 8 --group-size -1 --sym"
_NOTE = """When it runs, bitsandbytes rounds what a linear is given to 8 bits, but for features above the threshold of
its config. Where the packed checkpoint does not do so itself, the check below was made without that: with it logits
differ by a few percent of the largest."""
_USUAL = 6.0


@dataclass(frozen=True)
class Bitsandbytes:
    """Codes less 128 as int8, and the scale of each row times 127.

    When it runs, bitsandbytes rounds each row of inputs to 8 bits of its largest value (arXiv:2208.07339). What a
    packed checkpoint with the input `outliers` or `token` computes is that, and the proof says how near it comes; the
    library rounds inputs to float16 first. Others have float inputs, and logits differ from theirs by what rounding
    costs: 3 % of the largest on a model of two layers, 12 % on SmolLM2-135M, which would hide a wrong code. So the
    proof sets the threshold to next to nothing for one run: all features are then multiplied by the weights that the
    library decodes, in float32, and `tolerance` leaves room for the order of sums. `weights` does so for each linear.

    Attributes:
        threshold: input features with a value above it are not rounded, `llm_int8_threshold`; 0 rounds all. By default
            what the packed checkpoint has, and 6 where it has float inputs.
    """

    source: ClassVar[str] = "bitsandbytes 0.50"
    tags: ClassVar[tuple[str, ...]] = ("bitsandbytes", "8-bit")
    needs: ClassVar[tuple[str, ...]] = ("bitsandbytes", "accelerate")
    tolerance: ClassVar[float] = 1e-4
    carried: ClassVar[float] = 4.0
    weights: ClassVar[float] = 1e-5
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32", "device_map": "cpu", "inputs": "float"}

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise UsageError(f"threshold {self.threshold}: expected a number, 0 or more.")

    def how(self, name: str) -> str:
        """With transformers."""
        return with_transformers(name, "transformers accelerate bitsandbytes", _NOTE)

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Inputs that are rounded in different ways: there is one threshold for all."""
        kinds = {own_threshold(module): module.name for module in reversed(modules)}
        if len(kinds) < 2:
            return []
        why = "inputs of other linears are rounded in another way, and all have one threshold there. Use --input once"
        return [(name, why) for name in list(kinds.values())[:1]]

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """Nothing."""
        return []

    def refuse(self, module: Module) -> str | None:
        """Linears in `uniform`, 8 bits, symmetric, a scale for each row; inputs as they come, or rounded likewise."""
        reason = uniform_only(module, inputs=True) or rounded_always(module) or self._refuse_input(module)
        if reason is not None:
            return reason
        fmt = uniform_of(module)
        if fmt.bits != 8:
            return f"{fmt.bits} bits have no counterpart there, which has 8. Use {_WORKS}"
        if not fmt.symmetric:
            return f"it has zeros, and 0 is always in the middle there. Use {_WORKS}"
        if _bits.groups_in(module.k, fmt.group_size) != 1:
            return f"it has groups of {fmt.group_size}, and a row has one scale there. Use {_WORKS}"
        return None

    def _refuse_input(self, module: Module) -> str | None:
        quant, own = module.spec.input.quant, own_threshold(module)
        if quant is None:
            return None
        if own is None:
            return (
                f"its input is rounded to {quant.text}, and there to 8 bits with a scale for each token, but for "
                "features that reach a threshold in a call. Quantize again with --input none, token or outliers"
            )
        if self.threshold not in (None, own):
            return f"its input is rounded with the threshold {own:g}. Leave out -s threshold={self.threshold:g}"
        return None

    def rounding(self, module: Module) -> float:
        """The step is ours, but what is rounded was rounded to float16 before."""
        return 1.0

    def write(self, packed: Packed, out: Path) -> None:
        """Module by module."""
        own = own_threshold(packed.modules[0]) if self.threshold is None else self.threshold
        write_folder(packed, out, convert, quantization(packed, _USUAL if own is None else own))


def own_threshold(module: Module) -> float | None:
    """The threshold that says how a module's input is rounded, 0 where all features are; None if none does."""
    quant = module.spec.input.quant
    if isinstance(quant, Token) and quant.bits == 8 and quant.symmetric:
        return 0.0
    return float(quant.threshold) if isinstance(quant, Outliers) and quant.bits == 8 and not quant.static else None


def convert(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
    """The library's tensors of one linear: weight = int8 * SCB / 127.

    A float16 or bfloat16 scale times 127 is exact in float32.

    Returns:
        `weight` int8 [n, k]; `SCB` float32 [n], the value that the code 127 would have; `weight_format` uint8 [], 0 for
        row by row, the only one that there is.
    """
    fields = uniform_of(module).unpack(tensors, module.n, module.k)
    if not fields["codes"].all():
        raise PlanError(
            f"--to bitsandbytes: {module.name}: has the code -128, one step beyond the largest there. Use {_WORKS}, "
            "whose codes end at 127 on either side. Nothing was written."
        )
    out = {
        "weight": (fields["codes"].to(torch.int16) - 128).to(torch.int8),
        "SCB": fields["scales"][:, 0] * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def quantization(packed: Packed, threshold: float) -> dict[str, Any]:
    """The `quantization_config`: all linears but those that stayed dense."""
    coded = {module.name for module in packed.modules}
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(threshold),
        "llm_int8_skip_modules": [name for name in packed.linears(transposed=True) if name not in coded],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


plugin = Bitsandbytes
