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
    rounded_always,
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
from qexport.inputs.base import InputQuant
from qexport.inputs.tensor import PerTensor
from qexport.inputs.token import Token
from qexport.schema import Tensors

_FORMS = ("auto", "pack-quantized", "int-quantized")
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
        form: `"pack-quantized"`, or `"int-quantized"`: a byte a code, which kernels for int8 inputs read. `"auto"`
            takes the second for linears whose inputs are rounded, and the first for all others.
    """

    source: ClassVar[str] = "compressed-tensors 0.20"
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    tolerance: ClassVar[float] = 1e-5
    carried: ClassVar[float] = 3.0
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32"}

    form: str = "auto"

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise UsageError(f"form {self.form!r}: expected {', '.join(_FORMS)}.")

    def how(self, name: str) -> str:
        """With transformers."""
        return with_transformers(name, "transformers compressed-tensors", "vLLM reads the same files.")

    def refuse(self, module: Module) -> str | None:
        """Linears in `uniform`, whole groups, inputs as they come."""
        reason = uniform_only(module, inputs=True)
        if reason is not None:
            return reason
        if module.transposed:
            return "it is a Conv1D, which this library takes for no linear. Use --to gptq, bitsandbytes or dense"
        bits, group = uniform_of(module).bits, uniform_of(module).group_size
        if module.spec.input.quant is not None:
            reason = self._refuse_input(module)
            if reason is not None:
                return reason
        elif self.form == "int-quantized" and bits != 8:
            return f"int-quantized takes 8 bits, and it has {bits}. Leave out -s form, or quantize with --bits 8"
        if group != -1 and module.k % group:
            return f"groups of {group} do not divide its {module.k} columns; {fitting_group(module.k)} would do"
        return None

    def _refuse_input(self, module: Module) -> str | None:
        """Inputs that the library rounds, per token or by one scale, beside weights that it does not decode at load."""
        reason = rounded_always(module)
        if reason is not None:
            return reason
        quant = module.spec.input.quant
        if not isinstance(quant, (Token, PerTensor)):
            return f'input "{quant.name if quant else ""}" has no counterpart there. Use --input token or tensor'
        if self.form == "pack-quantized":
            return "its input is rounded, and pack-quantized is for inputs that stay floats. Leave out -s form"
        return None

    def rounding(self, module: Module) -> float:
        """The library divides the largest of a token by 127.5, we and vLLM by 127; all other steps are ours."""
        quant = module.spec.input.quant
        return 3.0 if isinstance(quant, Token) and quant.symmetric else 0.25

    def form_of(self, module: Module) -> str:
        """The form of one linear."""
        if self.form != "auto":
            return self.form
        return "pack-quantized" if module.spec.input.quant is None else "int-quantized"

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Zeros beside other bits: what is decoded at load is decoded by the first group of the config.

        Nor does what is decoded at load round inputs.
        """
        rounded = [module for module in modules if module.spec.input.quant is not None]
        packed = [m for m in modules if self.form_of(m) == "pack-quantized" and not uniform_of(m).symmetric]
        if rounded and packed:
            why = (
                "it has zeros and an input that stays a float, others have inputs that are rounded, and transformers "
                "does not load them together. Use --sym, -s form=int-quantized with 8 bits, or one --input for all"
            )
            return [(module.name, why) for module in packed]
        if rounded:
            return []
        kinds = {(uniform_of(m).bits, uniform_of(m).symmetric): m.name for m in reversed(modules)}
        if len(kinds) < 2 or all(symmetric for _, symmetric in kinds):
            return []
        said = " and ".join(
            f"{bits} bits {'without' if symmetric else 'with'} zeros" for bits, symmetric in sorted(kinds)
        )
        why = f"there are {said}, and transformers decodes zeros with one of them for all. Use --sym, or the same bits"
        return [(name, why) for name in list(kinds.values())[:1]]

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """What vLLM has no kernel for, and linears that it makes one matrix of and that are not stored alike."""
        kinds = {module.name: module.spec for module in modules}
        slow = [module.name for module in modules if not _kernel(module)]
        out = []
        if slow:
            more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
            out.append(
                f"{slow[0]}{more}: transformers computes that, vLLM has no kernel for it: weights are symmetric there, "
                "of 8 bits per channel or, with --input token, of 4 bits, and inputs have 8 bits."
            )
        for parts in _FUSED:
            for name in [n for n in kinds if n.endswith(f".{parts[0]}")]:
                own = [f"{name.removesuffix(parts[0])}{part}" for part in parts]
                if len({kinds.get(n) for n in own}) > 1:
                    out.append(f"{', '.join(own)} are not stored alike, and vLLM makes one matrix of them.")
        return out

    def write(self, packed: Packed, out: Path) -> None:
        """Repack module by module."""
        forms = {module.name: self.form_of(module) for module in packed.modules}
        ways = {"pack-quantized": convert, "int-quantized": bytewise}
        config = quantization(packed, forms)
        write_folder(packed, out, lambda module, tensors: ways[forms[module.name]](module, tensors), config)


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
    """The tensors of one linear in the library's `int-quantized` form: signed codes and zeros, a byte each."""
    fmt = uniform_of(module)
    fields, half = fmt.unpack(tensors, module.n, module.k), 2 ** (fmt.bits - 1)
    out = {"weight": _signed(fields["codes"], half), "weight_scale": tensors["scales"]}
    if not fmt.symmetric:
        out["weight_scale"] = tensors["scales"].to(torch.float32)
        out["weight_zero_point"] = _signed(fields["zeros"], half)
    if "input_quant_scale" in tensors:
        out["input_scale"] = tensors["input_quant_scale"]
    if "input_quant_zero" in tensors:
        out["input_zero_point"] = tensors["input_quant_zero"].to(torch.int8)
    return {f"{module.name}.{name}": tensor for name, tensor in out.items()}


