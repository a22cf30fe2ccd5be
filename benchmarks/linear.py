"""Latency of packed linears against dense ones, after a check that both multiply by the same weight.

    python benchmarks/linear.py [--device cuda|cpu] [--formats uniform,bcq-4] [--m 1,2,16,512] [--shapes 4096x14336]
                                [--dtype float16] [--quick] [--backend triton] [--json]

One side is `QuantLinear` on random stored tensors of a case, the other `F.linear` on a random dense weight in x's type.
Both have copies of their weights that together take more than 200 MB (100 MB on a CPU; but at most 64 copies), which
are used in turn, so that no cache holds the next one. Shapes are n x k.

    CUDA   one CUDA graph of as many calls as there are copies, replayed between two events: GPU time of a call, without
           Python. `eager` is the same calls launched one by one from Python, so what launching takes counts.
    CPU    `time.perf_counter` around each call, both sides in turn. The reference path has only 4 copies: it decodes.

Figures are medians. `ratio` is dense time over packed time: above 1 the packed side is faster. `GB/s` is effective: the
stored bytes, x and y over the packed time. A case is timed only if its result is within the tolerance of the kernel
tests of the reference path in float64; one that is not, or can't run, is reported and the exit code is 1.
Lines go to `results/linear.jsonl`.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import record
from qexport import schema
from qexport.formats._bits import groups_in
from qexport.formats.specs import InputSpec, LinearSpec, format_options, make_format, to_json
from qexport.inputs.outliers import Outliers
from qexport.inputs.sdr import Sdr
from qexport.inputs.token import Token
from qexport.runtime.linear import QuantLinear

TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}  # largest error over largest value
SHAPES = {"cuda": ("4096x4096", "4096x14336", "14336x4096"), "cpu": ("576x576", "1536x576", "576x1536", "4096x4096")}
ROTATED = {"cuda": 200e6, "cpu": 100e6}  # bytes
COPIES = 64
FEW = 4  # copies for the reference path, which decodes into fresh memory
SECONDS = 0.05  # a side is timed so long, or LEAST times if that takes longer
LEAST, MOST = 5, 50

Make = Callable[[Any, int, int, torch.Generator], dict[str, Tensor]]
Calls = list[Callable[[Tensor], Tensor]]


def uniform_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every code, scales that make weights about 1 large."""
    groups = groups_in(k, fmt.group_size)
    out = {"codes": _codes(fmt.bits, n, k, rng), "scales": _scales(fmt, n, groups, rng, 2.0**-fmt.bits)}
    return out if fmt.symmetric else out | {"zeros": _codes(fmt.bits, n, groups, rng).float()}


def fp_asym_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every code, a scale for either sign."""
    groups, names = groups_in(k, fmt.group_size), ("scales_pos", "scales_neg")[: 1 + fmt.two_scales]
    return {"codes": _codes(fmt.bits, n, k, rng)} | {name: _scales(fmt, n, groups, rng) for name in names}


def bcq_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every code, normal alphas and offsets."""
    groups = groups_in(k, fmt.group_size)
    out = {"codes": _codes(fmt.bits, n, k, rng), "alpha": _normal(fmt, rng, n, groups, fmt.bits)}
    return out if fmt.offset == "none" else out | {"offset": _normal(fmt, rng, n, groups)}


