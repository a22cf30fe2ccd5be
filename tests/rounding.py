"""Quantizers of inputs as the tests use them, and the rule of each stated slowly, number by number."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from qexport.formats.specs import InputSpec
from qexport.inputs.base import Codes, InputQuant, make_input

QUANTS: dict[str, InputQuant] = {
    "token": make_input("token", {}),
    "token 4": make_input("token", {"bits": 4}),
    "token with zero": make_input("token", {"symmetric": False}),
    "token with zero 5": make_input("token", {"bits": 5, "symmetric": False}),
    "tensor": make_input("tensor", {}),
    "tensor 6": make_input("tensor", {"bits": 6}),
    "tensor with zero": make_input("tensor", {"symmetric": False}),
    "tensor with zero 4": make_input("tensor", {"bits": 4, "symmetric": False}),
    "sdr": make_input("sdr", {}),
    "sdr 4": make_input("sdr", {"bits": 4}),
    "sdr 2 by token": make_input("sdr", {"bits": 2, "group_size": 8, "static": False}),
    "sdr 8 by token": make_input("sdr", {"group_size": 24, "static": False}),
    "outliers": make_input("outliers", {"threshold": 2.0}),
    "outliers 5, static": make_input("outliers", {"threshold": 2.5, "bits": 5, "static": True}),
}
F32 = np.float32


def sample(m: int, k: int, seed: int = 0) -> Tensor:
    """Rows [m, k] with a few large features."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, ::13] *= 4
    return x


def stored_for(quant: InputQuant, x: Tensor) -> dict[str, Tensor]:
    """Stored tensors after a calibration that saw three quarters of the range, so that some numbers are clipped."""
    low, high = 0.75 * x.amin(0), 0.75 * x.amax(0)
    return InputSpec(quant=quant).pack(quant.calibrate(low, high))


def whole(codes: Codes) -> list[list[int]]:
    """256 high + codes - zeros."""
    out = codes.codes.to(torch.int64)
    if codes.high is not None:
        out = out + 256 * codes.high.to(torch.int64)
    return (out if codes.zeros is None else out - codes.zeros).tolist()


def slowly(quant: InputQuant, x: Tensor, stored: Mapping[str, Tensor]) -> tuple[list[list[int]], list[float]]:
    """Integers and scale of each row, by the papers' rules; 0 for features that stay floats."""
    rows = [[F32(v) for v in row] for row in x.tolist()]
    scale = stored.get("input_quant_scale")
    given = None if scale is None else F32(scale.item())
    if quant.name == "sdr":
        found = [_sdr(row, quant.bits, quant.group_size, given) for row in rows]  # type: ignore[attr-defined]
    elif getattr(quant, "symmetric", True):
        stay = _floats(quant, rows, stored)
        found = [_symmetric([F32(0) if j in stay else v for j, v in enumerate(r)], quant.bits, given) for r in rows]  # type: ignore[attr-defined]
    else:
        zero = stored.get("input_quant_zero")
        found = [_with_zero(row, quant.bits, given, None if zero is None else int(zero)) for row in rows]  # type: ignore[attr-defined]
    return [codes for codes, _ in found], [float(s) for _, s in found]


def _floats(quant: InputQuant, rows: Sequence[Sequence[F32]], stored: Mapping[str, Tensor]) -> set[int]:
    if quant.name != "outliers":
        return set()
    if quant.static:  # type: ignore[attr-defined]
        return set(stored["input_quant_columns"].tolist())
    return {j for row in rows for j, v in enumerate(row) if abs(v) >= quant.threshold}  # type: ignore[attr-defined]


def _positive(scale: F32) -> F32:
    return scale if scale > 0 else F32(1)


def _near(x: F32) -> int:
    return int(np.rint(x))  # half to even


def _symmetric(row: Sequence[F32], bits: int, given: F32 | None) -> tuple[list[int], F32]:
    top = 2 ** (bits - 1) - 1
    scale = _positive(max(abs(v) for v in row) / F32(top)) if given is None else given
    return [min(max(_near(v / scale), -top), top) for v in row], scale


def _with_zero(row: Sequence[F32], bits: int, given: F32 | None, zero: int | None) -> tuple[list[int], F32]:
    low, high = min(min(row), F32(0)), max(max(row), F32(0))
    scale = _positive((high - low) / F32(2**bits - 1)) if given is None else given
    if zero is None:
        zero = _near(-low / scale) - 2 ** (bits - 1)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [min(max(_near(v / scale) + zero, least), most) - zero for v in row], scale


def _sdr(row: Sequence[F32], bits: int, group: int, given: F32 | None) -> tuple[list[int], F32]:
    scale = _positive(max(abs(v) for v in row) / F32(32767)) if given is None else given
    base = [min(max(_near(v / scale), -32767), 32767) for v in row]
    out = []
    for j in range(0, len(base), group):
        own = base[j : j + group]
        flag = max(max(abs(c) for c in own).bit_length() - (bits - 1), 0)
        top = 2 ** (bits - 1)
        out += [min(max(round(Fraction(c, 2**flag)), -top), top - 1) << flag for c in own]
    return out, scale
