"""The three gates for kernels of linears whose input is rounded to integers.

On a machine with a GPU the products run there, otherwise under Triton's interpreter.
"""

import re

import pytest
import torch

from qexport.errors import BackendError
from qexport.kernels import _int_gemm
from tests.kernels import integers
from tests.kernels.cases import TOLERANCE
from tests.kernels.integers import Product, build, spec_of
from tests.kernels.offline import (
    TARGETS,
    Shape,
    compare,
    compile_launch,
    gate,
    launches_of,
    measure,
    report,
    traffic,
)

U4, U8 = {"bits": 4, "group_size": 64}, {"bits": 8, "group_size": -1, "symmetric": True}
INPUTS = {
    "token": {"name": "token"},
    "token4": {"name": "token", "bits": 4},
    "asym": {"name": "token", "symmetric": False},
    "tensor": {"name": "tensor"},
    "asym_tensor": {"name": "tensor", "symmetric": False, "bits": 6},
    "sdr": {"name": "sdr", "bits": 4},
    "sdr_token": {"name": "sdr", "static": False, "group_size": 32},
    "outliers": {"name": "outliers"},
    "static": {"name": "outliers", "static": True},
}
UNIT = [
    *(Product(INPUTS[name], U4, m=m, n=n, k=k, unit=True)
      for name in ("token", "asym", "tensor", "sdr")
      for m, n, k in ((1, 17, 64), (3, 33, 33))),
    *(Product(INPUTS[name], {"bits": bits, "group_size": 32}, m=2, n=17, k=70, unit=True)
      for bits in (2, 3, 4, 5, 8) for name in ("asym", "sdr")),
    Product(INPUTS["asym"], {"bits": 4, "group_size": 96}, m=2, n=3, k=200, unit=True),
    Product(INPUTS["token"], {"bits": 4, "group_size": 160}, m=2, n=3, k=170, unit=True),  # pairs with a loop
    Product(INPUTS["asym"], {"bits": 6, "group_size": -1}, m=1, n=3, k=700, unit=True),  # a row with a loop
    Product(INPUTS["asym"], {"bits": 4, "group_size": 640}, m=1, n=3, k=900, unit=True),  # the second group is cut off
    Product(INPUTS["sdr"], {"bits": 4}, format="sdr", m=3, n=17, k=33, unit=True),
]  # fmt: skip
SMALL = [
    *(Product(quant, options, m=m, n=n, k=k, steps=("scale", "permute"))
      for quant in INPUTS.values()
      for options, m, n, k in ((U4, 1, 33, 100), (U8, 3, 17, 130))),
    *(Product(INPUTS[name], {"bits": 4}, format="sdr", m=3, n=3, k=70) for name in ("token", "asym", "sdr")),
    *(Product(INPUTS[name], U4, m=m, n=1, k=33, dtype=dtype)
      for name, m, dtype in (("token", 17, "float16"), ("asym", 33, "bfloat16"))),
    *(Product(INPUTS[name], U4, m=3, k=64, beyond=True) for name in ("tensor", "asym_tensor", "sdr")),
    *(Product(INPUTS[name], U4, m=2, k=64, steps=("hadamard", "scale", "permute"))
      for name in ("asym", "sdr_token", "static", "outliers")),
    *(Product(INPUTS[name] | {"threshold": 1000.0}, U4, m=2, k=64) for name in ("static", "outliers")),  # none is
]  # fmt: skip
FULL = [
    *(Product(quant, {"bits": bits, "group_size": group, "symmetric": bits == 5}, m=2, n=17, k=261)
      for quant in INPUTS.values()
      for bits, group in ((2, 64), (3, 32), (4, 128), (4, 96), (4, -1), (5, 32), (7, 256), (8, 64))),
    *(Product(INPUTS["sdr"] | {"group_size": group, "bits": bits}, U8, m=2, n=3, k=100)
      for group in (1, 12, 100, 128) for bits in (2, 5, 8)),
    *(Product(INPUTS[name], U4, m=m, n=40, k=k, config=config)
      for name in ("asym", "sdr") for m, k in ((3, 256), (70, 100))
      for config in ((16, 16, 32, 2, 1), (16, 32, 64, 3, 4), (32, 32, 128, 3, 2), (64, 64, 128, 2, 1))),
    Product(INPUTS["asym"], {"bits": 8, "group_size": -1}, m=1, n=2, k=33000),  # two accumulators a row
    Product(INPUTS["token"], {"bits": 4, "group_size": -1}, m=1, n=2, k=33000),
]  # fmt: skip
READ = [
    Product(INPUTS["token"], {"bits": 4, "group_size": 128}, m=1, n=32, k=512),
    Product(INPUTS["asym"], {"bits": 4, "group_size": 128}, m=1, n=32, k=512),
    Product(INPUTS["token"], {"bits": 8, "group_size": -1}, m=2, n=32, k=512),
    Product(INPUTS["sdr"], {"bits": 4, "group_size": 64, "symmetric": True}, m=1, n=32, k=512),
]


