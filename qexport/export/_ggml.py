"""Blocks of ggml, the tensor library of llama.cpp: 32 weights of a row with their own scale."""

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from qexport.formats.uniform import Uniform
from qexport.schema import Tensors

BLOCK = 32
"""Weights of a block."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""A tensor as it is stored: its last axis in bytes."""

_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def kind(fmt: Uniform) -> str | None:
    """The block type that has the levels of a format; None if there is none.

    Q4_0 is (code - 8) * d, Q4_1 is code * d + m, Q8_0 is code * d with a signed code.
    """
    return _KINDS.get((fmt.bits, fmt.symmetric)) if fmt.group_size == BLOCK else None


def offsets(fields: Tensors) -> Tensor:
    """What Q4_1 adds in each group, -zero * scale, float32 [n, groups]: 4 bits times 11 are exact."""
    return 0 - fields["zeros"] * fields["scales"]


def half(t: Tensor) -> bool:
    """Whether a float tensor survives float16 unchanged."""
    return torch.equal(t.to(torch.float16).to(torch.float32), t.to(torch.float32))


def blocks(name: str, fields: Tensors) -> Bytes:
    """Blocks of a weight, row by row.

    A block is d as float16, for Q4_1 m as float16, and the codes: those of Q8_0 are int8; those of the others are two
    to a byte, the first 16 weights in the low halves and the last 16 in the high ones.

    Args:
        name: `"Q4_0"`, `"Q4_1"` or `"Q8_0"`.
        fields: of `Uniform` with groups of 32: `codes` uint8 [n, k], `scales` and perhaps `zeros` float32 [n, k / 32].

    Returns:
        uint8 [n, k / 32 * bytes of a block].
    """
    n, k = fields["codes"].shape
    codes = fields["codes"].view(n, k // BLOCK, BLOCK)
    parts = [_bytes(fields["scales"].to(torch.float16).unsqueeze(-1))]
    if name == "Q4_1":
        parts.append(_bytes(offsets(fields).to(torch.float16).unsqueeze(-1)))
    # Flipping the highest bit turns code into code - 128, as int8.
    parts.append(codes ^ 128 if name == "Q8_0" else codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
    return torch.cat(parts, dim=-1).view(n, -1).numpy()


def rounded(name: str, w: Tensor) -> Bytes:
    """A weight float32 [n, k] rounded to `"F16"`, or to `"Q8_0"` as ggml does, uint8 [n, bytes of a row]."""
    if name == "F16":
        return _bytes(w.to(torch.float16)).numpy()
    found: Bytes = quantize(w.contiguous().numpy(), GGMLQuantizationType[name])
    return found


def dense(t: Tensor) -> tuple[str, Bytes]:
    """Type and bytes of a tensor that is not quantized, without rounding.

    Vectors are float32, as llama.cpp wants them. Others keep 16 bits if they have them, and take float16 if it holds
    every value.
    """
    if t.ndim == 1:
        t = t.to(torch.float32)
    elif t.dtype not in (torch.float16, torch.bfloat16):
        t = t.to(torch.float16) if half(t) else t.to(torch.float32)
    return _DENSE[t.dtype], _bytes(t).numpy()


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