def sdr_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every code and flag, one scale a row."""
    groups = groups_in(k, fmt.group_size)
    shifts = torch.randint(0, fmt.base_bits - fmt.bits + 1, (n, groups), generator=rng, device=rng.device)
    scales = (torch.rand(n, 1, generator=rng, device=rng.device) + 0.5) * 2.0**-fmt.base_bits
    return {"codes": _codes(fmt.bits, n, k, rng), "flags": shifts.float(), "scales": scales.expand(n, groups)}


def spqr_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every code of both levels, and 1 % of the weights as outliers."""
    groups = groups_in(k, fmt.group_size)
    live = torch.rand(n, k, generator=rng, device=rng.device) < 0.01
    counts = live.sum(1).cumsum(0)
    return {
        "codes": _codes(fmt.bits, n, k, rng),
        "scale_codes": _codes(fmt.scale_bits, n, groups, rng),
        "zero_codes": _codes(fmt.zero_bits, n, groups, rng),
        "stats": _spqr_stats(fmt, -(-n // fmt.stats_group), groups, rng),
        "outlier_rows": torch.cat((counts.new_zeros(1), counts)).int(),
        "outlier_columns": live.nonzero()[:, 1].int(),
        "outlier_values": _normal(fmt, rng, int(counts[-1])),
    }


def _spqr_stats(fmt: Any, blocks: int, groups: int, rng: torch.Generator) -> Tensor:
    """Second level [blocks, groups, 4]: step and zero of scales, which are then positive, step and zero of zeros."""
    out = torch.rand(blocks, groups, 4, generator=rng, device=rng.device) + 0.5
    return _rounded(fmt, out * out.new_tensor([0.05, -1.0, 1.0, 1.0]))


def vector_fields(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Every index, normal entries, scales and offsets."""
    out, widths = {"rows": torch.tensor(n)}, {name: width for name, _, width in fmt.indexed}
    for name, field in fmt.layout(n, k).items():
        if name in widths:
            shape = (field.shape[0], k)
            out[name] = torch.randint(
                0, 2 ** widths[name], shape, dtype=torch.int32, generator=rng, device=rng.device
            )  # fmt: skip
        elif name == "outlier_index":
            out[name] = torch.randperm(k, generator=rng, device=rng.device)[: field.shape[0]].sort().values.int()
        elif not name.endswith("_high"):
            out[name] = _normal(fmt, rng, *field.shape)
    return out


def _codes(bits: int, n: int, count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2**bits, (n, count), dtype=torch.uint8, generator=rng, device=rng.device)


def _scales(fmt: Any, n: int, groups: int, rng: torch.Generator, size: float = 1.0) -> Tensor:
    return _rounded(fmt, (torch.rand(n, groups, generator=rng, device=rng.device) + 0.5) * size)


def _normal(fmt: Any, rng: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return _rounded(fmt, torch.randn(shape, generator=rng, device=rng.device) * size)


def _rounded(fmt: Any, values: Tensor) -> Tensor:
    return values.to(getattr(torch, fmt.scale_dtype)).float()


@dataclass(frozen=True)
class Case:
    """What is stored, and how random fields of it are made."""

    spec: LinearSpec
    fields: Make


def _case(make: Make, name: str, **options: Any) -> Case:
    return Case(LinearSpec(make_format(name, options)), make)


_ROWS = _case(uniform_fields, "uniform", bits=8, group_size=-1, symmetric=True)

CASES = {
    **{f"uniform-{b}-asym": _case(uniform_fields, "uniform", bits=b) for b in (2, 3, 4, 8)},
    **{f"uniform-{b}-sym": _case(uniform_fields, "uniform", bits=b, symmetric=True) for b in (2, 3, 4, 8)},
    "fp_asym-nf4": _case(fp_asym_fields, "fp_asym"),
    **{f"bcq-{b}": _case(bcq_fields, "bcq", bits=b) for b in (3, 4)},
    "sdr-4": _case(sdr_fields, "sdr"),
    "spqr-3": _case(spqr_fields, "spqr"),
    "vector-2": _case(vector_fields, "vector"),
    **{
        name: replace(case, spec=replace(case.spec, input=InputSpec(quant=quant)))
        for name, case, quant in (
            ("w8a8", _ROWS, Token()),
            ("w8a8-g128", _case(uniform_fields, "uniform", bits=8, symmetric=True), Token()),
            ("w4a8-g128", _case(uniform_fields, "uniform", bits=4, symmetric=True), Token()),
            ("llm-int8", _ROWS, Outliers(static=True)),
            ("qrazor-w4a8", _case(sdr_fields, "sdr"), Sdr(bits=8)),
            ("qrazor-w4a4", _case(sdr_fields, "sdr"), Sdr(bits=4)),
        )
    },
}


@dataclass(frozen=True)
class Setting:
    """What all cases of a run have in common."""

    device: str
    dtype: str
    backend: str
    ms: tuple[int, ...]

    def x(self, m: int, k: int) -> Tensor:
        """Normal input [m, k], the same one every time."""
        rng = torch.Generator(self.device).manual_seed(m)
        return torch.randn(m, k, generator=rng, device=self.device).to(getattr(torch, self.dtype))


def inputs_of(spec: LinearSpec, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """What the treatment of the input stores, at random; see `InputSpec.pack`."""
    out = {}
    if spec.input.scale:
        out["scale"] = torch.rand(k, generator=rng, device=rng.device) + 0.5
    if spec.input.hadamard:
        out["signs"] = torch.randint(0, 2, (k,), generator=rng, device=rng.device).float() * 2 - 1
    if spec.input.permute:
        out["perm"] = torch.randperm(k, generator=rng, device=rng.device)
    if spec.input.quant is not None:  # the range of normal inputs, and six features beyond the threshold of LLM.int8()
        high = torch.full((k,), 4.0, device=rng.device)
        high[torch.randperm(k, generator=rng, device=rng.device)[:6]] = 60.0
        out |= spec.input.quant.calibrate(-high, high)
    return out


def stored_tensors(case: Case, n: int, k: int, device: str) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The spec with all that depends on the size decided, and random stored tensors, the same ones every time."""
    rng = torch.Generator(device).manual_seed(0)
    spec = replace(case.spec, weight=case.spec.weight.sized(n, k))
    tensors = spec.pack(case.fields(spec.weight, n, k, rng), inputs_of(spec, k, rng))
    return spec, {name: tensor.to(device) for name, tensor in tensors.items()}


def module_of(spec: LinearSpec, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: str, backend: str) -> Any:
    """A linear that holds copies of the tensors."""
    extents = schema.extents_of(tensors, spec.layout(*shape))
    module = QuantLinear(spec, *shape, dtype=getattr(torch, dtype), extents=extents, backend=backend)
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return module


def copies_for(nbytes: int, device: str) -> int:
    """Copies of a weight that together don't fit a cache."""
    return max(2, min(COPIES, int(ROTATED[device] // nbytes) + 1))


def compile_ahead(name: str, shape: tuple[int, int], setting: Setting) -> None:
    """Leave a case's compiled kernels in Triton's cache: run in processes of their own, several at a time."""
    n, k = shape
    spec, tensors = stored_tensors(CASES[name], n, k, setting.device)
    module = module_of(spec, tensors, shape, setting.dtype, setting.backend)
    for m in setting.ms:
        module(setting.x(m, k))
    torch.cuda.synchronize()


def error_of(got: Tensor, expected: Tensor) -> float:
    """Largest error over largest value; infinite if anything is not finite."""
    error = float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return error if torch.isfinite(got).all() else float("inf")


def measure(name: str, shape: tuple[int, int], setting: Setting) -> Iterator[dict[str, Any]]:
    """Check and time one case at all m; yields its facts, with `failed` in place of times where the check fails."""
    n, k = shape
    spec, tensors = stored_tensors(CASES[name], n, k, setting.device)
    nbytes = spec.nbytes(n, k, spec.check(tensors, n, k, name))
    reference = module_of(spec, tensors, shape, setting.dtype, "reference")
    packed = [module_of(spec, tensors, shape, setting.dtype, setting.backend)]
    path = packed[0].choice.path
    copies = copies_for(nbytes, setting.device) if path != "reference" else FEW
    packed += [module_of(spec, tensors, shape, setting.dtype, setting.backend) for _ in range(copies - 1)]
    dtype = getattr(torch, setting.dtype)
    dense = torch.randn(n, k, device=setting.device).to(dtype)
    weights = [dense.clone() for _ in range(copies_for(dense.nbytes, setting.device))]
    for m in setting.ms:
        x = setting.x(m, k)
        facts = {
            "case": name, "format": spec.weight.name, "options": format_options(spec.weight),
            "input": to_json(spec)["input"], "n": n, "k": k, "m": m,
            "dtype": setting.dtype, "device": setting.device, "path": path,
            "bits_per_weight": 8 * nbytes / (n * k), "copies": copies,
            "error": error_of(packed[0](x), reference(x.double())),
        }  # fmt: skip
        if not facts["error"] <= TOLERANCE[setting.dtype]:
            yield facts | {"failed": f"error {facts['error']:.1e}, allowed {TOLERANCE[setting.dtype]:.0e}"}
            continue
        ours, theirs = times(list(packed), [lambda x, w=w: F.linear(x, w) for w in weights], x)  # type: ignore[misc]
        moved = nbytes + (m * k + m * n) * dtype.itemsize
        facts |= {f"packed_{key}": value for key, value in ours.items()}
        facts |= {f"dense_{key}": value for key, value in theirs.items()}
        facts |= {"ratio": theirs["us"] / ours["us"], "effective_gbps": moved / ours["us"] / 1e3}
        yield facts | ({"gpu": torch.cuda.get_device_name()} if x.is_cuda else {})


def times(packed: Calls, dense: Calls, x: Tensor) -> list[dict[str, float]]:
    """Median microseconds of a call of both sides; see the module's text."""
    with torch.inference_mode():
        for call in (*packed, *dense):
            call(x)  # a linear makes its kernel's layout at the first call
        if x.is_cuda:
            return [on_gpu(calls, x) for calls in (packed, dense)]
        return [{"us": us} for us in in_turn(packed, dense, x)]


def in_turn(packed: Calls, dense: Calls, x: Tensor) -> list[float]:
    """Median microseconds of a call of both sides, called in turn, so that both meet what else the machine does."""
    found: tuple[list[float], list[float]] = ([], [])
    began, i = time.perf_counter(), 0
    while i < LEAST or (i < MOST and time.perf_counter() - began < SECONDS):
        for side, calls in enumerate((packed, dense)):
            start = time.perf_counter()
            calls[i % len(calls)](x)
            found[side].append(time.perf_counter() - start)
        i += 1
    return [statistics.median(seconds) * 1e6 for seconds in found]


def on_gpu(calls: Calls, x: Tensor) -> dict[str, float]:
    """Median microseconds of a call: `us` in a graph, `eager_us` with launches from Python."""

    def run_all() -> None:
        for call in calls:
            call(x)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    found = {"us": _between_events(graph.replay), "eager_us": _between_events(run_all)}
    graph.reset()
    return {key: us / len(calls) for key, us in found.items()}


def _between_events(run: Callable[[], Any]) -> float:
    """Median microseconds from before the first launch to the end of the last kernel."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    first = once()
    return statistics.median([once() for _ in range(max(LEAST, min(MOST, int(SECONDS * 1e6 / first))))])


HEAD = "case                    n x k    m      path   bits  packed us   dense us  ratio"
HEAD_CUDA = "   GB/s  eager us     dense  ratio"


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    n, k = line["n"], line["k"]
    head = f"{line['case']:16s} {f'{n}x{k}':>12s} {line['m']:4d} {line['path']:>9s} {line['bits_per_weight']:6.2f} "
    text = f"{head}{line['packed_us']:10.1f} {line['dense_us']:10.1f} {line['ratio']:6.2f}"
    if "gpu" not in line:
        return text
    ours, theirs = line["packed_eager_us"], line["dense_eager_us"]
    return f"{text} {line['effective_gbps']:6.0f} {ours:9.1f} {theirs:9.1f} {theirs / ours:6.2f}"


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", help=f"cases whose names start so, commas between; all are {', '.join(CASES)}")
    parser.add_argument("--m", help="rows of x, commas between; 1,2,16,512 or on a CPU 1,16,512")
    parser.add_argument("--shapes", help="n x k as 4096x14336, commas between")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="float16 on CUDA, float32 on a CPU")
    parser.add_argument("--backend", help="see QuantLinear; triton on CUDA, auto on a CPU")
    parser.add_argument("--quick", action="store_true", help="4096x4096 alone")
    parser.add_argument("--compilers", type=int, default=min(os.cpu_count() or 1, 12), help="processes, CUDA only")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.shapes = options.shapes or ("4096x4096" if options.quick else ",".join(SHAPES[options.device]))
    options.m = options.m or ("1,2,16,512" if cuda else "1,16,512")
    options.dtype = options.dtype or ("float16" if cuda else "float32")
    options.backend = options.backend or ("triton" if cuda else "auto")
    starts = tuple((options.formats or "").split(","))
    options.cases = [name for name in CASES if name.startswith(starts)]
    if not options.cases:
        parser.error(f"no case starts with {options.formats}; there are {', '.join(CASES)}")
    return options


def main() -> None:
    """Command line."""
    options = options_of()
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))
    setting = Setting(options.device, options.dtype, options.backend, tuple(map(int, options.m.split(","))))
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in options.shapes.split(","))]
    jobs = [(name, shape) for shape in shapes for name in options.cases]
    if options.device == "cuda" and options.backend == "triton" and options.compilers > 1:
        # Errors come again, and are reported, where the case is measured. The last cases take longest to compile.
        with suppress(BrokenProcessPool), ProcessPoolExecutor(options.compilers, get_context("spawn")) as pool:
            wait([pool.submit(compile_ahead, name, shape, setting) for name, shape in reversed(jobs)])
    if not options.json:
        say(HEAD + (HEAD_CUDA if options.device == "cuda" else ""))
    failed = 0
    for name, (n, k) in jobs:
        try:
            for facts in measure(name, (n, k), setting):
                if "failed" in facts:
                    failed += 1
                    sys.stderr.write(f"FAILED {name} {n}x{k} m={facts['m']}, not timed: {facts['failed']}\n")
                    continue
                line = record("linear", **facts)
                say(json.dumps(line) if options.json else row(line))
        except Exception as error:  # noqa: BLE001  whatever stops one case, the others are measured
            failed += 1
            sys.stderr.write(f"FAILED {name} {n}x{k}: {type(error).__name__}: {error}\n")
        gc.collect()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
