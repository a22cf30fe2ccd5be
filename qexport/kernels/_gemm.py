"""One Triton skeleton for y = x . decode(w)^T; a format brings its tile functions, its tensors are a tuple.

    _prologue  x [m, k] -> planes [m, 32, KBP], permuted and scaled; for m = 1 also sums of x, see `Decoder`
    _gemv      m = 1: the format contracts x with a tile (`dot`) and touches scales once per group
    _gemm      m >= 2: the format decodes a tile (`begin`, `decode`) for `tl.dot`, w as the first factor
    _decode    many rows: the same functions write w in planes once, for the library's product with those of x
    _finish    adds the parts of k in order (never atomics: the result is deterministic) and the sparse part (`sparse`)

Planes: element k = 32 b + i of x lies at [i, b]. A tile covers blocks b of 32 codes, whose code i meets plane i, so
nothing is shuffled between threads. KB = ceil(k / 32); KBP is KB rounded up to what the launch grid covers, filled with
zeros. Sums and products are float32; for m >= 2 weights are rounded to x's dtype, as the reference path does.
What an H100 and an H200 made of it is in docs/log.md; AMD's GPUs never ran it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.errors import BackendError
from qexport.kernels import _tuning
from qexport.schema import Tensors


@dataclass(frozen=True)
class Decoder:
    """What the skeleton needs to know of one format at one shape.

    Attributes:
        dot: `dot(w, x_ptr, s_ptr, row, n0, kb0, KB, KBP, BKB, EVEN, A)` -> float32 [BN, BKB / reduce], which the
            skeleton sums over axis 1.
        begin: `begin(w, row, n0, kb0, KB, BKB, EVEN, A)` -> state of a tile, anything that `decode` wants loaded once.
        decode: `decode(w, state, row, n0, kb0, i, KB, BKB, A)` -> float32 [BN, BKB], code i of every block of the tile.
        sparse: `sparse(w, x_ptr, row, m, M, E)` -> float32 [BN, BM] to add to y, from x [k, M]; or None.
        scatter: `scatter(w, out_ptr, row, live, at, KBP, E)` adds the same weights to decoded rows that start at `at`,
            int64 [BN], where a row is `live`; or None.
        args: constants for all of them, `A`.
        reduce: neighbouring blocks that `dot` adds up before it applies scales: 1, 2 or 4; 0: all of a tile's.
        sums: sums of x per block (1, 2, 4 ...: each over 32 / sums elements), stored [sums, KBP / reduce]; 0: none.
        bits: planes for `dot` hold x[i] * 2^(exponent - place) for codes of so many bits, see `_stream`, and sums of x
            are times 2^(exponent - 149), as what `dot` returns is; 0 means x itself.
        exponent: see `bits`.
        vector: consecutive rows that one code stands for. If they are several, a tile covers BN / P vectors of them
            from row `n0` on, P the next power of two; rows that fill up the P are computed and not stored.
        cached: places in `w` of small tensors that all programs read: memory is asked once, then a cache answers.
    """

    dot: Any
    begin: Any
    decode: Any
    args: tuple[int, ...]
    sparse: Any = None
    scatter: Any = None
    reduce: int = 1
    sums: int = 0
    bits: int = 0
    exponent: int = 0
    vector: int = 1
    cached: tuple[int, ...] = ()


class Kernel(Protocol):
    """What `qexport/kernels/<format>.py` calls `plugin`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why this kernel can't multiply by an [n, k] matrix in this format; None when it can."""
        ...

    def repack(self, fmt: Any, packed: Tensors, n: int, k: int) -> tuple[Tensor, ...]:
        """Stored tensors in the layout that the kernel reads, on their device; done once, at load."""
        ...

    def decoder(self, fmt: Any, n: int, k: int) -> Decoder:
        """The format's functions and constants."""
        ...