def _signed(codes: Tensor, half: int) -> Tensor:
    return (codes.to(torch.int16) - half).to(torch.int8)


def _kernel(module: Module) -> bool:
    """Whether vLLM multiplies such weights by such inputs: what its sources call W8A8 and W4A8."""
    fmt, quant = uniform_of(module), module.spec.input.quant
    if not isinstance(quant, (Token, PerTensor)):
        return True
    whole, four = fmt.bits == 8 and fmt.group_size == -1, fmt.bits == 4 and isinstance(quant, Token)
    return quant.bits == 8 and fmt.symmetric and (whole or four)


def quantization(packed: Packed, forms: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config`: a group of linears for each kind of integers; `forms` of linears by name."""
    kinds: dict[tuple[Format, InputQuant | None, str], list[str]] = {}
    for module in packed.modules:
        kind = (module.spec.weight, module.spec.input.quant, forms[module.name])
        kinds.setdefault(kind, []).append(module.name)
    linears = packed.linears()
    coded = {name for names in kinds.values() for name in names}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else [f"re:{pattern}" for pattern in patterns(names, linears)],
            "weights": _weights(fmt),
            **({} if set(forms.values()) == {"pack-quantized"} else {"format": form}),  # or 8 bits are taken for packed
            "input_activations": None if quant is None else _activations(quant),
            "output_activations": None,
        }
        for i, ((fmt, quant, form), names) in enumerate(kinds.items())
    }
    found = set(forms.values())
    zeros = any(isinstance(fmt, Uniform) and not fmt.symmetric for fmt, _, _ in kinds)
    floats = all(quant is None for _, quant, _ in kinds)  # what is decoded at load rounds no input
    return {
        "quant_method": "compressed-tensors",
        "format": found.pop() if len(found) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [name for name in linears if name not in coded],
        "config_groups": groups,
        **({"dequantize": True} if zeros and floats else {}),
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


def _activations(quant: InputQuant) -> dict[str, Any]:
    assert isinstance(quant, (Token, PerTensor))
    return {
        "num_bits": quant.bits,
        "type": "int",
        "symmetric": quant.symmetric,
        "strategy": "token" if isinstance(quant, Token) else "tensor",
        "group_size": None,
        "dynamic": isinstance(quant, Token),
        "actorder": None,
        "block_structure": None,
        "observer": None if isinstance(quant, Token) else "minmax",
        "observer_kwargs": {},
    }


class Reading:
    """Folders of `pack-quantized` and `int-quantized` integers, whose inputs may be rounded too."""

    quant_method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_scale", "weight_packed", "weight", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
        "input_zero_point",
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
        scheme = self._scheme(name)
        bits, group, symmetric = scheme.bits, scheme.group_size, scheme.symmetric
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
        return Found(fmt, {"codes": codes, **fields}, perm, scheme.quant, _inputs(name, tensors, scheme.quant))

    def _scheme(self, name: str) -> "_Scheme":
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


def _inputs(name: str, tensors: Tensors, quant: InputQuant | None) -> dict[str, Tensor]:
    """Values of `quant`; raises `LayoutError` unless what is stored for the input is what it needs."""
    out: dict[str, Tensor] = {}
    scale, zero = tensors.get("input_scale"), tensors.get("input_zero_point")
    if isinstance(quant, PerTensor):
        scale = expect(None if scale is None else scale.reshape(-1), FLOATS, [1], f"{name}.input_scale")
        out["quant_scale"] = scale.to(torch.float32)
    elif scale is not None:
        raise LayoutError(f"{name}.input_scale: is there, and the config has no stored scale for inputs.")
    if isinstance(quant, PerTensor) and not quant.symmetric:
        where = f"{name}.input_zero_point"
        zero = expect(None if zero is None else zero.reshape(-1), [torch.int8, torch.int32], [1], where)
        out["quant_zero"] = zero.to(torch.int32)
    elif zero is not None and zero.any():
        raise LayoutError(f"{name}.input_zero_point: is there, and the config calls inputs symmetric, or floats.")
    return out


@dataclass(frozen=True)
class _Scheme:
    """A config group in our terms."""

    bits: int
    group_size: int
    symmetric: bool
    quant: InputQuant | None


def _readable(group: Mapping[str, Any], form: Any) -> _Scheme:
    """A config group; raises `PlanError` unless it is plain integers."""
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
    if group.get("output_activations"):
        raise PlanError("it rounds what comes out of linears (output_activations), and qexport what goes in.")
    return _Scheme(int(bits), int(size), bool(weights.get("symmetric", True)), _rounded(group.get("input_activations")))


def _rounded(args: Mapping[str, Any] | None) -> InputQuant | None:
    """How inputs are rounded; raises `PlanError` for floats, groups and whatever else is no input quantizer here."""
    if not args:
        return None
    kind, bits, dynamic = args.get("type", "int"), args.get("num_bits", 8), args.get("dynamic", False)
    strategy = args.get("strategy") or ("tensor" if args.get("group_size") is None else "group")
    ways: dict[Any, type[Token] | type[PerTensor]] = {("token", True): Token, ("tensor", False): PerTensor}
    if kind != "int" or bits not in range(4, 9) or (strategy, dynamic) not in ways:
        raise PlanError(
            "expected input_activations of 4 to 8 bits, by token when it runs or by tensor with a stored scale; found "
            f"{str(kind)[:20]}{str(bits)[:20]}, {str(strategy)[:20]}, dynamic {str(dynamic)[:20]}."
        )
    return ways[strategy, dynamic](int(bits), bool(args.get("symmetric", True)))


plugin = CompressedTensors
reading = Reading
