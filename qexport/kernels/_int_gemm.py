"""Triton kernels of linears whose input is rounded to integers: `_integers.product`, with the same accumulators.

    _encode, _sums   see `_int_encode`
    int_product      int8 x int8 -> int32 over a group, corrected for zeros, then float32: times the group's scale,
                     groups added in rising order; times the row's scale; plus what stays a float

k is never split between programs, so sums of floats have the reference's order, too; where few rows meet a small
matrix, narrow tiles and deep loads keep a GPU busy instead. Rows over 32,768 columns are added up in parts, as there.

Weights (`repack`):
    codes    int8 [n, bytes]: a byte a code, zeros up to whole tiles; or, for uniform codes of up to 4 bits, two a byte:
             of each 2 S columns the first S lie in the low nibbles and the others in the high ones, signed. S is half a
             tile, or a whole group where a group is an odd number of 32s (see `Plan.pair`)
             Other widths thus take the memory of 4 or 8 bits, and codes of `sdr`, shifted by their flags, that of 8
    scales   [parts, n], in the stored dtype
    zeros    int8 [parts, n]; empty: none
    terms    int16 or int32 [parts, n], sums of code - zero over a part, what an input's zero is multiplied by; or empty
  and for a static list of features that stay floats
    mask     int8 [k], 1 for their stored columns
    source   int64 [c], where they come from
    columns  float32 [c, n], their decoded weights

What an H100 made of it is in docs/log.md; AMD's GPUs never ran it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from qexport.errors import BackendError
from qexport.formats.base import IntegerFormat, Integers
from qexport.formats.specs import LinearSpec, refuse_input
from qexport.kernels import _int_encode
from qexport.kernels._gemm import Launch, too_old
from qexport.kernels._int_product import int_product
from qexport.schema import Tensors

_LONGEST = 32768  # columns of an accumulator, as in `_integers`
_WIDEST = 128  # columns of a tile
_UNROLLED = 4  # tiles of a group that are written out one after the other


@dataclass(frozen=True)
class Config:
    """Shape of one launch.

    Attributes:
        bm, bn: rows of x and of w a program covers.
        threads: threads a program.
        stages: tiles that are loaded ahead, counting the one in use.
        unroll: tiles, or groups, that one turn of the loop covers at most.
    """

    bm: int
    bn: int
    threads: int
    stages: int
    unroll: int


@dataclass(frozen=True)
class Plan:
    """How k is cut, which the weight's layout and the launch have in common.

    Attributes:
        size: columns of a part: of a group, or of the whole row, or 32,768 of them; all in whole tiles.
        parts: how many.
        tile: columns that are loaded at once.
        nibbles: two codes lie in a byte.
        pair: the two are of neighbouring groups, because half a tile of 64 columns would not lie within one.
        width: KX, columns with those that fill up.
    """

    size: int
    parts: int
    tile: int
    nibbles: bool
    pair: bool
    width: int

    @classmethod
    def of(cls, fmt: Any, k: int) -> "Plan":
        """The one for a format and k."""
        nibbles, size = fmt.integer_bits <= 4, fmt.integer_group
        if size == -1:
            width = triton.cdiv(k, _WIDEST) * _WIDEST
            size = min(width, _LONGEST)
            return cls(size, triton.cdiv(width, size), _WIDEST, nibbles, False, width)
        tile = min(size & -size, _WIDEST)
        parts = triton.cdiv(k, size)
        pair = nibbles and tile < 64
        if pair:
            tile, parts = 64, parts + parts % 2
        # Short groups are never cut off, so that each takes equally many tiles.
        short = pair or size <= tile * _UNROLLED
        width = parts * size if short else triton.cdiv(k, tile) * tile
        return cls(size, parts, tile, nibbles, pair, width)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the weight."""
        return self.width // 2 if self.nibbles else self.width

    @property
    def steps(self) -> int:
        """Tiles of a part, or of two at once where they are paired."""
        return self.size // (32 if self.pair else self.tile)

    @property
    def long(self) -> bool:
        """Whether a part's tiles are a loop of their own."""
        return self.steps > _UNROLLED

    def unroll(self, most: int) -> int:
        """Turns of the loop that are written out: a power of two that leaves none over, of `most` tiles together."""
        turns = (self.steps, self.width // self.tile) if self.long else (self.parts // (1 + self.pair),)
        most = most // (1 + self.pair) // (1 if self.long else self.steps)
        return next((u for u in (8, 4, 2) if u <= most and all(t % u == 0 for t in turns)), 1)


def supports(spec: LinearSpec, n: int, k: int) -> str | None:
    """Why the kernels can't multiply as a spec says, or None."""
    quant, fmt = spec.input.quant, spec.weight
    if quant is None:
        return "inputs that stay floats"
    reason = refuse_input(spec) or too_old() or _int_encode.supports(quant)
    if reason:
        return reason
    assert isinstance(fmt, IntegerFormat)
    group = fmt.integer_group
    if group != -1 and (group % 32 or group > _LONGEST):
        return f"groups of {group}; multiples of 32 up to {_LONGEST}, or a whole row, are multiplied"
    return None


def waits(quant: Any) -> bool:
    """Whether features are listed on the host at each call, which waits for the device."""
    return quant.name == "outliers" and not quant.static


def choose(m: int, n: int, k: int, *, planes: int = 1, zeros: bool = False) -> Config:
    """The launch for codes [planes, m, k] and a weight [n, k]; `zeros`: of either, which take registers."""
    if m <= 16:
        # One warp for each 16 rows of w: two would both unpack the same ones.
        return Config(16, 32, 64, 3, 4) if n >= 4096 else Config(16, 16, 32, 3, 4)
    if m <= 32:
        return Config(32, 32, 128, 3, 2)
    if m <= 64 or planes > 1:
        return Config(64, 64, 128, 2, 1)
    return Config(64, 128, 256, 2, 1) if zeros else Config(128, 128, 256, 2, 1)


def repack(spec: LinearSpec, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
    """The weight in the layout that the module's text shows; done once, at load."""
    assert isinstance(spec.weight, IntegerFormat)
    w, plan = spec.weight.integers(packed, n, k), Plan.of(spec.weight, k)
    wide = torch.nn.functional.pad(w.codes, (0, plan.width - k))
    group = torch.arange(plan.parts, device=wide.device) if w.group_size != -1 else wide.new_zeros(plan.parts).long()
    group = group.clamp_(max=w.scales.shape[1] - 1)  # a group that only fills up has codes of 0
    stored = packed["scales"].dtype if "scales" in packed else torch.float32
    none = wide.new_empty(0)
    zeros = none if w.zeros is None else w.zeros[:, group].T.to(torch.int8).contiguous()
    out = (_nibbles(wide, plan) if plan.nibbles else wide, w.scales[:, group].T.to(stored).contiguous(), zeros)
    terms = _terms(w, wide, plan, group, k) if _int_encode.has_zero(spec.input.quant) else none
    if not getattr(spec.input.quant, "static", False) or "input_quant_columns" not in packed:
        return (*out, terms)
    stays = packed["input_quant_columns"].long()
    mask = torch.zeros(k, dtype=torch.int8, device=stays.device).index_fill_(0, stays, 1)
    source = packed["input_perm"].long()[stays] if spec.input.permute else stays
    return (*out, terms, mask, source, _columns(out, plan, stays))


def _terms(w: Integers, wide: Tensor, plan: Plan, group: Tensor, k: int) -> Tensor:
    """Sums of code - zero over each part, [parts, n]."""
    out = []
    for p, g in enumerate(group.tolist()):
        first, stop = p * plan.size, min((p + 1) * plan.size, k)
        total = wide[:, first : max(first, stop)].sum(1, dtype=torch.int32)
        out.append(total if w.zeros is None else total - w.zeros[:, g] * max(stop - first, 0))
    largest = 15 if plan.nibbles else 255
    return torch.stack(out).to(torch.int16 if largest * plan.size < 32768 else torch.int32)


def _nibbles(wide: Tensor, plan: Plan) -> Tensor:
    """Two signed codes a byte, int8 [n, width / 2]."""
    span = plan.size if plan.pair else plan.tile // 2
    low, high = wide.view(wide.shape[0], -1, 2, span).unbind(2)
    return ((low & 15) | (high << 4)).reshape(wide.shape[0], -1).contiguous()


def _columns(weights: Sequence[Tensor], plan: Plan, wanted: Tensor) -> Tensor:
    """Some stored columns of the weight, decoded as `_integers.columns` does; float32 [c, n]."""
    codes, scales, zeros = weights[:3]
    part = torch.div(wanted, plan.size, rounding_mode="floor")
    if plan.nibbles:
        span = plan.size if plan.pair else plan.tile // 2
        half = torch.div(wanted, span, rounding_mode="floor")
        byte = codes[:, (half >> 1) * span + wanted % span]
        values = torch.where(half % 2 == 1, byte, byte << 4) >> 4
    else:
        values = codes[:, wanted]
    out = values.T.to(torch.float32)
    out = out.sub_(zeros[part]) if zeros.numel() else out
    return out.mul_(scales[part].to(torch.float32))


def linear(
    spec: LinearSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Tensors,
    n: int,
    k: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """X, rounded, times the transposed weight.

    Dynamic `outliers` are listed on the host once a call, which waits for the device.

    Args:
        spec: one that `supports` has no objection to.
        x: float16, bfloat16 or float32 [..., k], on a GPU, or on the CPU under Triton's interpreter.
        weights: what `repack` returned, on the same device.
        packed: stored tensors of the input's treatment, on the same device.
        n: out features.
        k: in features.
        config: another launch than `choose` would take, for tests and benchmarks.

    Returns:
        [..., n] in x's dtype, without bias.

    Raises:
        BackendError: x is on a device that Triton can't launch on.
    """
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise BackendError(
            f"triton kernels run on a GPU, found tensors on {x.device}: move the model, or choose backend 'reference' "
            "(TRITON_INTERPRET=1, set before Python starts, runs kernels on the CPU for tests)."
        )
    flat = x.reshape(-1, k)
    y = torch.empty((flat.shape[0], n), dtype=x.dtype, device=x.device)
    if y.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
            for launch in launches(spec, flat, weights, packed, y, config=config):
                launch.run()
    return y.reshape(*x.shape[:-1], n)


def launches(
    spec: LinearSpec, x: Tensor, weights: Sequence[Tensor], packed: Tensors, y: Tensor, *, config: Config | None = None
) -> list[Launch]:
    """The launches that fill y [m, n] from x [m, k], in order.

    Meta tensors will do, but for dynamic `outliers` and rotations: nothing else runs here.
    """
    quant: Any = spec.input.quant
    step, plan = spec.input, Plan.of(spec.weight, x.shape[1])
    (m, n), k = y.shape, x.shape[1]
    codes, scales, zeros, terms = weights[:4]
    planes = _int_encode.planes_of(quant)
    c = config or choose(m, n, k, planes=planes, zeros=zeros.numel() + terms.numel() > 0)
    permute, scale, dynamic = step.permute, step.scale and not step.hadamard, waits(quant)
    mask = extra = None
    if dynamic:
        x, permute, scale = step.prepared(x, packed).contiguous(), False, False
        mask = (x.abs().amax(0) >= quant.threshold).to(torch.int8)
        found = mask.nonzero().flatten()
        extra = x[:, found] @ _columns(weights, plan, found) if found.numel() else None
    else:
        x = (step.rotated(x, packed) if step.hadamard else x).contiguous()
    if len(weights) > 4:
        mask, source, columns = weights[4:]
        stays = x[:, source].to(torch.float32)
        extra = (stays * packed["input_scale"][source] if scale else stays) @ columns if source.numel() else None
    out, inputs, factors, shifts, sums = _int_encode.launches(
        quant, x, packed, mask, plan.width, permute=permute, scale=scale, groups=plan.parts if zeros.numel() else 0,
        size=plan.size,
    )  # fmt: skip
    args = (
        inputs, factors, shifts, sums, codes, scales, zeros if zeros.numel() else None,
        None if shifts is None else terms, extra, y, m, n,
    )  # fmt: skip
    constants = {
        "KX": plan.width, "KW": plan.row_bytes, "SIZE": plan.size, "PARTS": plan.parts, "STEPS": plan.steps,
        "TILE": plan.tile, "NIBBLES": plan.nibbles, "PAIR": plan.pair, "LONG": plan.long,
        "TWO": planes == 2, "UNROLL": plan.unroll(c.unroll // planes), "STAGES": c.stages, "BM": c.bm, "BN": c.bn,
    }  # fmt: skip
    grid = (triton.cdiv(n, c.bn), triton.cdiv(m, c.bm))
    out.append(Launch(int_product, grid, args, constants, max(1, c.threads // (64 if torch.version.hip else 32))))
    return out