@pytest.fixture(scope="module")
def ask(request):
    """What runs a case: this process where there is a GPU, otherwise the one that interprets."""
    if torch.cuda.is_available():
        return lambda case: integers.answer(case.to_json())
    worker = request.getfixturevalue("worker")
    return lambda case: worker.ask(case.to_json())


def _check(got, case: Product) -> None:
    assert got["codes"], "codes, scales or zeros of the input differ"
    assert got["nan"] == 0, f"{got['nan']} outputs were not written"
    assert got["error"] <= TOLERANCE[case.dtype]
    assert got["outside"] == 0, f"{got['outside']} addresses outside the tensors"
    assert got["same"], "two runs differ"


@pytest.mark.parametrize("case", UNIT, ids=str)
def test_accumulators_are_equal_bit_for_bit(ask, case):
    got = ask(case)
    _check(got, case)
    assert 0 < got["largest"] < 2**24, "such integers are not exact as float32"
    assert got["exact"]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernel_equals_the_product_of_integers(ask, case):
    got = ask(case)
    _check(got, case)
    if case.beyond and case.input["name"] == "tensor" and case.input.get("bits", 8) == 8:
        assert got["saturated"] > 0.1


@pytest.mark.parametrize("name", ["token", "asym", "tensor", "sdr", "outliers"])
def test_a_row_with_a_nan_comes_out_as_nan_and_no_other(ask, name):
    got = ask(Product(INPUTS[name], U4, broken=True))
    assert got["broken_rows"] == [2]
    assert got["nan"] == 0
    assert got["error"] <= TOLERANCE["float32"]


@pytest.mark.gates
@pytest.mark.parametrize("case", FULL, ids=str)
def test_kernel_equals_the_product_of_integers_in_every_configuration(ask, case):
    _check(ask(case), case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="loads are counted by the interpreter")
@pytest.mark.parametrize("case", READ, ids=str)
def test_programs_read_about_the_stored_bytes(ask, case):
    got, spec = ask(case), spec_of(case)
    stored = 8 * spec.nbytes(case.n, case.k) / (case.n * case.k)
    assert 0.9 * stored <= got["read_bits"] <= 1.1 * stored


@pytest.mark.parametrize(("spoil", "name"), [(0, "token"), (1, "token"), (2, "token"), (3, "asym")])
def test_equality_gate_catches_a_wrong_weight(ask, spoil, name):
    got = ask(Product(INPUTS[name], U4, m=1, k=64, unit=True, spoil=spoil))
    assert got["codes"]
    assert not got["exact"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Product(INPUTS["token"], {"bits": 4, "group_size": 48}), "groups of 48; multiples of 32 up to 32768"),
        (Product(INPUTS["token"], {"bits": 4, "group_size": 65536}), "groups of 65536"),
        (Product(INPUTS["sdr"] | {"group_size": 16384}, U8), "groups of 16384 of the input; up to 8192"),
        (Product(INPUTS["token"], {"bits": 4}, format="bcq"), "stores no integers"),
        (Product(INPUTS["token"], {"bits": 4, "base_bits": 16}, format="sdr"), "16 bits"),
        (Product(INPUTS["token"], U4), None),
    ],
)
def test_what_the_kernels_do_not_multiply_is_refused_with_a_reason(case, reason):
    found = _int_gemm.supports(spec_of(case), 4096, 4096)
    assert found is None if reason is None else reason in found


