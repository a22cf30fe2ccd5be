"""Weights decoded on a CPU by loops: to the bit what the format decodes, in every dtype and order."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qexport import plugins, schema
from qexport.formats.base import dequantize
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.runtime import decoding
from qexport.runtime.dispatch import decoder_of
from qexport.runtime.experts import PackedView
from qexport.runtime.linear import QuantLinear
from tests.kernels.cases import Case, build

pytest.importorskip("numba")

SIZES = ((-1, 300), (1, 33), (8, 72), (16, 261), (17, 261), (64, 300), (100, 331), (128, 31))  # group, columns
CASES = [
    *(Case("uniform", {"bits": b, "group_size": 64}, k=k) for b in range(2, 9) for k in (1, 64, 331)),
    *(Case("uniform", {"bits": 4, "group_size": g, "symmetric": s, "scale_dtype": d}, k=k)
      for g, k in SIZES for s, d in ((True, "bfloat16"), (False, "float16"))),
    *(Case("sdr", {"bits": b, "group_size": g, "sign_magnitude": s}, k=k) for b, g, k, s in (
        (2, 16, 331, False), (3, 32, 261, True), (4, 16, 300, False), (4, 17, 261, True), (5, -1, 130, False),
        (6, 8, 72, True), (7, 1, 33, False), (8, 100, 331, True))),
    *(Case("sdr", {"bits": b, "base_bits": 16, "group_size": 16}, k=130) for b in (4, 8)),
    *(Case("spqr", {"bits": b, "scale_bits": 9 - b, "zero_bits": b - 1, "stats_group": r}, k=261)
      for b in range(2, 9) for r in (16, 5)),
    *(Case("spqr", {"bits": 3, "group_size": g, "scale_dtype": "bfloat16"}, k=k) for g, k in SIZES if k > 64),
    *(Case("bcq", {"bits": b, "group_size": 64, "scale_dtype": d}, k=k)
      for b, d in zip(range(1, 9), ("float16", "bfloat16", "float32") * 3, strict=False) for k in (1, 64, 331)),
    *(Case("bcq", {"bits": 3, "group_size": g, "offset": o}, k=k) for g, k in SIZES for o in ("none", "float32")),
    *(Case("fp_asym", {"code": c, "group_size": g, "two_scales": t, "scale_dtype": d}, k=k)
      for (g, k), d in zip(SIZES, ("float16", "bfloat16") * 4, strict=True) for c in ("fp4", "fp3", "nf4", "nf3")
      for t in (True, False)),
    *(Case("vector", {"vector_length": v, "index_bits": b}, k=k) for k in (1, 331)
      for v, b in ((1, 4), (2, 5), (3, 8), (4, 9), (5, 1), (6, 12), (8, 16), (17, 8), (32, 3))),
    *(Case("vector", {"vector_length": v, "index_bits": 7, "residual_bits": r, "group_size": g, "normalize": z,
                      "outlier_columns": c, "scale_dtype": d}, k=k) for g, k in SIZES for v, r, z, c, d in (
        (6, 0, False, 0, "bfloat16"), (5, 9, True, 3, "float16"), (12, 3, False, 1, "bfloat16"))),
]  # fmt: skip
FIRST = [next(case for case in CASES if case.format == name) for name in plugins.names("kernels.decode")]


def bits_of(x: Tensor) -> Tensor:
    """x as integers, so that zeros of either sign differ."""
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def equal(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(bits_of(got), bits_of(wanted))


def spec_of(case: Case, **steps: bool) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The case with steps of the input, and all its stored tensors."""
    p = build(replace(case, perm=True, scale=True))
    own = {"input_perm": p.perm.to(torch.uint16)} if steps.get("permute") else {}
    own |= {"input_scale": p.scale} if steps.get("scale") else {}
    spec = LinearSpec(p.fmt, InputSpec(**steps))
    if steps.get("hadamard"):
        own |= InputSpec(hadamard=True).pack({"signs": torch.linspace(-1, 1, case.k)})
    return spec, {**p.packed, **own}


def rows_of(case: Case, packed: dict[str, Tensor], first: int, count: int) -> Tensor:
    fmt = plugins.get("formats", case.format)(**case.options)
    out = torch.empty(count, case.k)
    plugins.get("kernels.decode", case.format).rows(fmt, packed, case.n, case.k)(first, out)
    return out


