"""Microseconds that a packed linear adds to its kernel, one row of float32 on a CPU.

    python -m benchmarks.overhead [--threads 2] [--calls 5000] [--json]

Uniform 4-bit weights in groups of 64. `forward` is a call of the module in inference mode, `kernel` one of its kernel's
`product`, which makes its result, and `operator` one of what stands for the module in compiled graphs. All are medians
of single calls with everything in caches. Lines go to `results/overhead.jsonl`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import record
from qexport.formats.specs import LinearSpec, make_format
from qexport.methods.rtn import Rtn
from qexport.runtime.dispatch import cpu_kernel_of
from qexport.runtime.linear import QuantLinear

SHAPES = ((64, 64), (192, 576), (576, 576), (1536, 576), (576, 1536))


def made(n: int, k: int) -> QuantLinear:
    """A linear of random weights."""
    spec, rng = LinearSpec(make_format("uniform", {"bits": 4, "group_size": 64})), torch.Generator().manual_seed(0)
    fields = Rtn().quantize(torch.randn(n, k, generator=rng), {}, spec.weight, rng).fields
    module = QuantLinear(spec, n, k, dtype=torch.float32, device="cpu", backend="cpu")
    module.load_state_dict(spec.pack(fields, {}))
    return module


def median_of(calls: int, call: Callable[[], Any]) -> float:
    """Microseconds."""
    times = []
    for i in range(calls + calls // 10):
        start = time.perf_counter_ns()
        call()
        if i >= calls // 10:
            times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def facts_of(n: int, k: int, calls: int) -> dict[str, Any]:
    """Medians of one shape."""
    module, x = made(n, k), torch.randn(1, 1, k)
    weight = cpu_kernel_of(module.spec).prepare(module.spec.weight, module.packed, n, k)
    rows, number, operator = x.view(1, k), module._number, torch.ops.qexport.linear.default
    found = {
        "forward": median_of(calls, lambda: module(x)),
        "operator": median_of(calls, lambda: operator(x, number, n)),
        "kernel": median_of(calls, lambda: weight.product(rows)),
    }
    return {"n": n, "k": k, "calls": calls, **found, "adds": found["forward"] - found["kernel"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.json:
        sys.stdout.write("   n     k  forward  operator  kernel  forward adds\n")
    for n, k in SHAPES:
        with torch.inference_mode():
            line = record("overhead", **facts_of(n, k, options.calls))
        row = f"{n:4d} {k:5d} {line['forward']:8.1f} {line['operator']:9.1f} {line['kernel']:7.1f} {line['adds']:8.1f}"
        sys.stdout.write((json.dumps(line) if options.json else row) + "\n")


if __name__ == "__main__":
    main()
