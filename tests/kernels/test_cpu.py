"""Products of few rows with packed weights on a CPU: right for every width, group, shape and odd input."""

import copy

import pytest
import torch

from qexport import plugins
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.kernels.cpu import base
from qexport.runtime.linear import QuantLinear
from tests.kernels.cases import Case, build, expected

pytest.importorskip("numba")
_laid_out = pytest.importorskip("qexport.kernels.cpu._laid_out")

TOLERANCE = 2e-6  # largest error over largest value
CASES = [
    *(Case("uniform", {"bits": b, "group_size": 64}, n=70, k=331, m=m) for b in range(2, 9) for m in (1, 3)),
    *(Case("uniform", {"bits": 4, "group_size": g, "symmetric": s}, k=261) for s in (True, False)
      for g in (-1, 8, 9, 12, 16, 17, 32, 48, 100, 128)),
    *(Case("uniform", {"bits": 4, "group_size": 64}, n=n, k=k) for n, k in ((1, 1), (1, 33), (64, 31), (130, 1030))),
    *(Case("sdr", {"bits": b, "group_size": g}, k=130) for b, g in ((4, 16), (4, 8), (3, 32))),
    Case("sdr", {"bits": 4, "base_bits": 16, "sign_magnitude": True}, n=21, k=130),
    *(Case("spqr", {"bits": 3, "group_size": g, "stats_group": r}, n=n, k=135, m=2) for g in (16, 32)
      for r in (16, 5) for n in (35, 64)),
    *(Case("bcq", {"bits": b, "group_size": 64}, n=70, k=331, m=m) for b in (1, 3, 4, 5, 8) for m in (1, 3)),
    *(Case("bcq", {"bits": 3, "group_size": g, "offset": o}, k=261) for g in (-1, 8, 12, 16, 100)
      for o in ("none", "same")),
    *(Case("bcq", {"bits": 4, "group_size": 32, "offset": o, "scale_dtype": d}, n=33, k=70)
      for d, o in (("float32", "float32"), ("bfloat16", "none"))),
    *(Case("bcq", {"bits": b, "group_size": -1}, n=n, k=k, m=2) for b, n, k in ((2, 1, 1), (4, 17, 3), (3, 33, 2100))),
    *(Case("fp_asym", {"code": c, "group_size": 64, "two_scales": t}, n=70, k=331, m=m)
      for c in ("fp4", "fp3", "nf4", "nf3") for t in (True, False) for m in (1, 3)),
    *(Case("fp_asym", {"group_size": g, "two_scales": t}, k=261) for g in (-1, 8, 12, 16, 100, 128)
      for t in (True, False)),
    *(Case("fp_asym", {"code": "fp4", "group_size": -1}, n=n, k=k, m=2) for n, k in ((1, 1), (32, 5), (33, 1030))),
    *(Case("vector", {"vector_length": v, "index_bits": b}, n=70, k=331, m=m) for m in (1, 3)
      for v, b in ((1, 4), (3, 8), (4, 9), (6, 12), (7, 16), (8, 16), (12, 12))),
    Case("vector", {"vector_length": 6, "index_bits": 12}, n=70, k=331, m=8),
    *(Case("vector", {"vector_length": v, "index_bits": 7, "residual_bits": r, "group_size": g, "scale_dtype": d},
           k=261) for v, r, d in ((6, 0, "bfloat16"), (4, 9, "float16"), (12, 3, "float16"))
      for g in (-1, 8, 12, 16, 100, 128)),
    *(Case("vector", {"vector_length": 6, "index_bits": 7, "normalize": z, "outlier_columns": c, "residual_bits": r},
           m=3) for z in (True, False) for c in (0, 1, 9) for r in (0, 5)),
    *(Case("vector", {"outlier_columns": 2}, n=n, k=k, m=2) for n, k in ((1, 1), (48, 5), (49, 1030))),
]  # fmt: skip
REST = [  # what has loops compiled for itself, beyond one a width
    *(Case("uniform", {"bits": 3, "group_size": g}, k=261, m=2) for g in (8, 16, 32)),
    *(Case("bcq", {"bits": 4, "group_size": 32, "offset": o, "scale_dtype": d}, n=33, k=70)
      for d, o in (("float32", "none"), ("bfloat16", "float32"))),
    *(Case("vector", {"vector_length": v, "index_bits": b}, n=70, k=331, m=m) for m in (1, 3)
      for v, b in ((2, 5), (5, 1), (7, 10), (16, 6))),
    *(Case("vector", {"vector_length": 12, "index_bits": 7, "residual_bits": 3, "group_size": g,
                      "scale_dtype": "bfloat16"}, k=261) for g in (-1, 16, 100)),
]  # fmt: skip
# One for each file of loops, and formats that share them in the same width.
THREADS = [
    *(Case(name, {"bits": 4, "group_size": 32}, n=70, k=135, m=2) for name in ("uniform", "sdr", "spqr")),
    Case("bcq", {"bits": 3, "group_size": 64}, n=70, k=331, m=3),
    Case("fp_asym", {"group_size": 64}, n=70, k=331, m=3),
    Case("vector", {"vector_length": 6, "index_bits": 12}, n=70, k=331, m=8),
]


def gates(cases):
    """For `make gates` only."""
    return [pytest.param(case, marks=pytest.mark.gates) for case in cases]


def needs(case: Case) -> None:
    """Skip what this processor lacks the instructions for, with the kernel's own reason."""
    fmt, kernel = plugins.get("formats", case.format)(**case.options), plugins.get("kernels.cpu", case.format)
    reason = kernel.supports(fmt, case.n, case.k)
    if reason and reason.startswith("this processor lacks"):
        pytest.skip(reason)
    assert reason is None