@dataclass(frozen=True)
class Config:
    """Shape of one launch.

    Attributes:
        bm, bn: rows of x and of w a program covers; bm is 1 for the GEMV, 0 where w is decoded whole.
        bkb: blocks of 32 codes a step covers.
        split: parts that k is cut into.
        threads: threads a program; the number of warps follows from the device.
    """

    bm: int
    bn: int
    bkb: int
    split: int
    threads: int

    def steps(self, k: int) -> int:
        """Steps of one program along k."""
        return triton.cdiv(triton.cdiv(blocks(k), self.bkb), self.split)

    def padded(self, k: int) -> int:
        """KBP: blocks that the grid covers."""
        return self.steps(k) * self.split * self.bkb

    def full(self, k: int) -> bool:
        """Whether every part of k has blocks of its own."""
        return self.steps(k) * self.bkb * (self.split - 1) < blocks(k)

    def even(self, k: int) -> bool:
        """Whether the grid covers exactly the blocks that there are, so that no load needs a mask."""
        return self.padded(k) == blocks(k)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data, so that it can be compiled and counted without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int

    def run(self) -> None:
        """Launch it."""
        self.kernel[self.grid](*self.args, **self.constants, num_warps=self.warps, **OPTIONS)


@dataclass(frozen=True)
class Product:
    """The library's product of planes of x [m, K] and decoded rows of w [rows, K], into columns of y."""

    x: Tensor
    w: Tensor
    y: Tensor

    def run(self) -> None:
        """Multiply."""
        torch.mm(self.x, self.w.T, out=self.y)


def blocks(k: int) -> int:
    """Blocks of 32 codes in a row."""
    return triton.cdiv(k, 32)


# One step of `_gemm` loads 32 planes at once, which hides latency by itself; several would not fit shared memory.
OPTIONS: Mapping[str, Any] = MappingProxyType({"num_stages": 1, "enable_fp_fusion": True})
_OLDEST = (3, 7)  # of Triton; 3.4 does not compile these kernels, what lies between was not tried
_ENOUGH = 1024  # small programs (two warps) that fill a large GPU
_WHOLE = 32  # rows of x from which on decoding w once is faster than decoding it for every tile
_DECODED = 1 << 26  # weights that are decoded at a time
_PARTS = 16  # of k at most
_ENOUGH_WIDE = 256  # larger ones; each more part of k costs m n floats of workspace


def too_old(version: str = triton.__version__) -> str | None:
    """Why this Triton can't compile the kernels, or None."""
    found = tuple(int(part) for part in version.split(".")[:2])
    return None if found >= _OLDEST else f"Triton {version} is too old; {_OLDEST[0]}.{_OLDEST[1]} or newer is needed"


