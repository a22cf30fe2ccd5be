"""compressed-tensors, the format of vLLM and llm-compressor: `pack-quantized` integers of 2 to 8 bits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.export._folder import write_folder
from qexport.export._uniform import fitting_group, uniform_only
from qexport.export.base import Module, Packed, with_transformers
from qexport.formats.base import Format
from qexport.formats.uniform import Uniform
from qexport.schema import Tensors


@dataclass(frozen=True)
class CompressedTensors:
    """Integers as they are: codes, scales and zeros are the same numbers, in the other library's layout.

    From version 0.18 on codes of 3, 5, 6 and 7 bits lie in a stream without gaps, which is what is written; earlier
    ones read ten 3-bit codes from each word. For 2, 4 and 8 bits all versions agree.

    Since the same version transformers can't hold packed zero points: it expects them unpacked. So a checkpoint with
    zeros asks in its config to be decoded when it is loaded, and that is done in the dtype of the scales: they become
    float32 then, or a second rounding would change the weights.
    """

    source: ClassVar[str] = "compressed-tensors 0.20"
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    tolerance: ClassVar[float] = 1e-5
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32"}

    def how(self, name: str) -> str:
        """With transformers."""
        return with_transformers(name, "transformers compressed-tensors", "vLLM reads the same files.")

    def refuse(self, module: Module) -> str | None:
        """Linears in `uniform`, whole groups, inputs as they come."""
        reason = uniform_only(module)
        if reason is not None:
            return reason
        group = module.spec.weight.group_size  # type: ignore[attr-defined]
        if group != -1 and module.k % group:
            return f"groups of {group} do not divide its {module.k} columns; {fitting_group(module.k)} would do"
        return None

    def write(self, packed: Packed, out: Path) -> None:
        """Repack module by module."""
        write_folder(packed, out, convert, quantization(packed))


def convert(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
    """The library's tensors of one linear.

    Both pack codes as a stream of bits along k, and zeros along n; ours is padded to whole 32 codes, and has a row for
    each group of zeros where theirs has a column. Theirs adds 2^(bits - 1) to signed integers, which gives our codes.
    """
    fmt = module.spec.weight
    assert isinstance(fmt, Uniform)
    scales = tensors["scales"]
    out = {
        "weight_packed": tensors["qweight"][:, : ceil(module.k * fmt.bits / 32)].contiguous(),
        "weight_scale": scales if fmt.symmetric else scales.to(torch.float32),
        "weight_shape": torch.tensor([module.n, module.k]),
    }
    if not fmt.symmetric:
        out["weight_zero_point"] = tensors["qzeros"][:, : ceil(module.n * fmt.bits / 32)].T.contiguous()
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def quantization(packed: Packed) -> dict[str, Any]:
    """The `quantization_config`: a group of linears for each kind of integers."""
    kinds: dict[Format, list[str]] = {}
    for module in packed.modules:
        kinds.setdefault(module.spec.weight, []).append(module.name)
    linears = packed.linears()
    coded = {name for names in kinds.values() for name in names}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else _targets(names, linears),
            "weights": _weights(fmt),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (fmt, names) in enumerate(kinds.items())
    }
    zeros = any(isinstance(fmt, Uniform) and not fmt.symmetric for fmt in kinds)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [name for name in linears if name not in coded],
        "config_groups": groups,
        **({"dequantize": True} if zeros else {}),
    }


def _weights(fmt: Format) -> dict[str, Any]:
    assert isinstance(fmt, Uniform)
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "channel" if fmt.group_size == -1 else "group",
        "group_size": None if fmt.group_size == -1 else fmt.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _targets(names: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Few patterns that fit these linears and no others: those of all layers share one, others are spelt out."""
    own, out = set(names), []
    for name in names:
        family = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        pattern = re.escape(family).replace(re.escape("#"), r"\d+")
        alike = [other for other in linears if re.fullmatch(pattern, other)]
        out.append(f"re:^{pattern if own.issuperset(alike) else re.escape(name)}$")
    return list(dict.fromkeys(out))


plugin = CompressedTensors