def weight_of(case: Case):
    """The case, its weight as the kernel holds it, and x float32."""
    needs(case)
    p = build(case)
    return p, plugins.get("kernels.cpu", case.format).prepare(p.fmt, p.packed, case.n, case.k)


def error_of(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("case", [*CASES, *gates(REST)], ids=str)
def test_product_is_that_of_the_decoded_matrix(case):
    p, weight = weight_of(case)
    y = weight.product(p.x)
    assert y.shape == (case.m, case.n)
    assert error_of(y, expected(p, case.n, case.k)) <= TOLERANCE
    assert torch.equal(weight.product(p.x), y)


@pytest.mark.parametrize("case", [*THREADS, *gates([*CASES, *REST][::7])], ids=str)
def test_all_threads_give_what_one_gives(case, monkeypatch):
    p, weight = weight_of(case)
    alone = weight.product(p.x)
    monkeypatch.setattr(_laid_out, "many", lambda *_: True)
    assert torch.equal(weight.product(p.x), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["uniform", "bcq", "vector"])
def test_rows_of_16_bits_are_read_and_rounded_as_torch_does(name, dtype):
    p, weight = weight_of(Case(name, {"group_size": 16}, n=40, k=130, m=7))
    x = p.x.to(dtype)
    x[1] *= 1e-6  # as float16 below its normal numbers, x and y
    x[2] *= 3e3  # and with results beyond its largest one
    x[3, 5], x[4, 5], x[5, 5], x[6] = float("nan"), float("inf"), -float("inf"), 0
    wanted = weight.product(x.float()).to(dtype)
    assert dtype is torch.bfloat16 or torch.isinf(wanted[2]).any()
    assert torch.equal(weight.product(x).nan_to_num(7), wanted.nan_to_num(7))


def test_copies_read_arrays_of_their_own():
    p, weight = weight_of(Case("uniform", {"bits": 4, "group_size": 64}, n=8, k=64))
    before = weight.product(p.x)
    twin = copy.deepcopy(weight)
    weight.codes[:] = 0
    assert torch.equal(twin.product(p.x), before)


@pytest.mark.parametrize("name", ["uniform", "sdr", "spqr", "bcq", "fp_asym", "vector"])
def test_odd_rows_are_what_floats_make_of_them(name):
    case = Case(name, {"group_size": 16}, n=40, k=130, m=6)
    p, weight = weight_of(case)
    x = p.x.clone()
    x[0] = 0
    x[1] *= 1e-36
    x[2] *= 1e30
    x[3, 7] = 1e4  # hides its neighbours' last bits, and nobody else's
    x[4, 3] = float("nan")
    x[5, 3] = float("inf")
    y = weight.product(x)
    wanted = expected(p.__class__(**{**p.__dict__, "x": x}), case.n, case.k)
    assert torch.equal(y[0], torch.zeros(case.n))
    assert float(y[1].abs().max()) <= 1e-31  # less than 1e-31 may count as 0
    for row in (2, 3):
        assert error_of(y[row], wanted[row]) <= TOLERANCE
    assert not torch.isfinite(y[4]).any()
    assert not torch.isfinite(y[5]).any()


def module_of(case: Case, dtype: torch.dtype, backend: str, **steps: bool):
    """The case as a module, and x."""
    p = build(case)
    spec = LinearSpec(p.fmt, InputSpec(**steps))
    own = {"input_perm": p.perm.to(torch.uint16)} if steps.get("permute") else {}
    own |= {"input_scale": p.scale} if steps.get("scale") else {}
    module = QuantLinear(spec, case.n, case.k, bias=True, dtype=dtype, device="cpu", backend=backend)
    module.load_state_dict({**p.packed, **own, "bias": torch.linspace(-1, 1, case.n).to(dtype)})
    return module, p.x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 1, 1)])
def test_a_linear_uses_it_for_few_rows(dtype, shape):
    case = Case("uniform", {"bits": 4, "group_size": 64}, n=37, k=96, m=6, perm=True, scale=True)
    needs(case)
    (fast, x), (slow, _) = (module_of(case, dtype, b, permute=True, scale=True) for b in ("auto", "reference"))
    assert (fast.choice.path, slow.choice.path) == ("cpu", "reference")
    x = x[: torch.Size(shape).numel()].reshape(*shape, case.k)
    with torch.inference_mode():
        got, wanted = fast(x), slow(x)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert (
        error_of(got, wanted.double()) <= {torch.float32: TOLERANCE, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    )


def test_many_rows_and_gradients_take_the_decoded_weight():
    case = Case("uniform", {"bits": 4, "group_size": 64}, n=8, k=64, m=base.FEW + 1)
    (fast, x), (slow, _) = (module_of(case, torch.float32, b) for b in ("auto", "reference"))
    assert torch.equal(fast(x), slow(x))
    x = x[:2].requires_grad_()
    y = fast(x)
    assert torch.equal(y, slow(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, slow.weight.sum(0).expand(2, -1))
    assert fast(x[:0]).shape == (0, 8)


def test_a_changed_weight_is_laid_out_anew():
    case = Case("uniform", {"bits": 4, "group_size": 64}, n=8, k=64)
    module, x = module_of(case, torch.float32, "auto")
    before = module(x)
    module.load_state_dict({**module.state_dict(), "scales": module.scales * 2})
    assert torch.allclose(module(x) - module.bias, 2 * (before - module.bias), rtol=1e-5)
