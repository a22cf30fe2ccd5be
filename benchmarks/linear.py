"""Latency of packed linears against dense ones, after a check that both multiply by the same weight.

    python benchmarks/linear.py [--device cuda|cpu] [--formats uniform,bcq-4] [--m 1,2,16,512] [--shapes 4096x14336]
                                [--dtype float16] [--threads 1] [--quick] [--backend triton] [--json]

One side is `QuantLinear` on random stored tensors of a case, on x of `--dtype`; the others are `F.linear` on a random
dense weight, on a CPU in float32, bfloat16 and float16, on a GPU in x's type. All have copies of their weights that
together take more than 200 MB (100 MB on a CPU; but at most 1024 copies), which are used in turn, so that no cache
holds the next one. Shapes are n x k. What measures is `qexport.evaluate.kernel`, as for `qexport bench --shape`.

    CUDA   one CUDA graph of as many calls as there are copies, replayed between two events: GPU time of a call, without
           Python. `eager` is the same calls launched one by one from Python, so what launching takes counts.
    CPU    `time.perf_counter` around each call, all sides in turn. The reference path has only 4 copies: it decodes.

Figures are medians. `ratio` is dense time over packed time, by the dense dtype: above 1 the packed side is faster.
`bandwidth_fraction` is the stored bytes over the packed time, as a part of the rate at which the machine was seen to
read at the start of the run, with these threads (`read_gbps`); `effective_gbps` counts x and y too. A case is timed
only if its result is within the tolerance of the kernel tests of the reference path in float64; one that is not, or
can't run, is reported and the exit code is 1. Lines go to `results/linear.jsonl`. Lines without `read_gbps` are older:
their `dense_us` and `ratio` are those of `dtype` alone, and at most 64 copies were used in turn.
"""

import argparse
import gc
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from qexport.evaluate.kernel import TOLERANCE, Setting, measure, module_of, stored_tensors
from qexport.evaluate.latency import DTYPES, Roofs, roofs, use_threads
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.inputs.outliers import Outliers
from qexport.inputs.sdr import Sdr
from qexport.inputs.token import Token

SHAPES = {"cuda": ("4096x4096", "4096x14336", "14336x4096"), "cpu": ("576x576", "1536x576", "576x1536", "4096x4096")}
SHORT = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def _spec(name: str, **options: Any) -> LinearSpec:
    return LinearSpec(make_format(name, options))


_ROWS = _spec("uniform", bits=8, group_size=-1, symmetric=True)

CASES = {
    **{f"uniform-{b}-asym": _spec("uniform", bits=b) for b in (2, 3, 4, 8)},
    **{f"uniform-{b}-sym": _spec("uniform", bits=b, symmetric=True) for b in (2, 3, 4, 8)},
    "fp_asym-nf4": _spec("fp_asym"),
    **{f"bcq-{b}": _spec("bcq", bits=b) for b in (3, 4)},
    "sdr-4": _spec("sdr"),
    "spqr-3": _spec("spqr"),
    "vector-2": _spec("vector"),
    **{
        name: replace(spec, input=InputSpec(quant=quant))
        for name, spec, quant in (
            ("w8a8", _ROWS, Token()),
            ("w8a8-g128", _spec("uniform", bits=8, symmetric=True), Token()),
            ("w4a8-g128", _spec("uniform", bits=4, symmetric=True), Token()),
            ("llm-int8", _ROWS, Outliers(static=True)),
            ("qrazor-w4a8", _spec("sdr"), Sdr(bits=8)),
            ("qrazor-w4a4", _spec("sdr"), Sdr(bits=4)),
        )
    },
}


def compile_ahead(name: str, shape: tuple[int, int], setting: Setting) -> None:
    """Leave a case's compiled kernels in Triton's cache: run in processes of their own, several at a time."""
    n, k = shape
    spec, tensors = stored_tensors(CASES[name], n, k, setting.device)
    module = module_of(spec, tensors, shape, setting.dtype, setting.backend)
    for m in setting.ms:
        module(setting.x(m, k))
    torch.cuda.synchronize()


def facts_of(line: dict[str, Any], best: Roofs) -> dict[str, Any]:
    """A measurement with what a line of the results has beside it."""
    moved = line["bytes"] + (line["m"] * line["k"] + line["m"] * line["n"]) * getattr(torch, line["dtype"]).itemsize
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.device(line["device"]).type == "cuda" else {}
    return {**line, "effective_gbps": moved / line["packed_us"] / 1e3, "read_gbps": best.read_gbps, **gpu}


HEAD = "case                    n x k    m      path   bits  packed us  of read"
HEAD_CUDA = "   GB/s  eager us     dense  ratio"


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    n, k = line["n"], line["k"]
    head = f"{line['case']:16s} {f'{n}x{k}':>12s} {line['m']:4d} {line['path']:>9s} {line['bits_per_weight']:6.2f} "
    text = f"{head}{line['packed_us']:10.1f} {line['bandwidth_fraction']:8.1%}"
    text += "".join(f" {us:10.1f} {line['ratio'][dtype]:6.2f}" for dtype, us in line["dense_us"].items())
    if "gpu" not in line:
        return text
    ours, theirs = line["packed_eager_us"], line["dense_eager_us"][SHORT[line["dtype"]]]
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
    dense = (SHORT[options.dtype],) if options.device == "cuda" else tuple(DTYPES)
    setting = Setting(options.device, options.dtype, options.backend, tuple(map(int, options.m.split(","))), dense)
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in options.shapes.split(","))]
    jobs = [(name, shape) for shape in shapes for name in options.cases]
    if options.device == "cuda" and options.backend == "triton" and options.compilers > 1:
        # Errors come again, and are reported, where the case is measured. The last cases take longest to compile.
        with suppress(BrokenProcessPool), ProcessPoolExecutor(options.compilers, get_context("spawn")) as pool:
            wait([pool.submit(compile_ahead, name, shape, setting) for name, shape in reversed(jobs)])
    with use_threads(options.threads):
        sys.exit(run_all(jobs, setting, as_json=options.json) > 0)


def run_all(jobs: list[tuple[str, tuple[int, int]]], setting: Setting, *, as_json: bool) -> int:
    """Measure all cases and print a line for each; returns how many failed."""
    best, failed = roofs(setting.device), 0
    if not as_json:
        columns = "".join(f" {f'{dtype} us':>10s}  ratio" for dtype in setting.dense)
        say(HEAD + columns + (HEAD_CUDA if setting.device == "cuda" else ""))
    for name, (n, k) in jobs:
        try:
            for facts in measure(CASES[name], (n, k), setting, best, name=name):
                if "failed" in facts:
                    failed += 1
                    sys.stderr.write(f"FAILED {name} {n}x{k} m={facts['m']}, not timed: {facts['failed']}\n")
                    continue
                line = record("linear", case=name, **facts_of(facts, best))
                say(json.dumps(line) if as_json else row(line))
        except Exception as error:  # noqa: BLE001  whatever stops one case, the others are measured
            failed += 1
            sys.stderr.write(f"FAILED {name} {n}x{k}: {type(error).__name__}: {error}\n")
        gc.collect()
    return failed


if __name__ == "__main__":
    main()