def test_cpu_tensors_without_interpreter_are_refused():
    case = Product(INPUTS["token"], U4)
    spec, packed, x = build(case)
    with pytest.raises(BackendError, match="choose backend 'reference'"):
        _int_gemm.linear(spec, x, _int_gemm.repack(spec, packed, case.n, case.k), packed, case.n, case.k)


@pytest.mark.parametrize("k", [1, 33, 576, 4096, 4100, 11008, 14336, 33000, 65536])
@pytest.mark.parametrize("group", [-1, 32, 64, 96, 128, 160, 640, 4096])
@pytest.mark.parametrize("bits", [4, 8])
def test_plan_covers_k_with_whole_tiles(k, group, bits):
    plan = _int_gemm.Plan.of(spec_of(Product(INPUTS["token"], {"bits": bits, "group_size": group})).weight, k)
    assert k <= plan.width <= plan.parts * plan.size
    assert plan.width % plan.tile == 0
    assert plan.width - k < max(128, 2 * plan.size if plan.pair else plan.size if not plan.long else 0)
    unroll = plan.unroll(4)
    assert (plan.steps if plan.long else plan.parts // (1 + plan.pair)) % unroll == 0


# ---- gates 2 and 3 ------------------------------------------------------------------------------------------------


def _shape(name: str, m: int = 1, k: int = 4096, weight: str = "uniform", n: int = 4096, **options) -> Shape:
    return Shape(weight, tuple(options.items()), m=m, n=n, k=k, input=tuple(INPUTS[name].items()))


EVERY = tuple(TARGETS)
FEW = [
    (_shape("token", bits=4), EVERY),
    (_shape("token", 16, bits=4), ("sm_90",)),
    *((_shape("token", m, bits=8, group_size=-1, symmetric=True), ("sm_90",)) for m in (1, 64)),
    *((_shape("token", bits=bits), ("sm_90",)) for bits in (2, 3, 5, 6, 7)),
    (_shape("sdr", bits=4), ("sm_90",)),
    (_shape("asym", 128, bits=4), ("sm_90",)),
]
REST = [
    *((shape, tuple(t for t in EVERY if t not in targets)) for shape, targets in FEW if targets != EVERY),
    *((_shape("token", m, bits=4), EVERY) for m in (32, 64, 128)),
    *((_shape("token", m, bits=4, symmetric=True), EVERY) for m in (1, 128)),
    *((_shape("asym", m, bits=4), EVERY) for m in (1, 32, 64)),
    *((_shape("token", m, bits=8, group_size=-1, symmetric=True), EVERY) for m in (32, 128)),
    *((_shape("token", m, bits=8), EVERY) for m in (1, 128)),
    *((_shape(name, m, bits=4, group_size=32), EVERY) for name in ("token", "sdr") for m in (1, 64)),
    *((_shape("sdr", m, bits=4), EVERY) for m in (32, 128)),
    *((_shape("sdr", m, weight="sdr", bits=4), EVERY) for m in (1, 64)),
    *((_shape(name, bits=4), EVERY) for name in ("tensor", "asym_tensor", "static", "sdr_token")),
    *((_shape("token", m, k=11008, bits=4), EVERY) for m in (1, 64)),
    (_shape("token", k=14336, bits=8, group_size=-1, symmetric=True), EVERY),
    *((_shape(name, n=1536, k=576, bits=4), EVERY) for name in ("token", "sdr")),
    (_shape("token", n=1536, k=576, bits=4, symmetric=True), EVERY),
]
ALL = [*FEW, *REST]
WHOLE = tuple(_shape(name, bits=4) for name in ("token", "tensor", "asym_tensor", "static", "sdr", "sdr_token", "asym"))
BLOCK_PER_THREAD = 16  # columns of 4096


def _pairs(cases):
    return [pytest.param(shape, target, id=f"{shape}-{target}") for shape, targets in cases for target in targets]


def _compile(shape: Shape, target: str) -> None:
    for kernel, found in measure(shape, target, shape in WHOLE).items():
        # Tiles of 64 rows and more have that many sums.
        roomy = 255 if target.startswith("sm_") and (kernel == "int_product" and shape.m >= 64) else None
        gate(found, kernel, whole_words=False, registers=roomy)
        compare(shape, target, kernel, found)


@pytest.mark.parametrize(("shape", "target"), _pairs(FEW))
def test_compiles_without_spills_and_with_wide_loads_and_matrix_instructions(shape, target):
    _compile(shape, target)


@pytest.mark.parametrize(("name", "options"), [("token", {"symmetric": True}), ("token", {}), ("sdr", {})])
def test_everything_that_choose_returns_is_compiled(name, options):
    planes, zeros = 1 + (name == "sdr"), not options.get("symmetric", False)
    own = [s for s, _ in ALL if s.input == _shape(name).input and dict(s.options).get("symmetric", False) != zeros]
    known = {_int_gemm.choose(s.m, s.n, s.k, planes=planes, zeros=zeros) for s in own}
    for n, k in ((4096, 4096), (14336, 4096), (1024, 4096), (1536, 576)):
        for m in range(1, 513):
            assert _int_gemm.choose(m, n, k, planes=planes, zeros=zeros) in known, (m, n, k)


@pytest.mark.gates
@pytest.mark.parametrize(("shape", "target"), _pairs(REST))
def test_compiles_so_in_every_configuration(shape, target):
    _compile(shape, target)


def _counted(shape: Shape) -> bool:
    """One tile of rows of x, and a width that the layout holds tightly.

    Two codes a byte take 4 bits each and one takes 8, whatever their width; sdr's are shifted to 8 bits. What fills 576
    columns up to whole tiles of 128 is a ninth, and counts for little in large matrices.
    """
    return shape.m <= 64 and shape.n >= 4096 and shape.format == "uniform" and dict(shape.options)["bits"] in (4, 8)


@pytest.mark.parametrize("shape", sorted({shape for shape, _ in ALL if _counted(shape)}, key=str), ids=str)
def test_moves_at_most_a_tenth_more_than_the_stored_bits(shape):
    moved = traffic(shape)
    assert moved["stored"] * 0.95 <= moved["weights"] <= moved["stored"] * 1.1
    if shape.m == 1:
        assert moved["weights"] + moved["other"] <= moved["stored"] * 1.1


def test_input_is_divided_and_rounded_as_written():
    """No compiler approximates a division or folds away the sum that rounds."""
    for name in ("asym", "sdr_token"):
        encode = launches_of(_shape(name, bits=4))[0][0]
        made = {target: compile_launch(encode, target).asm for target in ("sm_90", "gfx942")}
        ptx = made["sm_90"]["ptx"]
        assert "div.rn.f32" in ptx
        assert not re.search(r"div\.(approx|full)|\.ftz", ptx)
        up, down = (len(re.findall(rf"(?:add|sub|fma)\.\S*f32.*0f{bits}", ptx)) for bits in ("4B400000", "CB400000"))
        assert up + down >= 2 * BLOCK_PER_THREAD
        assert up == down
        assert "v_div_fixup_f32" in made["gfx942"]["amdgcn"]


def test_gate_catches_narrow_loads():
    product = launches_of(_shape("token", bits=4))[0][-1]
    found = report(compile_launch(product, "sm_90", aligned=False)) | {"spills": 0, "registers": 0}
    with pytest.raises(AssertionError, match="less than 16 bytes"):
        gate(found, "int_product", whole_words=False)
