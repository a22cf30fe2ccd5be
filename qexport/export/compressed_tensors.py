"""compressed-tensors, the format of vLLM and llm-compressor: `pack-quantized` integers of 2 to 8 bits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.errors import LayoutError, PlanError, UsageError
from qexport.export._folder import write_folder
from qexport.export._uniform import (
    FLOATS,
    expect,
    fitting_group,
    patterns,
    sixteen_bits,
    sorted_by_group,
    stream,
    uniform_of,
    uniform_only,
)  # fmt: skip
from qexport.export.base import Found, Module, Packed, with_transformers
from qexport.formats import _bits
from qexport.formats.base import Format
from qexport.formats.uniform import Uniform
from qexport.schema import Tensors

_FORMS = ("pack-quantized", "int-quantized")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM, in one matrix each


@dataclass(frozen=True)
class CompressedTensors:
    """Integers as they are: codes, scales and zeros are the same numbers, in the other library's layout.

    From version 0.18 on codes of 3, 5, 6 and 7 bits lie in a stream without gaps, which is what is written; earlier
    ones read ten 3-bit codes from each word. For 2, 4 and 8 bits all versions agree.

    Since the same version transformers can't hold packed zero points: it expects them unpacked. So a checkpoint with
    zeros asks in its config to be decoded when it is loaded, and that is done in the dtype of the scales: they become
    float32 then, or a second rounding would change the weights.

    Attributes:
        form: `"pack-quantized"`, or `"int-quantized"` for 8 bits: a byte a code, which kernels for int8 inputs read.
    """

    source: ClassVar[str] = "compressed-tensors 0.20"
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    tolerance: ClassVar[float] = 1e-5
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32"}

    form: str = "pack-quantized"

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise UsageError(f"form {self.form!r}: expected {' or '.join(_FORMS)}.")

    def how(self, name: str) -> str:
        """With transformers."""
        return with_transformers(name, "transformers compressed-tensors", "vLLM reads the same files.")

    def refuse(self, module: Module) -> str | None:
        """Linears in `uniform`, whole groups, inputs as they come."""
        reason = uniform_only(module)
        if reason is not None:
            return reason
        if module.transposed:
            return "it is a Conv1D, which this library takes for no linear. Use --to gptq, bitsandbytes or dense"
        bits, group = uniform_of(module).bits, uniform_of(module).group_size
        if self.form == "int-quantized" and bits != 8:
            return f"int-quantized takes 8 bits, and it has {bits}. Leave out -s form, or quantize with --bits 8"
        if group != -1 and module.k % group:
            return f"groups of {group} do not divide its {module.k} columns; {fitting_group(module.k)} would do"
        return None

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Zeros beside other bits: what is decoded at load is decoded by the first group of the config."""
        kinds = {(uniform_of(m).bits, uniform_of(m).symmetric): m.name for m in reversed(modules)}
        if len(kinds) < 2 or all(symmetric for _, symmetric in kinds):
            return []
        said = " and ".join(
            f"{bits} bits {'without' if symmetric else 'with'} zeros" for bits, symmetric in sorted(kinds)
        )
        why = f"there are {said}, and transformers decodes zeros with one of them for all. Use --sym, or the same bits"
        return [(name, why) for name in list(kinds.values())[:1]]

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """Linears that vLLM makes one matrix of, and that are not stored alike."""
        kinds = {module.name: module.spec for module in modules}
        out = []
        for parts in _FUSED:
            for name in [n for n in kinds if n.endswith(f".{parts[0]}")]:
                own = [f"{name.removesuffix(parts[0])}{part}" for part in parts]
                if len({kinds.get(n) for n in own}) > 1:
                    out.append(f"{', '.join(own)} are not stored alike, and vLLM makes one matrix of them.")
        return out

    def write(self, packed: Packed, out: Path) -> None:
        """Repack module by module."""
        one = bytewise if self.form == "int-quantized" else convert
        write_folder(packed, out, one, quantization(packed, self.form))


