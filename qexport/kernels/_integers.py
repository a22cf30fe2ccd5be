"""Products of integers: an input that was rounded to codes times a weight that is stored as integers.

    y[m, n] = sx[m] * sum over groups g of ( sw[n, g] * float( A[m, n, g] ) )  +  what stays a float
    A[m, n, g] = sum over the group's columns k of (cx[m, k] - zx[m]) * (cw[n, k] - zw[n, g])      an exact int32
    with two planes: float(A) = 256 * float(A of the high plane) + float(A of the low plane)

Groups are added in rising order in float32; that, and the conversion of A, is all that is not exact. Groups longer than
`_LONGEST` columns are added up in parts, so that no A can leave int32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexport.formats.base import Integers
from qexport.formats.specs import InputSpec
from qexport.inputs.base import BY_TENSORS, Codes
from qexport.schema import Tensors

_LONGEST = 32768  # 255 * 255 * 32768 < 2^31
_HELD = 1 << 20  # accumulators that are kept before they are scaled: 4 MB

Multiply = Callable[[Tensor, Tensor], Tensor]
"""(int8 [m, g], int8 [n, g]) -> int32 [m, n]."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight cut into its groups, each contiguous.

    Attributes:
        parts: int8 [n, g] each.
        first: column at which each part starts.
        group: group that each part belongs to.
        scales: float32 [groups, n].
        zeros: int32 [groups, n], or None.
        sums: int32 [n] each, of the codes of a part.
    """

    parts: tuple[Tensor, ...]
    first: tuple[int, ...]
    group: tuple[int, ...]
    scales: Tensor
    zeros: Tensor | None
    sums: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows n and columns k."""
        return self.scales.shape[1], self.first[-1] + self.parts[-1].shape[1]

    @property
    def one_a_group(self) -> bool:
        """Whether every group is one part, and none has a zero."""
        return self.zeros is None and len(self.parts) == self.scales.shape[0]


def prepare(w: Integers) -> Prepared:
    """Done once, at load: a byte a weight."""
    k = w.codes.shape[1]
    size = k if w.group_size == -1 else w.group_size
    cuts = [(g, j) for g, start in enumerate(range(0, k, size)) for j in range(start, min(start + size, k), _LONGEST)]
    stops = [*(j for _, j in cuts[1:]), k]
    parts = tuple(w.codes[:, j:stop].contiguous() for (_, j), stop in zip(cuts, stops, strict=True))
    sums = tuple(part.sum(1, dtype=torch.int32) for part in parts)
    scales, zeros = (None if t is None else t.T.contiguous() for t in (w.scales, w.zeros))
    assert scales is not None
    return Prepared(parts, tuple(j for _, j in cuts), tuple(g for g, _ in cuts), scales, zeros, sums)


def accumulators(x: Codes, w: Prepared, multiply: Multiply) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Group and A of each part, int32 [m, n], of the low and of the high plane."""
    m = x.scales.shape[0]
    for part, j, g, total in zip(w.parts, w.first, w.group, w.sums, strict=True):
        codes = x.planes[:, j : j + part.shape[1]].contiguous()
        a = multiply(codes, part)
        if x.zeros is not None:
            a.sub_(x.zeros * total)
        if w.zeros is not None:
            own = codes.sum(1, keepdim=True, dtype=torch.int32)
            a.sub_((own if x.zeros is None else own - x.zeros * part.shape[1]) * w.zeros[g])
        yield g, a[:m], a[m:] if x.planes.shape[0] > m else None


def product(codes: Codes, x: Tensor, w: Prepared, multiply: Multiply) -> Tensor:
    """Input times the transposed weight, as the module's text says.

    Args:
        codes: of x.
        x: float32 [m, k], for what stays a float.
        w: the weight.
        multiply: of integers, exact.

    Returns:
        float32 [m, n].
    """
    fast = loops() if multiply is by_int8 and codes.zeros is None and w.one_a_group else None
    y = _added(codes, w, multiply) if fast is None else _rescaled(codes, w, fast.rescaled)
    return y if codes.columns is None else y.addmm_(x[:, codes.columns], columns(w, codes.columns).T)


def _added(codes: Codes, w: Prepared, multiply: Multiply) -> Tensor:
    """Groups scaled and added one after the other, times the rows' scales."""
    y: Tensor | None = None
    for g, low, high in accumulators(codes, w, multiply):
        part = low.to(torch.float32)
        if high is not None:
            part.add_(high, alpha=256)
        y = part.mul_(w.scales[g]) if y is None else y.add_(part.mul_(w.scales[g]))
    assert y is not None
    return y.mul_(codes.scales)


