"""GPTQ, the format of GPTQModel, AutoGPTQ and vLLM: integers of 2, 3, 4 and 8 bits, packed along the input features."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import dump_json, write_text
from qexport.errors import LayoutError, PlanError, UsageError
from qexport.export._folder import write_folder
from qexport.export._uniform import (
    FLOATS,
    expect,
    fitting_group,
    patterns,
    sixteen_bits,
    sorted_by_group,
    uniform_of,
    uniform_only,
)  # fmt: skip
from qexport.export.base import Found, Module, Packed
from qexport.formats import _bits
from qexport.formats.uniform import Uniform
from qexport.schema import Tensors

_BITS = (2, 3, 4, 8)
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_FORMATS = {"v1": "gptq", "v2": "gptq_v2"}
_WORKS = "--method gptq --bits 4 --group-size 64 --sym"


@dataclass(frozen=True)
class Gptq:
    """Codes, scales and zeros as they are, in the other library's layout.

    `version` says how zeros are stored. "v2": as they are. "v1", which older readers know: one less, as AutoGPTQ had
    it, so that 0 can't be said; only symmetric integers, whose zero is in the middle, are sure to have none.

    The proof runs GPTQModel's plain kernel in float32. The library loads in 16 bits only, so that dense weights are
    rounded to float16, which `tolerance` leaves room for (1e-3 was measured); packed weights are the same numbers.

    Attributes:
        version: `"v1"` or `"v2"`.
    """

    source: ClassVar[str] = "GPTQModel 7.7"
    tags: ClassVar[tuple[str, ...]] = ("gptq",)
    needs: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    extra: ClassVar[str] = "export-gptq"
    tolerance: ClassVar[float] = 5e-3
    weights: ClassVar[float] = 1e-5
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32", "gptq_backend": "gptq_torch"}

    version: str = "v2"

    def __post_init__(self) -> None:
        if self.version not in _FORMATS:
            raise UsageError(f"version {self.version!r}: expected {' or '.join(_FORMATS)}.")

    def how(self, name: str) -> str:
        """With GPTQModel."""
        return f"""## How to load

```
pip install gptqmodel
```

```python
from gptqmodel import GPTQModel

model = GPTQModel.load({json.dumps(name)})
```

transformers loads it too (`pip install gptqmodel optimum`), but only where the head is not quantized and all other
quantized linears have the same bits and groups."""

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Nothing."""
        return []

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """What GPTQModel reads and transformers does not."""
        kinds = {module.spec.weight for module in modules}
        return (
            [] if len(kinds) < 2 else ["linears are not all stored alike: GPTQModel loads that, transformers does not."]
        )

    def refuse(self, module: Module) -> str | None:
        """Linears in `uniform`, inputs as they come, in widths and groups that every reader takes."""
        reason = uniform_only(module)
        if reason is not None:
            return reason
        fmt = uniform_of(module)
        if fmt.bits not in _BITS:
            return f"{fmt.bits} bits are not among the {', '.join(map(str, _BITS))} that it has. Use {_WORKS}"
        if module.n % 32 or module.k % 32:
            return (
                f"its {module.n} rows and {module.k} columns are not both multiples of 32, which is what its words "
                "hold. Leave it dense with --ignore, or use --to dense"
            )
        if fmt.group_size != -1 and module.k % fmt.group_size:
            return (
                f"groups of {fmt.group_size} do not divide its {module.k} columns; {fitting_group(module.k)} would do"
            )
        if fmt.group_size not in _GROUPS:
            return f"groups of {fmt.group_size} are none of its {', '.join(map(str, _GROUPS))}. Use {_WORKS}"
        if self.version == "v1" and not fmt.symmetric:
            return (
                "it has zeros of its own, and version v1 stores each less one, which a zero of 0 does not survive. "
                f"Use -s version=v2, or {_WORKS}"
            )
        return None

    def write(self, packed: Packed, out: Path) -> None:
        """Repack module by module; the config stands in a file of its own too, where older readers look for it."""
        config = quantization(packed, self.version)
        write_folder(packed, out, lambda module, tensors: convert(module, tensors, self.version), config)
        write_text(out / "quantize_config.json", dump_json(config, indent=1) + "\n")


