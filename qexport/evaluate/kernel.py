"""One packed linear against dense ones, without a checkpoint: random stored tensors, checked, then timed.

One side is `QuantLinear`, the others `F.linear` on a random dense weight in float32, bfloat16 and float16. All have
copies of their weights that together take more than a cache holds and are used in turn; see `evaluate.latency`. What
the packed side computes is held against the reference path in float64 first: what is wrong is not timed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport import schema
from qexport.errors import BackendError, UsageError
from qexport.evaluate.latency import DTYPES, Call, Roofs, error_of, in_turn, on_device, on_gpu, roofs, use_threads
from qexport.formats.base import Format
from qexport.formats.specs import InputSpec, LinearSpec, format_options, to_json
from qexport.runtime.linear import QuantLinear

TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}  # largest error over largest value
_ROTATED = {"cpu": 100e6, "cuda": 200e6}  # bytes of a side's copies
_MOST = 1024  # copies, of small matrices
_FEW = 4  # copies for the reference path, which decodes into fresh memory


@dataclass(frozen=True)
class Setting:
    """How one linear is measured.

    Attributes:
        device: where.
        dtype: of x on the packed side: float32, float16 or bfloat16.
        backend: see `dispatch.choose`.
        ms: rows of x, one measurement each.
        dense: dtypes of the dense sides, by their short names.
    """

    device: str
    dtype: str
    backend: str
    ms: Sequence[int]
    dense: Sequence[str] = tuple(DTYPES)

    def x(self, m: int, k: int) -> Tensor:
        """Normal input [m, k], the same one every time."""
        rng = torch.Generator(self.device).manual_seed(m)
        return torch.randn(m, k, generator=rng, device=self.device).to(getattr(torch, self.dtype))

    def copies(self, nbytes: int) -> int:
        """Copies of a weight that together don't fit a cache."""
        wanted = int(_ROTATED[torch.device(self.device).type] // nbytes) + 1
        return max(2, min(_MOST, wanted))


def stored_tensors(spec: LinearSpec, n: int, k: int, device: str) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The spec with all that depends on the size decided, and random stored tensors, the same ones every time."""
    rng = torch.Generator(device).manual_seed(0)
    spec = replace(spec, weight=spec.weight.sized(n, k))
    tensors = spec.pack(spec.weight.random(n, k, rng), _inputs(spec.input, k, rng))
    return spec, {name: tensor.to(device) for name, tensor in tensors.items()}


def _inputs(steps: InputSpec, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """What the treatment of the input stores, at random; see `InputSpec.pack`."""
    out = {}
    if steps.scale:
        out["scale"] = torch.rand(k, generator=rng, device=rng.device) + 0.5
    if steps.hadamard:
        out["signs"] = torch.randint(0, 2, (k,), generator=rng, device=rng.device).float() * 2 - 1
    if steps.permute:
        out["perm"] = torch.randperm(k, generator=rng, device=rng.device)
    if steps.quant is not None:  # the range of normal inputs, and six features beyond the threshold of LLM.int8()
        high = torch.full((k,), 4.0, device=rng.device)
        high[torch.randperm(k, generator=rng, device=rng.device)[:6]] = 60.0
        out |= steps.quant.calibrate(-high, high)
    return out


def module_of(spec: LinearSpec, tensors: schema.Tensors, shape: tuple[int, int], dtype: str, backend: str) -> Any:
    """A linear that holds copies of the tensors."""
    extents = schema.extents_of(tensors, spec.layout(*shape))
    module = QuantLinear(spec, *shape, dtype=getattr(torch, dtype), extents=extents, backend=backend)
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return module


def measure(
    spec: LinearSpec, shape: tuple[int, int], setting: Setting, best: Roofs, *, name: str = "kernel"
) -> Iterator[dict[str, Any]]:
    """Check and time one linear at all m.

    Args:
        spec: what is stored.
        shape: n and k.
        setting: how.
        best: of the device.
        name: of the linear, for errors.

    Yields:
        Facts: what was measured, `error`, `packed_us`, `dense_us` and `ratio` (dense over packed) by dtype, `gbps`
        (stored bytes over the packed time) and `bandwidth_fraction`; on a GPU also `packed_eager_us` and
        `dense_eager_us`. Where the check fails there is `failed` in place of times.
    """
    n, k = shape
    spec, tensors = stored_tensors(spec, n, k, setting.device)
    nbytes = spec.nbytes(n, k, spec.check(tensors, n, k, name))
    reference = module_of(spec, tensors, shape, setting.dtype, "reference")
    packed = [module_of(spec, tensors, shape, setting.dtype, setting.backend)]
    path, reason = packed[0].choice.path, packed[0].choice.reason
    copies = setting.copies(nbytes) if path != "reference" else _FEW
    packed += [module_of(spec, tensors, shape, setting.dtype, setting.backend) for _ in range(copies - 1)]
    dense = {dtype: _dense(shape, dtype, setting) for dtype in setting.dense}
    for m in setting.ms:
        x = setting.x(m, k)
        facts = {
            "format": spec.weight.name, "options": format_options(spec.weight), "input": to_json(spec)["input"],
            "n": n, "k": k, "m": m, "dtype": setting.dtype, "device": setting.device, "path": path, "reason": reason,
            "bytes": nbytes, "bits_per_weight": 8 * nbytes / (n * k), "copies": copies,
            "error": error_of(packed[0](x), reference(x.double())),
        }  # fmt: skip
        if not facts["error"] <= TOLERANCE[setting.dtype]:
            yield facts | {"failed": f"error {facts['error']:.1e}, allowed {TOLERANCE[setting.dtype]:.0e}"}
            continue
        found = _times([[partial(module, x) for module in packed], *_products(dense, x)], x)
        yield facts | _figures(found, list(dense), nbytes, best)


def _dense(shape: tuple[int, int], dtype: str, setting: Setting) -> list[Tensor]:
    """Copies of a random dense weight."""
    weight = torch.randn(shape, device=setting.device).to(DTYPES[dtype])
    return [weight.clone() for _ in range(setting.copies(weight.nbytes))]


def _products(weights: Mapping[str, list[Tensor]], x: Tensor) -> list[list[Call]]:
    """Calls of each dense side, on x in its dtype."""
    return [[partial(F.linear, x.to(DTYPES[dtype]), weight) for weight in own] for dtype, own in weights.items()]


def _times(sides: Sequence[Sequence[Call]], x: Tensor) -> dict[str, list[float]]:
    """Median microseconds of a call of each side, `us`; on a GPU in a CUDA graph, and `eager_us` without."""
    with on_device(str(x.device)):
        for call in chain(*sides):
            call()  # a linear makes its kernel's layout at the first call
        if not x.is_cuda:
            return {"us": in_turn(sides)}
        us, eager = zip(*(on_gpu(calls) for calls in sides), strict=True)
        return {"us": list(us), "eager_us": list(eager)}


def _figures(times: Mapping[str, list[float]], dense: Sequence[str], nbytes: int, best: Roofs) -> dict[str, Any]:
    """What is made of the times of the packed side and of the dense ones."""
    out: dict[str, Any] = {}
    for key, (ours, *theirs) in times.items():
        out |= {f"packed_{key}": ours, f"dense_{key}": dict(zip(dense, theirs, strict=True))}
    us = out["packed_us"]
    return out | {
        "ratio": {dtype: theirs / us for dtype, theirs in out["dense_us"].items()},
        "gbps": nbytes / us / 1e3,
        "bandwidth_fraction": best.fraction(nbytes, us),
    }


def bench_kernel(
    fmt: Format,
    shape: tuple[int, int],
    *,
    m: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """Check and time one linear of a format against dense ones.

    Args:
        fmt: what is stored.
        shape: n and k.
        m: rows of x.
        threads: of torch and the kernels; by default as many as they use.
        device: where.
        dtype: of x on the packed side; by default float32 on a CPU and float16 elsewhere.
        backend: see `dispatch.choose`.

    Returns:
        See `measure`; also `threads` and `roofs`.

    Raises:
        BackendError: the backend can't run here, or what it computes is wrong.
        UsageError: there is no such dtype.
    """
    dtype = dtype or ("float32" if device == "cpu" else "float16")
    if dtype not in TOLERANCE:
        raise UsageError(f"--dtype {dtype!r}: expected {', '.join(TOLERANCE)}.")
    with use_threads(threads) as count:
        best = roofs(device)
        (found,) = measure(LinearSpec(fmt), shape, Setting(device, dtype, backend, (m,)), best)
    if "failed" in found:
        raise BackendError(
            f"{fmt.name}, {shape[0]} x {shape[1]}, m = {m}, path {found['path']!r}: the result is not that of the "
            f"reference, so it was not timed: {found['failed']}. Use --backend reference."
        )
    return {**found, "threads": count, "roofs": best.to_json()}