def convert(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
    """The library's tensors of one linear.

    Both pack codes as a stream of bits along k, and zeros along n; ours is padded to whole 32 codes, and has a row for
    each group of zeros where theirs has a column. Theirs adds 2^(bits - 1) to signed integers, which gives our codes.
    """
    fmt = uniform_of(module)
    scales = tensors["scales"]
    out = {
        "weight_packed": tensors["qweight"][:, : ceil(module.k * fmt.bits / 32)].contiguous(),
        "weight_scale": scales if fmt.symmetric else scales.to(torch.float32),
        "weight_shape": torch.tensor([module.n, module.k]),
    }
    if not fmt.symmetric:
        out["weight_zero_point"] = tensors["qzeros"][:, : ceil(module.n * fmt.bits / 32)].T.contiguous()
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def bytewise(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
    """The tensors of one 8-bit linear in the library's `int-quantized` form: signed codes and zeros, a byte each."""
    fmt = uniform_of(module)
    fields = fmt.unpack(tensors, module.n, module.k)
    out = {"weight": _signed(fields["codes"]), "weight_scale": tensors["scales"]}
    if not fmt.symmetric:
        out["weight_scale"] = tensors["scales"].to(torch.float32)
        out["weight_zero_point"] = _signed(fields["zeros"])
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def _signed(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def quantization(packed: Packed, form: str = _FORMS[0]) -> dict[str, Any]:
    """The `quantization_config`: a group of linears for each kind of integers."""
    kinds: dict[Format, list[str]] = {}
    for module in packed.modules:
        kinds.setdefault(module.spec.weight, []).append(module.name)
    linears = packed.linears()
    coded = {name for names in kinds.values() for name in names}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else [f"re:{pattern}" for pattern in patterns(names, linears)],
            "weights": _weights(fmt),
            **({} if form == _FORMS[0] else {"format": form}),  # or the library takes 8 bits for packed ones
            "input_activations": None,
            "output_activations": None,
        }
        for i, (fmt, names) in enumerate(kinds.items())
    }
    zeros = any(isinstance(fmt, Uniform) and not fmt.symmetric for fmt in kinds)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
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


class Reading:
    """Folders of `pack-quantized` integers, and of `int-quantized` ones whose inputs stay floats."""

    quant_method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_scale", "weight_packed", "weight", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("quantization_status") != "compressed":
            raise PlanError("expected quantization_status compressed.")
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            if config.get(key):
                raise PlanError(f"it has a {key}, which qexport does not know: the weights alone are not the model.")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
            raise PlanError("expected config_groups, tables of targets and weights.")
        self._groups = [(list(g.get("targets") or ()), _readable(g, config.get("format"))) for g in groups.values()]

    def found(self, name: str, tensors: Tensors, n: int, k: int) -> Found:
        """Codes, scales and zeros as they are; with an index of groups, columns sorted by it."""
        bits, group, symmetric = self._scheme(name)
        groups, half = _bits.groups_in(k, group), 2 ** (bits - 1)
        scales = expect(tensors.get("weight_scale"), FLOATS, [n, groups], f"{name}.weight_scale")
        if k % groups:
            raise LayoutError(f"{name}: its groups of {group} do not divide its {k} columns.")
        fields: dict[str, Tensor] = {"scales": scales.to(torch.float32)}
        if "weight_packed" in tensors and "weight" in tensors:
            raise LayoutError(f"{name}: has both weight_packed and weight. Delete the one that does not belong there.")
        if "weight_packed" in tensors:
            codes = stream(tensors["weight_packed"], bits, (n, k), f"{name}.weight_packed")
        else:
            codes = _unsigned(expect(tensors.get("weight"), [torch.int8], [n, k], f"{name}.weight"), half)
        where, zeros = f"{name}.weight_zero_point", tensors.get("weight_zero_point")
        if symmetric and zeros is not None:
            raise LayoutError(f"{where}: is there, and the config calls these weights symmetric.")
        if not symmetric and zeros is not None and zeros.dtype == torch.int32:
            fields["zeros"] = stream(zeros.T.contiguous(), bits, (groups, n), where).T.to(torch.float32)
        elif not symmetric:
            fields["zeros"] = _unsigned(expect(zeros, [torch.int8], [n, groups], where), half).to(torch.float32)
        shape = tensors.get("weight_shape")
        if shape is not None and shape.tolist() != [n, k]:
            raise LayoutError(f"{name}.weight_shape: expected {[n, k]}, found {str(shape.tolist())[:60]}.")
        codes, perm = sorted_by_group(codes, tensors.get("weight_g_idx"), groups, f"{name}.weight_g_idx")
        fmt = Uniform(bits, group, symmetric, sixteen_bits(scales, f"{name}.weight_scale"))
        return Found(fmt, {"codes": codes, **fields}, perm)

    def _scheme(self, name: str) -> tuple[int, int, bool]:
        for targets, scheme in self._groups:
            for target in targets:
                exact = target == name or (target.startswith("re:") and re.match(target[3:], name))
                if exact or target == "Linear":
                    return scheme
        raise PlanError(f"{name}: is packed, and no config_group has it among its targets.")


def _unsigned(codes: Tensor, half: int) -> Tensor:
    out = codes.to(torch.int16) + half
    if int(out.min()) < 0 or int(out.max()) >= 2 * half:
        raise LayoutError(f"expected codes from {-half} to {half - 1}, found {int(codes.min())} to {int(codes.max())}.")
    return out.to(torch.uint8)


def _readable(group: Mapping[str, Any], form: Any) -> tuple[int, int, bool]:
    """Bits, group size and symmetry of a config group; raises `PlanError` unless it is plain integers."""
    weights = group.get("weights") or {}
    form = group.get("format") or form
    strategy = weights.get("strategy")
    bits: Any = weights.get("num_bits")
    size: Any = weights.get("group_size") if strategy == "group" else -1
    plain = weights.get("type") == "int" and strategy in ("group", "channel") and not weights.get("dynamic")
    if not plain or form not in ("pack-quantized", "int-quantized") or bits not in range(2, 9):
        raise PlanError(
            f"expected integers of 2 to 8 bits in groups or channels, pack-quantized or int-quantized; found {form}, "
            f"{weights.get('type')}{bits}, {strategy}."
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise PlanError("it quantizes activations, which qexport does not do yet.")
    return int(bits), int(size), bool(weights.get("symmetric", True))


plugin = CompressedTensors
reading = Reading
