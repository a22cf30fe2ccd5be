"""How long calls take: sides in turn, and what the machine can do at best.

A figure is the median of many calls. Sides are called in turn, so that all meet what else the machine does. On a CPU
the clock is read around each call; on a GPU two events lie around it, and the time between them is the GPU's own.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from qexport.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of dense sides
ROOF_DTYPES = ("fp32", "bf16")  # on a CPU float16 is never the fastest
SECONDS = 0.1  # a side is called so long, or LEAST times if that takes longer
LEAST, MOST = 5, 200
_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # beyond any cache
_SIDE = {"cpu": 1024, "cuda": 8192}  # of square products
_TRYING = 0.5  # seconds that a roof is tried for

Call = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """Moments, and the time between them.

    Attributes:
        cuda: moments are events on the current stream, so that work that was only launched counts.
    """

    cuda: bool

    def now(self) -> Any:
        """The moment when all that was launched so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds; waits for `end` to come."""
        if not self.cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def seconds(self, call: Call) -> float:
        """How long a call takes."""
        start = self.now()
        call()
        return self.between(start, self.now())


@contextmanager
def use_threads(count: int | None) -> Iterator[int]:
    """Let torch and the kernels use so many threads, None for as many as they do; gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_device(device: str) -> Iterator[Clock]:
    """No gradients, the device current where it is a GPU, and its clock; raises `UsageError` for other devices."""
    kind = torch.device(device).type
    if kind not in _READ_BYTES:
        raise UsageError(f"--device {device}: times are measured on cpu and cuda.")
    cuda = kind == "cuda"
    with torch.inference_mode(), torch.cuda.device(device if cuda else -1):
        yield Clock(cuda)


def in_turn(sides: Sequence[Sequence[Call]]) -> list[float]:
    """Median microseconds of a call of each side on a CPU; a side's calls are used one after another, over and over."""
    clock, found = Clock(cuda=False), [list[float]() for _ in sides]
    began, i = time.perf_counter(), 0
    while i < LEAST or (i < MOST and time.perf_counter() - began < SECONDS * len(sides)):
        for calls, seconds in zip(sides, found, strict=True):
            seconds.append(clock.seconds(calls[i % len(calls)]))
        i += 1
    return [statistics.median(seconds) * 1e6 for seconds in found]


def on_gpu(calls: Sequence[Call]) -> tuple[float, float]:
    """Median microseconds of a call in a CUDA graph of all of them, and of a call launched from Python."""

    def run_all() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    found = _repeated(graph.replay) / len(calls), _repeated(run_all) / len(calls)
    graph.reset()
    return found


def _repeated(run: Call) -> float:
    """Median microseconds from before the first launch to the end of the last kernel."""
    clock = Clock(cuda=True)
    first = max(clock.seconds(run), 1e-6)
    return statistics.median(clock.seconds(run) for _ in range(max(LEAST, min(MOST, int(SECONDS / first))))) * 1e6


# ---- what a machine can do ---------------------------------------------------------------------


@dataclass(frozen=True)
class Roofs:
    """What no kernel of this machine, with these threads, is expected to beat.

    Attributes:
        read_gbps: best rate, in 1e9 bytes a second, at which torch finds the largest number of an array that no cache
            holds (256 MiB of float32 on a CPU, 1 GiB on a GPU): it reads all of it and writes nothing.
        gflops: best rate, in 1e9 operations a second, of a square product in float32 and bfloat16 (side 1024 on a CPU,
            8192 on a GPU).
    """

    read_gbps: float
    gflops: Mapping[str, float]

    def fraction(self, nbytes: float, microseconds: float) -> float:
        """The part of the read rate at which so many bytes pass in this time."""
        return nbytes / (microseconds * 1e3 * self.read_gbps)

    def to_json(self) -> dict[str, Any]:
        """Both rates and how they were measured."""
        return {
            "read_gbps": self.read_gbps, "gflops": dict(self.gflops),
            "how": "best rates of torch: the largest number of an array beyond any cache, and square products",
        }  # fmt: skip


def roofs(device: str) -> Roofs:
    """Measure a device's roofs with the threads in use; takes two seconds."""
    with on_device(device) as clock:
        kind = torch.device(device).type
        array = torch.ones(_READ_BYTES[kind] // 4, device=device)
        read = array.nbytes / _best(clock, array.amax) / 1e9
        del array
        side, gflops = _SIDE[kind], {}
        for name in ROOF_DTYPES:
            a = torch.ones(side, side, dtype=DTYPES[name], device=device)
            gflops[name] = 2 * side**3 / _best(clock, lambda a=a: a @ a) / 1e9  # type: ignore[misc]
    return Roofs(read, gflops)


def _best(clock: Clock, call: Call) -> float:
    """The least seconds that a call takes."""
    call()
    began, best = time.perf_counter(), inf
    while time.perf_counter() - began < _TRYING:
        best = min(best, clock.seconds(call))
    return best


def error_of(got: Tensor, expected: Tensor) -> float:
    """Largest error over largest value; infinite if anything is not finite."""
    error = float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return error if torch.isfinite(got).all() else float("inf")
