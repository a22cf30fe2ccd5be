"""Time of decoding whole weights on a CPU, and of a prefill, which meets them decoded.

    python benchmarks/decoding.py [--formats uniform,bcq-4] [--shapes 4096x4096] [--dtypes float32,bfloat16,float16]
                                  [--threads 1] [--json]
    python benchmarks/decoding.py --model FOLDER [--tokens 512] [--rounds 3] [--dtypes ...] [--threads 1] [--json]

Without a model: random stored tensors of the cases of `benchmarks/linear.py`, decoded by the format itself (the
reference) and by the loops, in turn. `GB/s` is what is written, the decoded bytes over the loops' time. Both must be
equal bit for bit, or the case is reported instead of timed and the exit code is 1.

With one: one forward pass over so many tokens without a cache, of the packed model and of the same model with dense
weights, in every dtype, one after the other in each round. `ratio` is packed time over dense time: 1 is as fast. Logits
must be equal bit for bit.

Figures are medians. Lines go to `results/decoding.jsonl`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qexport
from benchmarks.linear import CASES, stored_tensors
from benchmarks.record import record
from qexport.formats.specs import format_options
from qexport.runtime.decoding import decoded

SECONDS = 0.3  # a case is timed so long, or LEAST times
LEAST, MOST = 5, 30
DTYPES = "float32,bfloat16,float16"
BACKENDS = ("reference", "auto")


def seconds_of(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call, called in turn: so many rounds at least, and more while there is time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    began, done = time.perf_counter(), 0
    while done < rounds or (done < MOST and time.perf_counter() - began < seconds):
        for name, call in calls.items():
            found[name].append(seconds_of(call))
        done += 1
    return {name: statistics.median(own) * 1e3 for name, own in found.items()}


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers, zeros by their sign too."""
    kind = torch.int32 if a.element_size() == 4 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def weights(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Facts of each case in each shape and dtype, with `failed` in place of times where bits differ."""
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for name, case in CASES.items():
            if case.spec.input.quant is not None or not name.startswith(tuple(options.formats.split(","))):
                continue
            spec, packed = stored_tensors(case, n, k, "cpu")
            for dtype in options.dtypes.split(","):
                own = getattr(torch, dtype)
                calls = {
                    b: lambda b=b, s=spec, p=packed, d=own, n=n, k=k: decoded(s, p, n, k, d, backend=b)
                    for b in BACKENDS
                }  # fmt: skip
                facts = {
                    "case": name, "format": spec.weight.name, "options": format_options(spec.weight), "n": n, "k": k,
                    "dtype": dtype,
                }  # fmt: skip
                if not bits_equal(*(call() for call in calls.values())):
                    yield facts | {"failed": "the loops' bits are not the reference's"}
                    continue
                ms = in_turn(calls, LEAST, SECONDS)
                written = n * k * own.itemsize / ms["auto"] / 1e6
                yield facts | {"reference_ms": ms["reference"], "ms": ms["auto"], "written_gbps": written}


def prefill(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Facts of the model in each dtype."""
    calls, rng = {}, torch.Generator().manual_seed(0)
    vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    ids = torch.randint(0, vocabulary, (1, options.tokens), generator=rng)
    for dtype in options.dtypes.split(","):
        packed = qexport.load(options.model, dtype=getattr(torch, dtype), own_cache=False)
        dense = qexport.load(options.model, dtype=getattr(torch, dtype), own_cache=False).dequantize()
        for side, model in (("packed", packed), ("dense", dense)):
            calls[side, dtype] = lambda model=model: model(ids, use_cache=False).logits
    with torch.inference_mode():
        equal = {
            dtype: torch.equal(calls["packed", dtype](), calls["dense", dtype]())
            for dtype in options.dtypes.split(",")
        }  # fmt: skip
        ms = in_turn(calls, options.rounds, 0)  # type: ignore[arg-type]
    for dtype, same in equal.items():
        facts = {"model": Path(options.model).name, "tokens": options.tokens, "rounds": options.rounds, "dtype": dtype}
        if not same:
            yield facts | {"failed": "logits differ from those of the dense weights"}
            continue
        ours, theirs = ms["packed", dtype], ms["dense", dtype]  # type: ignore[index]
        yield facts | {"packed_ms": ours, "dense_ms": theirs, "ratio": ours / theirs}


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    if "model" in line:
        times = f"packed {line['packed_ms']:8.1f} ms  dense {line['dense_ms']:8.1f} ms  ratio {line['ratio']:5.2f}"
        return f"{line['model']:14s} {line['tokens']:6d} tokens  {line['dtype']:8s} {times}"
    size, ms = f"{line['n']}x{line['k']}", f"reference {line['reference_ms']:8.2f} ms  loops {line['ms']:7.2f} ms"
    return f"{line['case']:16s} {size:>10s} {line['dtype']:8s} {ms}  {line['written_gbps']:5.1f} GB/s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a packed checkpoint, to time its prefill")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default="", help="cases whose names start so, commas between")
    parser.add_argument("--shapes", default="4096x4096", help="n x k, commas between")
    parser.add_argument("--dtypes", default=DTYPES, help="commas between")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    failed = 0
    for facts in prefill(options) if options.model else weights(options):
        if "failed" in facts:
            failed += 1
            sys.stderr.write(f"FAILED {json.dumps(facts)}\n")
            continue
        line = record("decoding", **facts)
        sys.stdout.write((json.dumps(line) if options.json else row(line)) + "\n")
        sys.stdout.flush()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
