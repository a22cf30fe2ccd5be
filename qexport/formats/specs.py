"""What one quantized linear stores: the format of its weight and what happens to its input before the product.

    y = weight(decode) · prepare(x)          prepare: scale, rotate, permute, round, as `InputSpec` says

The tensors of both live side by side under the linear's module path; those of the input start with `input_`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qexport import plugins, schema
from qexport.errors import CheckpointError, LayoutError, UsageError
from qexport.formats import _bits
from qexport.formats._rotation import rotate
from qexport.formats.base import Format, IntegerFormat
from qexport.inputs.base import InputQuant, as_json, make_input
from qexport.schema import Extents, Field, Layout, Tensors


@dataclass(frozen=True)
class InputSpec:
    """Steps applied to the input, in this order.

    Attributes:
        scale: multiply feature j by `input_scale[j]`.
        hadamard: multiply feature j by its sign, then all by the matrix of `formats._rotation`. Bit j of `input_signs`
            is 1 for a sign of -1.
        permute: column j of the stored weight meets feature `input_perm[j]` of what the steps before it gave.
        quant: round what comes out to integers, which the weight's integers are multiplied by; None: it stays a float.
    """

    scale: bool = False
    hadamard: bool = False
    permute: bool = False
    quant: InputQuant | None = None

    def __or__(self, other: "InputSpec") -> "InputSpec":
        return InputSpec(*(getattr(self, f.name) or getattr(other, f.name) for f in fields(self)))

    def layout(self, k: int) -> Layout:
        """Stored tensors of the input side of a linear with k input features."""
        out: dict[str, Field] = {}
        if self.scale:
            out["input_scale"] = Field((k,), torch.float32, ("k",), "factor of each input feature")
        if self.hadamard:
            words = (_bits.words_for(k, 1),)
            out["input_signs"] = Field(words, torch.int32, ("word",), "signs of the features, 1 is -1, bit-packed")
        if self.permute:
            dtype = torch.uint16 if k <= 65536 else torch.int32
            out["input_perm"] = Field((k,), dtype, ("k",), "input feature that each stored column meets")
        return out if self.quant is None else {**out, **self.quant.layout(k)}

    def pack(self, values: Tensors) -> dict[str, Tensor]:
        """Stored tensors from `scale` float32 [k], `signs` float32 [k], `perm` int64 [k] and what `quant` calibrates.

        Raises:
            LayoutError: something is missing.
        """
        out: dict[str, Tensor] = {}
        for step, name, asked in (("scale", "scale", self.scale), ("hadamard", "signs", self.hadamard)):
            if asked and name not in values:
                raise LayoutError(f"this linear's input has the step {step!r}, but nothing was given for it")
        if self.scale:
            out["input_scale"] = values["scale"].float().contiguous()
        if self.hadamard:
            out["input_signs"] = _bits.pack_bits((values["signs"] < 0).to(torch.uint8), 1)
        if self.permute:
            if "perm" not in values:
                raise LayoutError("this linear stores a permutation, but the method gave none")
            out["input_perm"] = values["perm"].to(self.layout(values["perm"].numel())["input_perm"].dtype)
        for name in () if self.quant is None else self.quant.layout(1):
            if name.removeprefix("input_") not in values:
                raise LayoutError(f"{name}: this linear rounds its input by calibration, but nothing was found for it")
            out[name] = values[name.removeprefix("input_")].contiguous()
        return out

    def rotated(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The steps up to the rotation applied to an input [.., k], in float32."""
        x = x.to(torch.float32)
        x = x * tensors["input_scale"] if self.scale else x
        return rotate(x * _signs(tensors, x.shape[-1])) if self.hadamard else x

    def prepared(self, x: Tensor, tensors: Tensors) -> Tensor:
        """All steps before rounding applied to rows [m, k], in float32 and in the order of the stored columns."""
        x = self.rotated(x, tensors)
        return x[:, tensors["input_perm"].long()] if self.permute else x

    def rounded(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The input [.., k] that has the effect of the rounded one on the weight that meets x as it comes; x's dtype.

        For calibration, where a linear has its decoded weight; the gradient passes as if nothing was rounded.
        """
        if self.quant is None:
            return x
        flat = self.prepared(x.detach().reshape(-1, x.shape[-1]), tensors)
        y = self.quant.encode(flat, tensors).values(flat)
        if self.permute:
            natural = torch.empty_like(y)
            natural[:, tensors["input_perm"].long()] = y
            y = natural
        if self.hadamard:
            y = rotate(y, inverse=True) * _signs(tensors, y.shape[-1])
        y = y / tensors["input_scale"] if self.scale else y
        return x + (y.view_as(x).to(x.dtype) - x.detach())

    def met(self, w: Tensor, tensors: Tensors) -> Tensor:
        """The weight to store, for the one that meets the input as it comes, float32 [n, k]; `undone` backwards."""
        w = w / tensors["input_scale"] if self.scale else w
        w = rotate(w * _signs(tensors, w.shape[1])) if self.hadamard else w
        return w[:, tensors["input_perm"].long()] if self.permute else w

    def undone(self, w: Tensor, tensors: Tensors) -> Tensor:
        """The weight that meets the input as it comes, for the stored one, float32 [n, k]."""
        if self.permute:  # columns are picked several times as fast as they are put
            perm = tensors["input_perm"].long()
            stored = torch.empty_like(perm)
            stored[perm] = torch.arange(perm.shape[0], device=perm.device)
            w = w.index_select(1, stored)
        if self.hadamard:
            w = rotate(w, inverse=True) * _signs(tensors, w.shape[1])
        return w * tensors["input_scale"] if self.scale else w

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Refuse a permutation that is none, and factors that are not finite; raises `LayoutError`."""
        if self.permute:
            perm = tensors["input_perm"].long()
            if not torch.equal(perm.sort().values, torch.arange(k, device=perm.device)):
                raise LayoutError(
                    f"{where}.input_perm: expected a permutation of 0..{k - 1}, found repeated or missing values."
                )
        if self.scale and not torch.isfinite(tensors["input_scale"]).all():
            raise LayoutError(f"{where}.input_scale: expected finite factors, found NaN or infinity.")
        if self.quant is not None:
            self.quant.check_content(tensors, k, where)


@dataclass(frozen=True)
class LinearSpec:
    """Format of the weight and treatment of the input of one linear."""

    weight: Format
    input: InputSpec = InputSpec()

    def layout(self, n: int, k: int) -> Layout:
        """All stored tensors of the linear but its bias, which stays as the model has it."""
        return {**self.weight.layout(n, k), **self.input.layout(k)}

    def expected_extents(self, n: int, k: int) -> Extents:
        """Likely values of data-dependent extents, for size prediction only."""
        quant = self.input.quant
        return {**self.weight.expected_extents(n, k), **({} if quant is None else quant.expected_extents(k))}

    def nbytes(self, n: int, k: int, extents: Extents | None = None) -> int:
        """Stored bytes; data-dependent extents that are not given default to the expected ones."""
        return schema.nbytes(self.layout(n, k), {**self.expected_extents(n, k), **(extents or {})})

    def check(self, tensors: Tensors, n: int, k: int, where: str, extents: Extents | None = None) -> dict[str, int]:
        """Check structure, then contents; returns the extents; raises `LayoutError`."""
        found = schema.check(tensors, self.layout(n, k), where, extents)
        self.weight.check_content(tensors, n, k, where)
        self.input.check_content(tensors, k, where)
        return found

    def pack(self, weight_fields: Tensors, inputs: Tensors) -> dict[str, Tensor]:
        """Stored tensors from a method's fields and what the treatment of the input needs; see `InputSpec.pack`."""
        return {**self.weight.pack(weight_fields), **self.input.pack(inputs)}

    def decoded(self, tensors: Tensors, n: int, k: int) -> Tensor:
        """The weight that the stored tensors mean, float32 [n, k], columns in the order of the input features.

        All that happens to the input is folded in, so `F.linear(x, decoded)` is the linear.
        """
        return self.input.undone(self.weight.decode(self.weight.unpack(tensors, n, k)), tensors)


def _signs(tensors: Tensors, k: int) -> Tensor:
    """Signs of the features, float32 [k]."""
    return 1 - 2 * _bits.unpack_bits(tensors["input_signs"], 1, k).to(torch.float32)


def format_options(fmt: Format) -> dict[str, Any]:
    """The options of a format as plain JSON values."""
    return asdict(fmt)  # type: ignore[call-overload, no-any-return]


def to_json(spec: LinearSpec) -> dict[str, Any]:
    """A spec as it stands in `config.json` and in the header of every shard."""
    steps: dict[str, Any] = {f.name: True for f in fields(InputSpec) if getattr(spec.input, f.name) is True}
    if spec.input.quant is not None:
        steps["quant"] = as_json(spec.input.quant)
    return {
        "format": spec.weight.name,
        "version": spec.weight.version,
        "options": format_options(spec.weight),
        "input": steps,
    }


def make_format(name: str, options: Mapping[str, Any]) -> Format:
    """A format from its name and options; raises `UsageError` that lists what exists."""
    cls = plugins.get("formats", name)
    known = {f.name for f in fields(cls)}
    for key in options:
        if key not in known:
            raise UsageError(f"format {name!r} has no option {key!r}; it has {', '.join(sorted(known)) or 'none'}.")
    fmt: Format = cls(**options)
    return fmt


def from_json(data: Any, where: str) -> LinearSpec:
    """A spec from untrusted JSON; raises `CheckpointError` when it is malformed, unknown or too new."""
    try:
        name, version, options, steps = (
            data["format"],
            data["version"],
            dict(data["options"]),
            dict(data.get("input") or {}),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: a spec needs format, version, options and input; found {str(data)[:200]}."
        ) from error
    if name not in plugins.names("formats"):
        raise CheckpointError(
            f"{where}: unknown format {str(name)[:80]!r}; this qexport reads {', '.join(plugins.names('formats'))}. "
            "The checkpoint may need a newer qexport."
        )
    cls = plugins.get("formats", name)
    if not isinstance(version, int) or not 1 <= version <= cls.version:
        raise CheckpointError(
            f"{where}: format {name!r} version {str(version)[:20]} needs a newer qexport; "
            f"this one reads up to {cls.version}."
        )
    quant = _quant_from_json(steps.pop("quant", None), where)
    unknown = set(steps) - {f.name for f in fields(InputSpec)}
    if unknown or not all(isinstance(v, bool) for v in steps.values()):
        raise CheckpointError(
            f"{where}: unknown treatment of the input {sorted(unknown) or steps}; a newer qexport may read it."
        )
    try:
        spec = LinearSpec(make_format(name, options), InputSpec(**steps, quant=quant))
    except (TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{where}: format {name!r} does not take these options: {error}") from error
    reason = refuse_input(spec)
    if reason:
        raise CheckpointError(f"{where}: {reason}.")
    return spec


def refuse_input(spec: LinearSpec) -> str | None:
    """Why the input can't be rounded as the spec says and multiplied by such a weight, or None."""
    quant = spec.input.quant
    if quant is None:
        return None
    if not isinstance(spec.weight, IntegerFormat):
        return f"format {spec.weight.name!r} stores no integers, so an input can't be multiplied by it as integers"
    reason = spec.weight.not_integers or quant.reject(spec.weight)
    return f"input {quant.name!r} with format {spec.weight.name!r}: {reason}" if reason else None


def _quant_from_json(data: Any, where: str) -> InputQuant | None:
    if data is None:
        return None
    options = dict(data) if isinstance(data, Mapping) else {}
    name = options.pop("name", None)
    if name not in plugins.names("inputs"):
        raise CheckpointError(
            f"{where}: unknown input quantizer {str(name)[:80]!r}; this qexport reads "
            f"{', '.join(plugins.names('inputs'))}. The checkpoint may need a newer qexport."
        )
    try:
        return make_input(name, options)
    except (TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{where}: input {name!r} does not take these options: {error}") from error
