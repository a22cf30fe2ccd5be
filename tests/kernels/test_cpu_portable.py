"""Few rows of x on a CPU of any kind: rows of the weight are decoded and multiplied while a cache has them."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qexport import plugins
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.kernels.cpu import base
from qexport.runtime import dispatch
from qexport.runtime.dispatch import choose
from qexport.runtime.linear import QuantLinear
from tests.kernels.cases import Case, Problem, build, expected

pytest.importorskip("numba")
_rows = pytest.importorskip("qexport.kernels.decode._rows")

TOLERANCE = 2e-6  # largest error over largest value
CASES = [
    *(Case("uniform", {"bits": b, "group_size": 64}, n=70, k=331, m=m) for b in range(2, 9) for m in (1, 3)),
    *(Case("uniform", {"bits": 4, "group_size": g, "symmetric": s}, k=261) for s in (True, False)
      for g in (-1, 4, 8, 9, 17, 32, 100)),
    *(Case("uniform", {"bits": 4, "group_size": 64}, n=n, k=k, m=m) for n, k, m in (
        (1, 1, 1), (1, 33, 2), (3, 31, 32), (130, 1030, 5), (66, 1024, 1))),
    *(Case("sdr", {"bits": b, "group_size": g}, k=130, m=2) for b, g in ((4, 16), (3, 32), (7, 8))),
    *(Case("spqr", {"bits": 3, "group_size": g, "stats_group": r}, n=35, k=135, m=2) for g, r in ((16, 16), (32, 5))),
    *(Case("bcq", {"bits": b, "group_size": 64}, n=70, k=331, m=m) for b in (1, 3, 4, 8) for m in (1, 3)),
    *(Case("bcq", {"bits": 3, "group_size": g, "offset": o}, k=261)
      for g in (-1, 8, 12, 100) for o in ("none", "same")),
    *(Case("fp_asym", {"code": c, "group_size": 64, "two_scales": t}, n=70, k=331, m=3)
      for c in ("fp4", "fp3", "nf4", "nf3") for t in (True, False)),
    *(Case("vector", {"vector_length": v, "index_bits": b}, n=70, k=331, m=m) for m in (1, 3)
      for v, b in ((1, 4), (3, 8), (6, 12), (8, 16), (12, 12), (17, 6))),
    *(Case("vector", {"vector_length": 6, "index_bits": 7, "residual_bits": r, "group_size": g, "outlier_columns": 3},
           k=261, m=2) for r, g in ((0, 16), (9, 100))),
]  # fmt: skip
FIRST = [next(case for case in CASES if case.format == name) for name in plugins.names("kernels.decode")]


def rows_of(case: Case) -> tuple[Problem, base.Weight]:
    """The case, and its weight as what decodes rows."""
    p = build(case)
    return p, plugins.get("kernels.decode", case.format).rows(p.fmt, p.packed, case.n, case.k)


def error_of(got: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def test_every_format_has_a_case():
    assert {case.format for case in CASES} == set(plugins.names("kernels.cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_is_that_of_the_decoded_matrix(case):
    p, weight = rows_of(case)
    y = weight.product(p.x)
    assert y.shape == (case.m, case.n)
    assert error_of(y, expected(p, case.n, case.k)) <= TOLERANCE


@pytest.mark.parametrize("m", [2, 5, 32])
def test_a_row_is_what_it_is_alone(m):
    p, weight = rows_of(Case("uniform", {"bits": 3, "group_size": 64}, n=70, k=1331, m=m))
    assert torch.equal(weight.product(p.x), torch.cat([weight.product(row) for row in p.x.split(1)]))


@pytest.mark.parametrize("case", [
    Case("uniform", {"bits": 4, "group_size": 64}, n=300, k=331, m=3),
    Case("vector", {"vector_length": 6, "index_bits": 7}, n=300, k=331, m=3),
], ids=str)  # fmt: skip
def test_all_threads_give_what_one_gives(case, monkeypatch):
    p, weight = rows_of(case)
    alone = weight.product(p.x)
    monkeypatch.setattr(_rows, "many", lambda *_: True)
    assert torch.equal(weight.product(p.x), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_16_bits_are_rounded_once(dtype):
    p, weight = rows_of(Case("uniform", {"bits": 4, "group_size": 64}, n=40, k=130, m=4))
    x = p.x.to(dtype)
    assert torch.equal(weight.product(x), weight.product(x.float()).to(dtype))


def test_a_row_that_is_not_finite_stays_one_row():
    p, weight = rows_of(Case("uniform", {"bits": 4, "group_size": 64}, n=37, k=130, m=4))
    before, x = weight.product(p.x), p.x.clone()
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = weight.product(x)
    assert not torch.isfinite(y[1:3]).any()
    assert torch.equal(y[::3], before[::3])


def linear_of(case: Case, backend: str) -> QuantLinear:
    """The case as a module."""
    p = build(case)
    module = QuantLinear(LinearSpec(p.fmt), case.n, case.k, dtype=torch.float32, device="cpu", backend=backend)
    module.load_state_dict(p.packed)
    return module


def without(monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    """Make a processor that lacks what the kernels of all formats need."""

    class Lacking:
        def supports(self, *_):
            return obstacle

    monkeypatch.setattr(dispatch, "cpu_kernel_of", lambda _: Lacking())


def test_a_linear_takes_it_where_the_kernel_can_not_run(monkeypatch):
    without(monkeypatch, "this processor lacks it")
    case = Case("uniform", {"bits": 4, "group_size": 64}, n=37, k=96)
    fast, slow = (linear_of(case, backend) for backend in ("auto", "reference"))
    assert fast.choice.path == "cpu"
    assert "rows of 'uniform' decoded one after the other, because this processor lacks it" in fast.choice.reason
    x = torch.randn(base.FEW + 1, case.k, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        assert error_of(fast(x[:3]), slow(x[:3]).double()) <= TOLERANCE
        assert torch.equal(fast(x), slow(x))  # too many, so whole weights met both
    assert torch.equal(fast(x[:2]), slow(x[:2]))  # gradients are for the whole weight, too


@pytest.mark.parametrize(("name", "options", "k", "reason"), [
    ("uniform", {"group_size": 4}, 64, "groups of 4 columns"),
    ("bcq", {"group_size": 2}, 64, "groups of 2 columns"),
    ("fp_asym", {"group_size": 7}, 64, "groups of 7 columns"),
    ("vector", {"vector_length": 17, "index_bits": 8}, 64, "vectors of 17 rows"),
    ("uniform", {"group_size": -1}, 70000, "up to 65536"),
])  # fmt: skip
def test_what_a_kernel_does_not_read_is_said(name, options, k, reason):
    found = choose(LinearSpec(plugins.get("formats", name)(**options), InputSpec()), 64, k, "cpu", "cpu")
    assert found.path == "cpu"
    assert reason in found.reason


@pytest.mark.parametrize(("file", "name"), [
    ("_codes", "uniform"), ("_tables", "bcq"), ("_tables", "fp_asym"), ("vector", "vector"),
])  # fmt: skip
def test_a_processor_without_the_instruction_decodes_rows(file, name, monkeypatch):
    module = __import__(f"qexport.kernels.cpu.{file}", fromlist=["fast"])
    monkeypatch.setattr(module, "fast", lambda: False)
    found = choose(LinearSpec(plugins.get("formats", name)(), InputSpec()), 64, 64, "cpu")
    assert found.path == "cpu"
    assert "decoded one after the other, because this processor lacks AVX-512" in found.reason


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="this processor has no AVX2",
)
def test_code_for_a_processor_of_avx2_gives_the_same(tmp_path):
    case = Case("uniform", {"bits": 5, "group_size": 16}, n=37, k=131, m=3)
    script = (
        "import sys, torch; from tests.kernels.cases import Case; from tests.kernels.test_cpu_portable import *; "
        f"m = linear_of({case!r}, 'auto'); print(m.choice.reason); "
        f"torch.save(m(build({case!r}).x), sys.argv[1])"
    )
    own = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+popcnt,+sse4.2"}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "y.pt")], env={**os.environ, **own}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "because this processor lacks AVX-512 VNNI" in run.stdout
    p, weight = rows_of(case)
    got = torch.load(tmp_path / "y.pt")
    assert torch.equal(got, weight.product(p.x))
    assert error_of(got, expected(p, case.n, case.k)) <= TOLERANCE