def test_every_format_of_codes_has_loops():
    assert set(plugins.names("kernels.decode")) == set(plugins.names("kernels.cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_the_format(case):
    p = build(case)
    wanted = dequantize(p.fmt, p.packed, case.n, case.k)
    assert equal(rows_of(case, p.packed, 0, case.n), wanted)
    assert equal(rows_of(case, p.packed, 11, 9), wanted[11:20])


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_all_threads_write_what_one_writes(case, monkeypatch):
    from qexport.kernels.decode import _rows

    p = build(case)
    alone = rows_of(case, p.packed, 3, 30)
    monkeypatch.setattr(_rows, "many", lambda *_: True)
    assert equal(rows_of(case, p.packed, 3, 30), alone)


@pytest.mark.parametrize("factor", [1e-7, 6e4, float("inf"), float("nan")])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_the_smallest_and_the_largest_parameters(case, factor):
    """float16's subnormal numbers, its largest, and what no checkpoint may have but a buffer can."""
    p = build(case)
    packed = {
        name: t if not t.is_floating_point() else (t.float() * factor).to(t.dtype) for name, t in p.packed.items()
    }
    got, wanted = rows_of(case, packed, 0, case.n), dequantize(p.fmt, packed, case.n, case.k)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "steps", [{}, {"permute": True}, {"scale": True, "permute": True}, {"scale": True, "hadamard": True}]
)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_weight_is_that_of_the_spec_in_every_dtype_and_order(case, steps, dtype, transposed, monkeypatch):
    spec, packed = spec_of(case, **steps)
    wanted = spec.decoded(packed, case.n, case.k).to(dtype)
    monkeypatch.setattr(decoding, "_AT_ONCE", 7 * case.k)  # rows come in several parts, the last a shorter one
    got = decoding.decoded(spec, packed, case.n, case.k, dtype, transposed=transposed)
    assert got.is_contiguous()
    assert equal(got, wanted.T if transposed else wanted)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_neither_the_default_dtype_nor_the_default_device_matters(case):
    spec, packed = spec_of(case)
    wanted = spec.decoded(packed, case.n, case.k)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = [decoding.decoded(spec, packed, case.n, case.k, dtype) for dtype in (torch.float32, torch.float16)]
    finally:
        torch.set_default_dtype(before)
    assert equal(found[0], wanted)
    assert equal(found[1], wanted.half())


def test_a_large_weight_takes_large_pages(monkeypatch):
    spec, packed = spec_of(FIRST[0])
    wanted = spec.decoded(packed, FIRST[0].n, FIRST[0].k)
    monkeypatch.setattr(decoding, "_LARGE", 1)
    got = decoding.decoded(spec, packed, FIRST[0].n, FIRST[0].k, torch.float32)
    assert equal(got, wanted)
    assert equal(got.add_(1), wanted + 1)


def module_of(case: Case, backend: str, dtype: torch.dtype, transposed: bool = False) -> QuantLinear:
    spec, packed = spec_of(case, permute=True)
    module = QuantLinear(
        spec, case.n, case.k, dtype=dtype, device="cpu", backend=backend, transposed=transposed,
        extents=schema.extents_of(packed, spec.layout(case.n, case.k)),
    )  # fmt: skip
    module.load_state_dict(packed)
    return module


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_linear_gives_many_rows_what_the_reference_gives_them(case, dtype, transposed):
    x = torch.randn(40, case.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    fast, slow = (module_of(case, backend, dtype, transposed) for backend in ("auto", "reference"))
    assert torch.equal(fast(x), slow(x))
    assert torch.equal(fast.weight, slow.weight)


class Refusal:
    """Loops that must not run."""

    def rows(self, *_):
        raise AssertionError("the format was to decode")


def test_loops_run_unless_the_reference_is_asked_for(monkeypatch):
    case = FIRST[0]
    fast, slow = (module_of(case, backend, torch.float32) for backend in ("auto", "reference"))
    monkeypatch.setattr(decoding, "decoder_of", lambda _: Refusal())
    assert slow.weight.shape == (case.n, case.k)
    with pytest.raises(AssertionError, match="was to decode"):
        _ = fast.weight


def test_without_numba_the_format_decodes(monkeypatch):
    case = FIRST[0]
    spec, packed = spec_of(case)
    get = plugins.get

    def missing(kind: str, name: str):
        if kind == "kernels.decode":
            raise ImportError("numba")
        return get(kind, name)

    monkeypatch.setattr(plugins, "get", missing)
    decoder_of.cache_clear()
    try:
        got = decoding.decoded(spec, packed, case.n, case.k, torch.float32)
    finally:
        decoder_of.cache_clear()
    assert equal(got, spec.decoded(packed, case.n, case.k))


def test_a_compiled_graph_has_the_formats_operations():
    module = module_of(FIRST[0], "auto", torch.float32)
    x = torch.randn(40, FIRST[0].k, generator=torch.Generator().manual_seed(1))
    assert module.choice.path in ("cpu", "reference")  # chosen when a model is loaded, ahead of any compiler
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_an_expert_is_decoded_alike():
    spec, packed = spec_of(FIRST[0])
    view = PackedView(spec, FIRST[0].n, FIRST[0].k, device="cpu")
    view.load_state_dict(packed)
    assert equal(view(torch.float16, True), spec.decoded(packed, FIRST[0].n, FIRST[0].k).half().T)
