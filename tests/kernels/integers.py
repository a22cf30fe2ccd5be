"""Random linears whose input is rounded, and what their kernels are held against: `kernels._integers.product`.

Runs in the worker under Triton's interpreter, or in the tests' own process on a GPU. What is expected is always
computed on the processor.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from qexport import plugins
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.inputs.base import Codes, make_input
from qexport.kernels import _int_gemm
from qexport.kernels._integers import exact, prepare, product
from tests.kernels.cases import fields_of


@dataclass(frozen=True)
class Product:
    """One product to try.

    Attributes:
        unit: all scales are 1 and x are integers, so that float32 results are the integers of the accumulators.
        beyond: calibration saw a tenth of x, so that a static scale saturates.
        broken: the last row has a NaN, and must come out as NaN; what is said of the result is said of the others.
        spoil: a tensor of the repacked weight of which a value is changed.
    """

    input: dict[str, Any]
    options: dict[str, Any]
    format: str = "uniform"
    n: int = 17
    k: int = 100
    m: int = 3
    dtype: str = "float32"
    steps: tuple[str, ...] = ()
    unit: bool = False
    beyond: bool = False
    broken: bool = False
    config: tuple[int, ...] | None = None
    spoil: int | None = None

    def __str__(self) -> str:
        spell = lambda options: "-".join(v if k == "name" else f"{k}{v}" for k, v in options.items())  # noqa: E731
        told = ("unit" * self.unit, "beyond" * self.beyond, "broken" * self.broken)
        flags = "".join(f"-{name}" for name in (*self.steps, *told) if name)
        config = "" if self.config is None else "-" + "x".join(map(str, self.config))
        shape = f"n{self.n}-k{self.k}-m{self.m}-{self.dtype}{flags}{config}"
        return f"{spell(self.input)}-{self.format}-{spell(self.options)}-{shape}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def spec_of(case: Product) -> LinearSpec:
    """The linear of a case."""
    options = {name: value for name, value in case.input.items() if name != "name"}
    fmt = plugins.get("formats", case.format)(**case.options)
    quant = make_input(case.input["name"], options)
    return LinearSpec(fmt, InputSpec(**dict.fromkeys(case.steps, True), quant=quant))


def build(case: Product) -> tuple[LinearSpec, dict[str, Tensor], Tensor]:
    """Spec, stored tensors and x of a case, the same ones every time; the first of several rows is 0."""
    rng = torch.Generator().manual_seed(0)
    spec, quant = spec_of(case), spec_of(case).input.quant
    fields = fields_of(spec.weight, case.n, case.k, rng)
    x = torch.randn(case.m, case.k, generator=rng)
    x[:, ::29] *= 8
    if case.unit:
        fields["scales"] = torch.ones_like(fields["scales"])
        x = torch.randint(-20, 236, x.shape, generator=rng).float()
        low, high = (-20, 235) if not getattr(quant, "symmetric", True) else (-127, 127)
        x = x.clamp(low, high)
        x[:, 0], x[:, -1] = low, high
    if case.m > 1:
        x[0] = 0
    if case.broken:
        x[-1, case.k // 2] = torch.nan
    x = x.to(getattr(torch, case.dtype))
    values = {
        "scale": torch.rand(case.k, generator=rng) + 0.5,
        "perm": torch.randperm(case.k, generator=rng),
        "signs": torch.randint(0, 2, (case.k,), generator=rng).float() * 2 - 1,
    }
    packed = spec.weight.pack(fields)
    bare = LinearSpec(spec.weight, InputSpec(**dict.fromkeys(case.steps, True)))
    seen = bare.input.prepared(x.float() * (0.1 if case.beyond else 1), bare.input.pack(values))
    values |= quant.calibrate(*seen.nan_to_num(0).aminmax(dim=0))
    if case.unit and "quant_scale" in values:
        values["quant_scale"] = torch.ones(1)
    packed |= spec.input.pack(values)
    return spec, packed, x


@contextmanager
def poisoned():
    """Buffers are made of NaN, or of large integers."""
    made: list[Tensor] = []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(make):
        def keep(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type != "meta" and not kwargs.get("pin_memory"):
                out.fill_(float("nan")) if out.is_floating_point() else out.fill_(113)
            made.append(out)
            return out

        return keep

    torch.empty, torch.Tensor.new_empty = poison(empty), poison(new_empty)
    try:
        yield made
    finally:
        torch.empty, torch.Tensor.new_empty = empty, new_empty


def _same_codes(launch: Any, codes: Codes, k: int) -> bool:
    """Whether a launch of `_encode` has stored these codes, scales and zeros, and zeros to fill up."""
    made, scales, zeros = (None if t is None else t.cpu() for t in launch.args[6:9])
    planes = [codes.codes] if codes.high is None else [codes.codes, codes.high]
    same = torch.equal(made[:, :, :k], torch.stack(planes)) and not made[:, :, k:].any()
    same = same and torch.equal(scales, codes.scales.reshape(-1).contiguous())
    return (
        same and (zeros is None) == (codes.zeros is None) and (zeros is None or torch.equal(zeros, codes.zeros[:, 0]))
    )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process."""
    from tests.kernels.worker import Watch, _watched

    case = Product(**{**request, "steps": tuple(request["steps"])})
    spec, packed, x = build(case)
    n, k = case.n, case.k
    interpreted = triton.knobs.runtime.interpret
    device = "cpu" if interpreted else "cuda"
    there, x = {name: t.to(device) for name, t in packed.items()}, x.to(device)
    flat = spec.input.prepared(x, there).cpu()  # rotations add in an order of the device
    codes = spec.input.quant.encode(flat, packed)
    ref = product(codes, flat, prepare(spec.weight.integers(packed, n, k)), exact)
    packed = there
    weights = _int_gemm.repack(spec, packed, n, k)
    if case.spoil is not None:
        weights[case.spoil].view(-1)[0] += 2
    config = None if case.config is None else _int_gemm.Config(*case.config)
    with poisoned() as made:
        y = torch.empty((case.m, n), dtype=x.dtype, device=device)
        launches = _int_gemm.launches(spec, x, weights, packed, y, config=config)
    given = [arg for launch in launches for arg in launch.args if isinstance(arg, Tensor)]
    watch = Watch(weights, [*given, *made])
    for watch.launch, launch in enumerate(launches):
        _watched(launch.run, watch) if interpreted else launch.run()
    again = _int_gemm.linear(spec, x, weights, packed, n, k, config=config)
    y, ref = y.cpu(), ref.to(torch.float32)
    whole = y.isnan().all(1) if case.broken else torch.zeros(case.m, dtype=torch.bool)
    if case.broken:
        y, ref = y[:-1], ref[:-1]
    error = (y.double() - ref.double()).abs().max() / ref.abs().max().clamp(min=1e-30)
    return {
        "error": float(error) if torch.isfinite(y).all() else None,
        "nan": int((~torch.isfinite(y)).sum()),
        "same": bool(torch.equal(again.cpu()[: y.shape[0]], y)),
        "exact": bool(torch.equal(y, ref.to(y.dtype))),
        "broken_rows": whole.nonzero().flatten().tolist(),
        "codes": case.broken or _same_codes(launches[0], codes, k),
        "saturated": float((codes.codes.abs() == 127).float().mean()),
        "outside": watch.outside,
        "largest": float(ref.abs().max()),
        "read_bits": 8 * watch.weight_bytes() / (n * k),
    }
