"""The contract of an input quantizer: what a linear's input is rounded to while the model runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qexport import plugins
from qexport.errors import LayoutError, UsageError
from qexport.schema import Extents, Layout, Tensors

DECODE = ("integer", "float")


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows x as integers: x ~ scales * (256 * high + codes - zeros), but for columns that stay as they are.

    Attributes:
        planes: int8 [m, k], the codes, 0 in `columns`; or [2 m, k], below them the upper eight of 16 bits.
        scales: float32 [m, 1], positive.
        zeros: int32 [m, 1], what 0 is coded as; None: 0.
        columns: int64 [c], in rising order: features that are multiplied as floats; None: there are none.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    columns: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """The lower plane, int8 [m, k]."""
        return self.planes[: self.scales.shape[0]]

    @property
    def high(self) -> Tensor | None:
        """The upper plane, int8 [m, k]; None: all 0."""
        m = self.scales.shape[0]
        return self.planes[m:] if self.planes.shape[0] > m else None

    def values(self, x: Tensor) -> Tensor:
        """What the rows x, float32 [m, k], were rounded to; float32 [m, k]."""
        whole = self.codes.to(torch.float32)
        if self.high is not None:
            whole.add_(self.high, alpha=256)
        if self.zeros is not None:
            whole.sub_(self.zeros)
        whole.mul_(self.scales)
        if self.columns is not None:
            whole[:, self.columns] = x[:, self.columns]
        return whole


class Rounding:
    """How rows become codes, by tensor operations; a kernel may do the same in fewer passes, to the bit."""

    def rounded(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Symmetric codes, int8 [m, k], and a scale for each row, float32 [m, 1], for x float32 [m, k]."""
        scales = positive_scale(x.abs().amax(1, keepdim=True), 2 ** (bits - 1) - 1)
        return symmetric_codes(x, scales, bits), scales

    def razored(self, x: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
        """Low planes, then high planes, int8 [2 m, k], of x float32 [m, k] as 16-bit integers razored to `bits`.

        Scales are float32 [m, 1]. The last group is shorter where `group_size` does not divide k.
        """
        m, k = x.shape
        whole, size = (x / scales).round_().clamp_(-LARGEST, LARGEST), min(group_size, k)
        grouped = torch.nn.functional.pad(whole, (0, -k % size)).view(m, -1, size)
        length = torch.frexp(grouped.abs().amax(2, keepdim=True)).exponent
        step = torch.exp2((length - (bits - 1)).clamp_(min=0).to(torch.float32))
        top = 2 ** (bits - 1)
        cut = (grouped / step).round_().clamp_(-top, top - 1).mul_(step).view(m, -1)[:, :k].to(torch.int32)
        high = (cut + 128) >> 8
        return torch.cat((cut - (high << 8), high)).to(torch.int8)


BY_TENSORS = Rounding()
LARGEST = 2**15 - 1  # of the integers that are razored


class InputQuant(Protocol):
    """A frozen dataclass whose fields are the options of a quantizer.

    `decode_input` is one of them for all: `"integer"`, or `"float"` to leave the input alone while a model generates
    token by token, so that only its weights are quantized there.

    Stored tensors are called `input_quant_*`; *values* are what `calibrate` finds, by the same names without the start.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def decode_input(self) -> str:
        """See above."""
        ...

    @property
    def text(self) -> str:
        """What it is in a few words: "int8, a scale for each token"."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether it wants to know the range of each feature."""
        ...

    def reject(self, fmt: Any) -> str | None:
        """Why it can't be used with a format of weights, or None."""
        ...

    def layout(self, k: int) -> Layout:
        """Stored tensors for k input features."""
        ...

    def expected_extents(self, k: int) -> Extents:
        """Likely values of data-dependent extents."""
        ...

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Values from the lowest and highest number that each feature reaches, float32 [k] each."""
        ...

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Refuse contents that no calibration gives; raises `LayoutError`."""
        ...

    def encode(self, x: Tensor, tensors: Tensors, by: Rounding = BY_TENSORS) -> Codes:
        """Rows x, float32 [m, k], as integers; the scale of a row with a NaN is NaN, so that its result is."""
        ...


class Dynamic:
    """What a quantizer that stores nothing has in common with others."""

    calibrated: ClassVar[bool] = False

    def reject(self, fmt: Any) -> str | None:
        """Any format whose weights are integers will do."""
        return None

    def layout(self, k: int) -> Layout:
        """Nothing is stored."""
        return {}

    def expected_extents(self, k: int) -> Extents:
        """There are none."""
        return {}

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Nothing is stored."""
        return {}

    def check_content(self, tensors: Tensors, k: int, where: str) -> None:
        """Nothing is stored."""


def positive_scale(largest: Tensor, steps: float) -> Tensor:
    """`largest` / `steps`, and 1 where that is 0: rows of zeros have a scale too. NaN stays NaN."""
    scale = largest / steps
    return torch.where(scale <= 0, torch.ones_like(scale), scale)


def calibrated_scale(x: Tensor, tensors: Tensors) -> Tensor:
    """The stored scale for each row of x, float32 [m, 1]; NaN for rows with a NaN, which no code could tell."""
    scale = tensors["input_quant_scale"].reshape(1, 1).expand(x.shape[0], 1)
    return scale.masked_fill(x.amax(1, keepdim=True).isnan(), torch.nan)


def symmetric_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """round(x / scale), half to even, within +-(2^(bits - 1) - 1); int8."""
    top = 2 ** (bits - 1) - 1
    return (x / scale).round_().clamp_(-top, top).to(torch.int8)


def spread(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale, and the code of 0 less 2^(bits - 1), int32, of a range that is widened to take in 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = positive_scale(high - low, 2**bits - 1)
    zero = (-low / scale).round_().nan_to_num_(0).clamp_(0, 2**bits - 1)  # infinite ends have none
    return scale, zero.to(torch.int32) - 2 ** (bits - 1)


def spread_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """round(x / scale) + zero, half to even, within -2^(bits - 1) .. 2^(bits - 1) - 1; int8."""
    top = 2 ** (bits - 1)
    return (x / scale).round_().add_(zero).clamp_(-top, top - 1).to(torch.int8)


def check_scale(tensors: Tensors, where: str) -> None:
    """Refuse a stored scale that is not finite and positive; raises `LayoutError`."""
    scale = tensors["input_quant_scale"]
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise LayoutError(f"{where}.input_quant_scale: expected a finite scale above 0, found {scale.tolist()}.")


def require(ok: bool, name: str, option: str, value: object, expected: str) -> None:
    """Raise `UsageError` unless an option is as expected."""
    if not ok:
        raise UsageError(f"input {name!r}: {option} must be {expected}, got {value!r}.")


def check_common(quant: Any, least: int = 4) -> None:
    """Raise `UsageError` for options that most quantizers have and that this one has wrong."""
    require(quant.decode_input in DECODE, quant.name, "decode_input", quant.decode_input, " or ".join(DECODE))
    if hasattr(quant, "bits"):
        ok = type(quant.bits) is int and least <= quant.bits <= 8
        require(ok, quant.name, "bits", quant.bits, f"a whole number from {least} to 8")
    if hasattr(quant, "symmetric"):
        require(type(quant.symmetric) is bool, quant.name, "symmetric", quant.symmetric, "true or false")


def make_input(name: str, options: Mapping[str, Any]) -> InputQuant:
    """A quantizer from its name and options; raises `UsageError` that lists what exists."""
    cls = plugins.get("inputs", name)
    known = {f.name for f in fields(cls)}
    for key in options:
        if key not in known:
            raise UsageError(f"input {name!r} has no option {key!r}; it has {', '.join(sorted(known))}.")
    quant: InputQuant = cls(**options)
    return quant


def described(quant: InputQuant | None) -> str:
    """What becomes of an input, in words; "float" where nothing does."""
    if quant is None:
        return "float"
    return quant.text + ("; floats while tokens are generated one by one" if quant.decode_input == "float" else "")


def as_json(quant: InputQuant) -> dict[str, Any]:
    """Name and options as plain JSON values."""
    return {"name": quant.name, **asdict(quant)}  # type: ignore[call-overload]