def _rescaled(codes: Codes, w: Prepared, rescale: Callable[..., None]) -> Tensor:
    """The same in one pass over the accumulators of some groups, as many as a cache holds."""
    (groups, n), (rows, k), m = w.scales.shape, codes.planes.shape, codes.scales.shape[0]
    y = torch.empty(m, n)
    if groups == 1 and k > 1:
        rescale(torch._int_mm(codes.planes, w.parts[0].T).unsqueeze(0), w.scales, codes.scales, y, more=False)
        return y
    step = min(max(_HELD // (rows * n), 1), groups)
    parts = torch.empty(step, rows, n, dtype=torch.int32)
    for first in range(0, groups, step):
        some = range(first, min(first + step, groups))
        for g, out in zip(some, parts, strict=False):
            part, j = w.parts[g], w.first[g]
            own = codes.planes[:, j : j + part.shape[1]].contiguous()
            if part.shape[1] == 1:
                out.copy_(exact(own, part))
            else:
                torch._int_mm(own, part.T, out=out)
        last = codes.scales if some.stop == groups else None
        rescale(parts[: len(some)], w.scales[some.start : some.stop], last, y, more=first > 0)
    return y


def linear(steps: InputSpec, tensors: Tensors, w: Any, multiply: Multiply, x: Tensor) -> Tensor:
    """Rows x [m, k] treated as `steps` say and multiplied by the transposed weight w of `laid_out`; float32 [m, n]."""
    if not x.shape[0]:
        return x.new_empty(0, w.shape[0], dtype=torch.float32)
    assert steps.quant is not None
    rows = steps.prepared(x, tensors)
    fast = loops() if x.device.type == "cpu" else None
    codes = steps.quant.encode(rows, tensors, BY_TENSORS if fast is None else fast.BY_LOOPS)
    return product(codes, rows, w, multiply) if isinstance(w, Prepared) else tiles().product(codes, rows, w)


def laid_out(w: Integers, tensors: Tensors, multiply: Multiply) -> Any:
    """A weight as `linear` multiplies by it: in tiles where bytes are multiplied and that is faster, or `Prepared`."""
    fast = tiles() if multiply is by_int8 and w.codes.device.type == "cpu" else None
    fixed = tensors.get("input_quant_columns")
    found = None if fast is None else fast.prepare(w, None if fixed is None else fixed.long())
    return prepare(w) if found is None else found


@cache
def loops() -> Any:
    """The module of compiled loops, or None where numba is not installed."""
    try:
        from qexport.kernels import _loops
    except ImportError:
        return None
    return _loops


@cache
def tiles() -> Any:
    """The module of products by tiles, or None where numba or the processor lacks what it needs."""
    try:
        from qexport.kernels import _tiles
    except ImportError:
        return None
    return _tiles if _tiles.available() else None


def columns(w: Prepared, wanted: Tensor) -> Tensor:
    """Some columns of the weight, decoded, float32 [n, c]."""
    out = torch.empty(w.scales.shape[1], wanted.numel(), device=w.scales.device)
    if len(w.parts) == 1:
        values = w.parts[0][:, wanted].to(torch.float32)
        return (values if w.zeros is None else values.sub_(w.zeros[0, :, None])).mul_(w.scales[0, :, None])
    for part, j, g in zip(w.parts, w.first, w.group, strict=True):
        inside = ((wanted >= j) & (wanted < j + part.shape[1])).nonzero().flatten()
        if inside.numel():
            values = part[:, wanted[inside] - j].to(torch.float32)
            values = values if w.zeros is None else values.sub_(w.zeros[g, :, None])
            out[:, inside] = values.mul_(w.scales[g, :, None])
    return out


def exact(a: Tensor, b: Tensor) -> Tensor:
    """int8 [m, g] times int8 [n, g] transposed by way of float64, which holds every sum exactly; int32 [m, n]."""
    return (a.to(torch.float64) @ b.to(torch.float64).T).to(torch.int32)


def by_int8(a: Tensor, b: Tensor) -> Tensor:
    """int8 [m, g] times int8 [n, g] transposed by the processor's products of bytes; int32 [m, n]."""
    # Of one column torch takes the strides for those of another shape, and reads past the end (torch 2.13).
    return exact(a, b) if a.shape[1] == 1 else torch._int_mm(a, b.T)


@cache
def obstacle() -> str | None:
    """Why `by_int8` can't be used on this processor, or None: some add pairs of products in 16 bits, which overflow."""
    extremes = torch.tensor([[127, 127, -128, -128], [-128, 127, -128, 127]], dtype=torch.int8)
    a, b = extremes.repeat(9, 33)[:17], extremes.repeat(8, 33)
    try:
        good = torch.equal(by_int8(a, b), exact(a, b))
    except RuntimeError as error:
        return f"this torch has no product of int8 matrices here ({str(error).splitlines()[0]})"
    return None if good else "this processor's product of int8 matrices is not exact"
