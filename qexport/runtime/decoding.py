"""A whole weight decoded, on a CPU by loops where the format has some; the same bits as the format's own decoding."""

import mmap
from math import prod
from typing import Any

import torch
from torch import Tensor

from qexport.formats.specs import LinearSpec
from qexport.runtime.dispatch import decoder_of
from qexport.schema import Tensors

_AT_ONCE = 1 << 17  # weights on their way to another dtype or order: a second-level cache's worth
_LARGE = 1 << 25  # bytes from which on glibc takes memory from the system each time, and gives it back


def decoded(
    spec: LinearSpec, packed: Tensors, n: int, k: int, dtype: torch.dtype, *, transposed: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The weight that `spec.decoded` gives, in a dtype, contiguous.

    Args:
        spec: what is stored.
        packed: the stored tensors.
        n: out features.
        k: in features.
        dtype: of the result.
        transposed: [k, n] instead of [n, k].
        backend: `"reference"` insists on the format's own decoding.
    """
    loops = None if backend == "reference" else _loops_of(spec, packed)
    if loops is None:
        weight = spec.decoded(packed, n, k).to(dtype)
        return (weight.T if transposed else weight).contiguous()
    fill, steps = loops.rows(spec.weight, packed, n, k), spec.input
    out = _room((k, n) if transposed else (n, k), dtype)
    if dtype == torch.float32 and not (transposed or steps.scale or steps.permute):
        fill(0, out)
        return out
    step = min(n, max(_AT_ONCE // k, 1))
    part, rows = torch.empty(step, k, dtype=torch.float32, device="cpu"), out.T if transposed else out
    for first in range(0, n, step):
        some = part[: n - first]
        fill(first, some)
        rows[first : first + step].copy_(steps.undone(some, packed))
    return out


def decoded_rows(spec: LinearSpec, packed: Tensors, n: int, k: int, rows: tuple[int, int]) -> Tensor:
    """`spec.decoded(packed, n, k)[rows[0]:rows[1]]`, of which nothing else is decoded.

    Raises:
        LayoutError: the rows don't start or end at multiples of the format's `shard_multiple`.
    """
    cut = spec.weight.slice(packed, n, k, rows, (0, k))
    return decoded(spec, {**packed, **cut}, rows[1] - rows[0], k, torch.float32)


def _loops_of(spec: LinearSpec, packed: Tensors) -> Any:
    """What decodes a format on a CPU, or None: elsewhere, without numba, and for a compiler that reads operations.

    A rotation takes twenty times the time of decoding, and rounds parts of a weight otherwise than the whole.
    """
    if spec.input.hadamard or torch.compiler.is_compiling():
        return None
    return decoder_of(spec.weight.name) if all(t.device.type == "cpu" for t in packed.values()) else None


def _room(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one in large pages, as a system hands those out ten times as fast."""
    nbytes, advice = prod(shape) * dtype.itemsize, getattr(mmap, "MADV_HUGEPAGE", None)
    if nbytes < _LARGE or advice is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(advice)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