def convert(module: Module, tensors: Tensors, version: str = "v2") -> Mapping[str, Tensor]:
    """The library's tensors of one linear.

    Its words hold the same stream of bits along k as ours, the three words of 32 codes of 3 bits included, and zeros
    along n as ours; what is a row here is a column there.

    Returns:
        `qweight` int32 [k bits / 32, n], `qzeros` int32 [groups, n bits / 32], `scales` float16 [groups, n], `g_idx`
        int32 [k], the group of each input feature.
    """
    fmt = uniform_of(module)
    groups = _bits.groups_in(module.k, fmt.group_size)
    out = {
        "qweight": tensors["qweight"].T.contiguous(),
        "qzeros": tensors["qzeros"] if "qzeros" in tensors else _middle(fmt.bits, groups, module.n, version),
        "scales": _float16(tensors["scales"], module.name).T.contiguous(),
        "g_idx": (torch.arange(module.k) // (module.k // groups)).to(torch.int32),
    }
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def _middle(bits: int, groups: int, n: int, version: str) -> Tensor:
    """Zeros of symmetric integers, int32 [groups, n bits / 32]."""
    zero = 2 ** (bits - 1) - (version == "v1")
    return _bits.pack_bits(torch.full((groups, n), zero, dtype=torch.uint8), bits)


def _float16(scales: Tensor, name: str) -> Tensor:
    out = scales.to(torch.float16)
    if not torch.equal(out.to(torch.float32), scales.to(torch.float32)):
        raise PlanError(
            f"--to gptq: {name}: its bfloat16 scales do not fit float16, which is what is stored there. Use --to "
            "compressed-tensors, which takes them as they are. Nothing was written."
        )
    return out


def quantization(packed: Packed, version: str = "v2") -> dict[str, Any]:
    """The `quantization_config`: what most linears have, and a pattern for each group of others.

    `dynamic` is read by GPTQModel and vLLM. transformers does without: it reads `modules_in_block_to_quantize`, which
    names what is packed where something in the layers is not.
    """
    linears = packed.linears(transposed=True)
    kinds: dict[Uniform, list[str]] = {}
    for module in packed.modules:
        kinds.setdefault(uniform_of(module), []).append(module.name)
    usual = _usual(packed)
    coded = {name for names in kinds.values() for name in names}
    head = packed.head
    dense = [name for name in linears if name not in coded and name != head]
    dynamic: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns(dense, linears)}
    for fmt, names in kinds.items():
        own = {key: value for key, value in _options(fmt).items() if _options(usual)[key] != value}
        if own:
            dynamic |= {f"+:{pattern}": own for pattern in patterns(names, linears)}
    return {
        "quant_method": "gptq",
        **_options(usual),
        "desc_act": False,
        "lm_head": head in coded,
        "checkpoint_format": _FORMATS[version],
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        **({"modules_in_block_to_quantize": [_within(coded, linears)]} if dense else {}),
        "meta": {"quantizer": ["qexport"]},
    }


def _usual(packed: Packed) -> Uniform:
    """What most linears are stored in."""
    return Counter(uniform_of(module) for module in packed.modules).most_common(1)[0][0]


def _options(fmt: Uniform) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}


def _within(coded: set[str], linears: Sequence[str]) -> list[str]:
    """Few endings of names that packed linears have and no others: `mlp.up_proj` where that is packed in all layers."""
    out = []
    for name in sorted(coded):
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        ending = ".".join(parts[numbers[0] + 1 :]) if numbers else name
        alike = {other for other in linears if other.endswith(ending)}
        out.append(ending if alike <= coded else name)
    return list(dict.fromkeys(out))


class Reading:
    """Folders of GPTQModel, AutoGPTQ and whoever writes their format, v1 and v2, sorted by activations or not."""

    quant_method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _FORMATS.values() or config.get("pack_dtype", "int32") != "int32":
            raise PlanError(
                f"expected checkpoint_format {' or '.join(_FORMATS.values())} in int32, found {str(version)[:40]}, "
                f"{str(config.get('pack_dtype'))[:20]}."
            )
        self._less, self._symmetric = int(version == "gptq"), bool(config.get("sym"))

    def found(self, name: str, tensors: Tensors, n: int, k: int) -> Found:
        """Bits and groups as the shapes have them; where groups are not in order, columns sorted by group."""
        words, scales = tensors.get("qweight"), tensors.get("scales")
        if words is None or scales is None or words.ndim != 2 or scales.ndim != 2 or not scales.shape[0]:
            raise LayoutError(f"{name}: expected qweight, qzeros and scales, matrices all, found {sorted(tensors)}.")
        bits, groups = words.shape[0] * 32 // k, scales.shape[0]
        if bits not in _BITS or k % 32 or n % 32 or k % groups:
            raise LayoutError(f"{name}: {bits} bits in {groups} groups of {k} columns, which is none of its layouts.")
        words = expect(words, [torch.int32], [k * bits // 32, n], f"{name}.qweight")
        zeros = expect(tensors.get("qzeros"), [torch.int32], [groups, n * bits // 32], f"{name}.qzeros")
        scales = expect(scales, FLOATS, [groups, n], f"{name}.scales")
        codes = _bits.unpack_bits(words.T.contiguous(), bits, k)
        codes, perm = sorted_by_group(codes, tensors.get("g_idx"), groups, f"{name}.g_idx")
        found = _bits.unpack_across(zeros, bits, n) + self._less
        if int(found.max()) >= 2**bits:
            raise LayoutError(
                f"{name}.qzeros: a zero of {2**bits} in version v1, which readers take in different ways."
            )
        symmetric = self._symmetric and bool((found == 2 ** (bits - 1)).all())
        dtype = sixteen_bits(scales, f"{name}.scales")
        fmt = Uniform(bits, -1 if groups == 1 else k // groups, symmetric, dtype)
        fields = {"codes": codes, "scales": scales.T.to(torch.float32).contiguous()}
        return Found(fmt, fields if symmetric else {**fields, "zeros": found.to(torch.float32)}, perm)


plugin = Gptq
reading = Reading