def choose(m: int, n: int, k: int, dtype: torch.dtype = torch.float16, vector: int = 1) -> Config:
    """The launch for x [m, k] and w [n, k], `vector` rows a code: 16-byte loads where k allows, enough programs."""
    kb, padded = blocks(k), triton.next_power_of_2(vector)
    if m >= _WHOLE:
        bkb = min(32, max(4, triton.next_power_of_2(kb)))
        return Config(0, 512 // bkb * padded, bkb, 1, 128)
    if m == 1:
        # The widest step that covers at most an eighth more than there is.
        bkb = next((b for b in (32, 16, 8) if triton.cdiv(kb, b) * b * 8 <= kb * 9), 4)
        bm, bn, threads = 1, 512 // bkb, 64
    else:
        bm, bn, bkb, threads = (16 if m <= 16 else 32 if m <= 32 else 64), 64, 16, 128
        if dtype == torch.float32:  # no tensor cores: unrolled FMAs, which spill or take a minute to compile if wide
            bm, bn, threads = 16, 16, 64
    if vector > 1:  # 16 bytes of codes for each of 64 threads, all their rows, and no more sums than registers
        bm, bn, threads = min(bm, 16), max(256 // bkb * padded if m == 1 or dtype != torch.float32 else 16, padded), 64
    programs = triton.cdiv(n, bn // padded * vector) * triton.cdiv(m, bm)
    steps = triton.cdiv(kb, bkb)
    most = min(steps, triton.cdiv(_ENOUGH if m == 1 else _ENOUGH_WIDE, programs), _PARTS)
    split = next(s for s in range(most, 0, -1) if steps % s == 0 or s * 2 <= most)
    return Config(bm, bn, bkb, split, threads)


def candidates(m: int, n: int, k: int, dtype: torch.dtype = torch.float16, vector: int = 1) -> tuple[Config, ...]:
    """Launches worth timing for up to m rows, a power of two up to 64; the first is what `choose` takes.

    The others do as much a thread and differ in one thing: parts of k; for one row twice the rows of w, by twice the
    threads or in steps half as wide; for more rows the way of reading w. None has masks: they take too many registers.
    """
    usual = tiles = choose(m, n, k, dtype, vector)
    found = [usual]
    if m == 1:
        found.append(replace(usual, bn=2 * usual.bn, threads=2 * usual.threads))
        if usual.bkb == 32:  # narrower ones spill on gfx942
            found.append(replace(usual, bn=2 * usual.bn, bkb=16))
    else:
        tiles = choose(min(m, _WHOLE - 1), n, k, dtype, vector)
        found += [tiles, choose(max(m, _WHOLE), n, k, dtype, vector)]
    found += [replace(tiles, split=split) for split in (tiles.split // 2, 2 * tiles.split) if split]
    fits = lambda c: c.split <= _PARTS and c.full(k) and c.even(k)  # noqa: E731
    return tuple(dict.fromkeys([usual, *filter(fits, found)]))


def linear(
    kernel: Kernel,
    fmt: Any,
    x: Tensor,
    weights: Sequence[Tensor],
    n: int,
    k: int,
    *,
    perm: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
    timed: bool = True,
) -> Tensor:
    """X times the transposed weight.

    Args:
        kernel: plugin of the format.
        fmt: the format with its options.
        x: float16, bfloat16 or float32 [..., k], on a GPU, or on the CPU under Triton's interpreter.
        weights: what `kernel.repack` returned, on the same device.
        n: out features.
        k: in features.
        perm: uint16 or int32 [k]; stored column j meets input feature `perm[j]`.
        scale: float32 [k], factor of each input feature, applied before `perm`.
        config: another launch than would be chosen, for tests and benchmarks.
        timed: `candidates` may be timed on a GPU if it isn't known yet which is the fastest; else `choose` decides.

    Returns:
        [..., n] in x's dtype.

    Raises:
        BackendError: x is on a device that Triton can't launch on.
    """
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise BackendError(
            f"triton kernels run on a GPU, found tensors on {x.device}: move the model, or choose backend 'reference' "
            "(TRITON_INTERPRET=1, set before Python starts, runs kernels on the CPU for tests)."
        )
    flat = x.reshape(-1, k)
    m = flat.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not m or not n:
        return y.reshape(*x.shape[:-1], n)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
        d, flat = kernel.decoder(fmt, n, k), flat.contiguous()

        def run(c: Config) -> None:
            for launch in launches(d, c, flat, tuple(weights), y, perm, scale):
                launch.run()

        if config is None and m <= 2 * _WHOLE and _tuning.wanted(x):
            config = _fastest(fmt, d, flat, n, run, timed)
        run(config or choose(m, n, k, x.dtype, d.vector))
    return y.reshape(*x.shape[:-1], n)


def _fastest(fmt: Any, d: Decoder, x: Tensor, n: int, run: Callable[[Config], None], timed: bool) -> Config | None:
    """The fastest launch for x [m, k] and w [n, k] on x's device, if that is known or may be found out."""
    (m, k), dtype = x.shape, x.dtype
    rows = triton.next_power_of_2(m)

    def product() -> tuple[dict[str, Any], tuple[Config, ...]]:
        shape = {"rows": rows, "n": n, "k": k, "dtype": str(dtype)}
        facts = {"format": fmt.name, "options": asdict(fmt), **shape, **_tuning.here(x.device)}
        return facts, candidates(rows, n, k, dtype, d.vector)

    free = lambda: timed and not torch.cuda.is_current_stream_capturing()  # noqa: E731
    return _tuning.tuner().best((fmt, n, k, rows, dtype, x.device), product, run, free)


def launches(
    d: Decoder, c: Config, x: Tensor, w: tuple[Tensor, ...], y: Tensor, perm: Tensor | None, scale: Tensor | None
) -> list[Launch | Product]:
    """The launches that fill y [m, n] from x [m, k], in order. Meta tensors will do: nothing runs here."""
    m, k = x.shape
    n = y.shape[1]
    gemv, padded = c.bm == 1, triton.next_power_of_2(d.vector)
    warps = c.threads // (64 if torch.version.hip else 32)
    # The interpreter multiplies bfloat16 operands wrongly, so there they travel as float32.
    wide = gemv or (c.bm > 0 and x.dtype == torch.bfloat16 and x.device.type == "cpu")
    out, planes, sums, plain = _prepare(d, c, x, perm, scale, torch.float32 if wide else x.dtype)
    direct = c.split == 1 and (d.sparse is None or c.bm == 0)
    common = {
        "KB": blocks(k), "KBP": c.padded(k), "BN": c.bn, "BKB": c.bkb, "EVEN": c.even(k), "VECTOR": d.vector,
        "PADDED": padded, "A": d.args,
    }  # fmt: skip
    tiles = triton.cdiv(n, c.bn // padded * d.vector)
    part = y if direct else x.new_empty((c.split, m, n), dtype=torch.float32)
    if gemv:
        unit = 2.0 ** (149 - d.exponent) if d.bits else 1.0
        constants = {"RED": d.reduce or c.bkb, "DOT": d.dot, "UNIT": unit, "STEPS": c.steps(k), **common}
        out.append(Launch(_gemv, (tiles, c.split), (planes, sums, part, w, n), constants, warps))
    elif c.bm:
        grid = (tiles, triton.cdiv(m, c.bm), c.split)
        constants = {"BM": c.bm, "BEGIN": d.begin, "DECODE": d.decode, "STEPS": c.steps(k), **common}
        out.append(Launch(_gemm, grid, (planes, part, w, m, n), constants, warps))
    else:
        out += _whole(d, c, planes, w, y, common, warps)
    if not direct:
        bm, bn, e = (1, 32, 16) if m == 1 else (16, 16, 4)
        constants = {"SPLIT": c.split, "SPARSE": d.sparse, "BM": bm, "BN": bn, "E": e}
        places = (triton.cdiv(n, bn), triton.cdiv(m, bm))
        out.append(Launch(_finish, places, (part, plain, y, w, m, n), constants, warps))
    return out


def _whole(
    d: Decoder, c: Config, planes: Tensor, w: tuple[Tensor, ...], y: Tensor, common: Mapping[str, Any], warps: int
) -> Iterator[Launch | Product]:
    """As many rows of w as a buffer holds are decoded, and multiplied by the library; then the next ones."""
    (m, n), wide = y.shape, 32 * planes.shape[2]
    rows = c.bn // common["PADDED"] * d.vector  # of a tile
    most = min(max(_DECODED // wide // rows, 1) * rows, n)
    buffer = planes.new_empty((most, wide), dtype=planes.dtype)
    constants = {"BEGIN": d.begin, "DECODE": d.decode, **common}
    for first in range(0, n, most):
        count = min(most, n - first)
        grid = (triton.cdiv(count, rows), planes.shape[2] // c.bkb)
        yield Launch(_decode, grid, (buffer, w, n, first // rows), constants, warps)
        if d.scatter is not None:
            own = {"SCATTER": d.scatter, "KBP": planes.shape[2], "BN": 16, "E": 8}
            yield Launch(_scatter, (triton.cdiv(count, 16),), (buffer, w, first, first + count), own, warps)
        yield Product(planes.view(m, wide), buffer[:count], y[:, first : first + count])


def _prepare(
    d: Decoder, c: Config, x: Tensor, perm: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[list[Launch | Product], Tensor, Tensor, Tensor]:
    """The prologue and what it fills: planes [m, 32, KBP], sums float32 [sums, KBP / reduce], and x [k, m].

    The last is for the sparse part. Tensors that nothing will read are `planes` again.
    """
    m, k = x.shape
    kbp = c.padded(k)
    count = d.sums if c.bm == 1 else 0
    planes = x.new_empty((m, 32, kbp), dtype=dtype)
    sums = x.new_empty((count, kbp // d.reduce), dtype=torch.float32) if count else planes
    beside = d.sparse is not None and c.bm > 0
    plain = x.new_empty((k, m), dtype=x.dtype if scale is None else torch.float32) if beside else planes
    pb = min(32, triton.next_power_of_2(kbp))
    constants = {
        "PB": pb, "RED": d.reduce, "SUMS": count, "BITS": d.bits if c.bm == 1 else 0, "EXPONENT": d.exponent,
        "PLAIN": beside,
    }  # fmt: skip
    warps = 4 // (2 if torch.version.hip else 1)
    args = (x, perm, scale, planes, sums, plain, m, k, kbp)
    return [Launch(_prologue, (m, triton.cdiv(kbp, pb)), args, constants, warps)], planes, sums, plain


@triton.jit(do_not_specialize=["M"])
def _prologue(
    x_ptr, perm_ptr, scale_ptr, planes_ptr, sums_ptr, plain_ptr, M, K, KBP,
    PB: tl.constexpr, RED: tl.constexpr, SUMS: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Blocks PB * program_id(1) and on of row program_id(0) of x."""
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, 32)
    kb = tl.program_id(1) * PB + tl.arange(0, PB)
    k = kb[None, :] * 32 + i[:, None]
    source = k
    if perm_ptr is not None:
        source = tl.load(perm_ptr + k, mask=k < K, other=0).to(tl.int32)
    x = tl.load(x_ptr + m * K + source, mask=k < K, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + source, mask=k < K, other=0.0)
    if PLAIN:
        tl.store(plain_ptr + k.to(tl.int64) * M + m, x.to(plain_ptr.dtype.element_ty), mask=k < K)
    if SUMS > 0:
        per_sum = tl.sum(tl.reshape(x, (SUMS, 32 // SUMS, PB)), axis=1)
        per_sum = tl.sum(tl.reshape(per_sum, (SUMS, PB // RED, RED)), axis=2)
        if BITS > 0:
            per_sum *= 2.0 ** (EXPONENT - 149)
        block = tl.program_id(1) * (PB // RED) + tl.arange(0, PB // RED)
        at = tl.arange(0, SUMS)[:, None] * (KBP // RED) + block[None, :]
        tl.store(sums_ptr + at, per_sum, mask=(block < KBP // RED)[None, :])
    if BITS > 0:
        place = i * BITS % 32
        power = (127 + EXPONENT - tl.where(place + BITS > 23, place - 16, place)) << 23
        x = x * power.to(tl.float32, bitcast=True)[:, None]
    at = planes_ptr + m * 32 * KBP + i[:, None] * KBP + kb[None, :]
    tl.store(at, x.to(planes_ptr.dtype.element_ty), mask=(kb < KBP)[None, :])


@triton.jit
def _rows(tile, N, BN: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr):
    """First row of a tile, and all its rows; N for those that only fill up a vector."""
    i = tl.arange(0, BN)
    if VECTOR == 1:
        n0 = tile * BN
        n = n0 + i
    else:
        n0 = tile * (BN // PADDED * VECTOR)
        n = tl.where(i % PADDED < VECTOR, n0 + i // PADDED * VECTOR + i % PADDED, N)
    return n0, n


@triton.jit
def _gemv(
    x_ptr, s_ptr, y_ptr, w, N, KB: tl.constexpr, KBP: tl.constexpr, STEPS: tl.constexpr, BN: tl.constexpr,
    BKB: tl.constexpr, EVEN: tl.constexpr, RED: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    VECTOR: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """y[split, n] from the planes of one row of x."""
    n0, n = _rows(tl.program_id(0), N, BN, VECTOR, PADDED)
    row = tl.minimum(n, N - 1).to(tl.int64)  # programs past the end read the last row again and don't store
    first = tl.program_id(1) * (STEPS * BKB)
    acc = tl.zeros((BN, BKB // RED), tl.float32)
    for step in range(STEPS):
        acc += DOT(w, x_ptr, s_ptr, row, n0, first + step * BKB, KB, KBP, BKB, EVEN, A)
    y = tl.sum(acc, axis=1) * UNIT
    tl.store(y_ptr + tl.program_id(1).to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _gemm(
    x_ptr, y_ptr, w, M, N, KB: tl.constexpr, KBP: tl.constexpr, STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BKB: tl.constexpr, EVEN: tl.constexpr, BEGIN: tl.constexpr, DECODE: tl.constexpr, VECTOR: tl.constexpr,
    PADDED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """y[split, m, n] from the planes of m rows of x."""
    n0, n = _rows(tl.program_id(0), N, BN, VECTOR, PADDED)
    row = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    x_row = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * (32 * KBP)
    first = tl.program_id(2) * (STEPS * BKB)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(STEPS):
        kb0 = first + step * BKB
        state = BEGIN(w, row, n0, kb0, KB, BKB, EVEN, A)
        at = x_row + (kb0 + tl.arange(0, BKB))[:, None]
        for i in tl.static_range(32):
            x = tl.load(at + i * KBP)
            tile = DECODE(w, state, row, n0, kb0, i, KB, BKB, A).to(x.dtype)
            acc = tl.dot(tile, x, acc, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["first"])
def _decode(
    out_ptr, w, N, first, KB: tl.constexpr, KBP: tl.constexpr, BN: tl.constexpr, BKB: tl.constexpr, EVEN: tl.constexpr,
    BEGIN: tl.constexpr, DECODE: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Rows of w from tile `first` on, in planes: out [rows, 32, KBP]."""
    n0, n = _rows(first + tl.program_id(0), N, BN, VECTOR, PADDED)
    row = tl.minimum(n, N - 1).to(tl.int64)
    kb0 = tl.program_id(1) * BKB
    kb = kb0 + tl.arange(0, BKB)
    state = BEGIN(w, row, n0, kb0, KB, BKB, EVEN, A)
    at = (n - first * (BN // PADDED * VECTOR)).to(tl.int64)[:, None] * (32 * KBP) + kb[None, :]
    for i in tl.static_range(32):
        tile = DECODE(w, state, row, n0, kb0, i, KB, BKB, A)
        tl.store(out_ptr + at + i * KBP, tile.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit(do_not_specialize=["first", "N"])
def _scatter(out_ptr, w, first, N, SCATTER: tl.constexpr, KBP: tl.constexpr, BN: tl.constexpr, E: tl.constexpr):
    """Add the sparse part to decoded rows first to N of w."""
    n = first + tl.program_id(0) * BN + tl.arange(0, BN)
    SCATTER(w, out_ptr, tl.minimum(n, N - 1), n < N, (n - first).to(tl.int64) * (32 * KBP), KBP, E)


@triton.jit(do_not_specialize=["M"])
def _finish(
    part_ptr, x_ptr, y_ptr, w, M, N, SPLIT: tl.constexpr, SPARSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """y[m, n] = parts of k in order, plus the sparse part."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for split in tl.static_range(SPLIT):
        source = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
        acc += tl.load(part_ptr + source, mask=mask, other=0.0)
    if SPARSE is not None:
        acc += SPARSE(w, x_ptr, tl.minimum(n, N - 1), tl.minimum(m, M - 1), M, E)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
