"""Products by tiles are those of tensor operations, bit for bit."""

import copy

import pytest
import torch

from qexport.formats.base import Integers
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.inputs.base import Codes, make_input
from qexport.kernels import _integers
from qexport.runtime.linear import QuantLinear
from tests.packing import pack_weight

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(_integers.tiles() is None, reason="this processor lacks the instruction")
tiles = _integers.tiles()

KINDS = {  # planes of the input, whether it has zeros, whether the weight has
    "symmetric": (1, False, False),
    "zeros of the input": (1, True, False),
    "zeros of the weight": (1, False, True),
    "zeros of both": (1, True, True),
    "two planes": (2, False, False),
    "two planes and zeros": (2, False, True),
}


def _weight(n: int, k: int, group: int, zeros: bool = False, seed: int = 0) -> Integers:
    rng = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-k // group)
    return Integers(
        torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng),
        torch.randn(n, groups, generator=rng),
        torch.randint(-128, 128, (n, groups), dtype=torch.int32, generator=rng) if zeros else None,
        group,
    )


def _codes(m: int, k: int, planes: int = 1, zeros: bool = False) -> Codes:
    rng = torch.Generator().manual_seed(m)
    return Codes(
        torch.randint(-128, 128, (planes * m, k), dtype=torch.int8, generator=rng),
        torch.rand(m, 1, generator=rng),
        torch.randint(-128, 128, (m, 1), dtype=torch.int32, generator=rng) if zeros else None,
    )


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 1, -1), (3, 33, -1), (64, 64, 32), (70, 61, 24), (129, 260, 4), (17, 515, 128), (2, 70000, -1)],
)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 17])
def test_products_are_those_of_the_definition(kind: str, n: int, k: int, group: int, m: int) -> None:
    planes, own, other = KINDS[kind]
    w, codes, x = _weight(n, k, group, other), _codes(m, k, planes, own), torch.zeros(m, k)
    found = tiles.product(codes, x, tiles.prepare(w))
    assert found.is_contiguous()
    assert torch.equal(_bits(found), _bits(_integers.product(codes, x, _integers.prepare(w), _integers.exact)))


@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planes, own, other = KINDS[kind]
    w, codes, x = tiles.prepare(_weight(150, 96, 32, other)), _codes(m, 96, planes, own), torch.zeros(m, 96)
    alone = tiles.product(codes, x, w)
    monkeypatch.setattr(tiles, "many", lambda *_: True)
    assert torch.equal(_bits(tiles.product(codes, x, w)), _bits(alone))


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize(("own", "other"), [(-128, 127), (127, -128)])
def test_the_largest_sums_are_exact(code: int, own: int, other: int) -> None:
    k = _integers._LONGEST + 5
    whole = lambda value, dtype: torch.full((1, 1), value, dtype=dtype)  # noqa: E731
    w = Integers(whole(code, torch.int8).expand(3, k), torch.ones(3, 1), whole(other, torch.int32).expand(3, 1), -1)
    codes = Codes(whole(code, torch.int8).expand(2, k), torch.ones(2, 1), whole(own, torch.int32).expand(2, 1))
    x = torch.zeros(2, k)
    wanted = _integers.product(codes, x, _integers.prepare(w), _integers.exact)
    assert torch.equal(tiles.product(codes, x, tiles.prepare(w)), wanted)


def test_a_zero_keeps_its_sign() -> None:
    w = Integers(torch.zeros(1, 8, dtype=torch.int8), torch.tensor([[-1.0, -1.0]]), None, 4)
    codes, x = _codes(1, 8), torch.zeros(1, 8)
    wanted = _integers.product(codes, x, _integers.prepare(w), _integers.exact)
    assert torch.signbit(wanted).all()
    assert torch.equal(_bits(tiles.product(codes, x, tiles.prepare(w))), _bits(wanted))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [-1, 24])
def test_columns_are_decoded_as_by_tensors(zeros: bool, group: int) -> None:
    w, wanted = _weight(70, 261, group, zeros), torch.tensor([0, 1, 23, 24, 47, 200, 259, 260])
    decoded = _integers.columns(_integers.prepare(w), wanted)
    assert torch.equal(tiles.columns(tiles.prepare(w), wanted), decoded)
    assert torch.equal(tiles.prepare(w, wanted).fixed, decoded)


def test_many_columns_are_not_held() -> None:
    assert tiles.prepare(_weight(8, 64, -1), torch.arange(3)).fixed is None
    assert tiles.prepare(_weight(8, 64, -1), torch.arange(0)).fixed is None


@pytest.mark.parametrize("group", [1, 6, 30])
def test_groups_that_end_within_four_columns_go_by_tensors(group: int) -> None:
    assert tiles.prepare(_weight(8, 64, group)) is None
    assert isinstance(_integers.laid_out(_weight(8, 64, group), {}, _integers.by_int8), _integers.Prepared)


def test_a_weight_is_held_once() -> None:
    w = tiles.prepare(_weight(192, 576, -1))
    assert sum(array.nbytes for array in w.arrays) < 1.02 * 192 * 576
    again, codes, x = copy.deepcopy(w), _codes(2, 576), torch.zeros(2, 576)
    assert torch.equal(tiles.product(codes, x, again), tiles.product(codes, x, w))


@pytest.mark.parametrize(
    "quant",
    [
        {"name": "token"}, {"name": "token", "symmetric": False}, {"name": "tensor"}, {"name": "sdr"},
        {"name": "outliers"}, {"name": "outliers", "static": True},
    ],
    ids=lambda quant: "-".join(map(str, quant.values())),
)  # fmt: skip
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_linear_gives_the_same_with_tiles_and_without(
    quant: dict[str, object], symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_input(str(quant["name"]), {key: value for key, value in quant.items() if key != "name"})
    fmt = make_format("uniform", {"bits": 4, "group_size": 64, "symmetric": symmetric})
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 130, generator=rng), torch.randn(2, 5, 130, generator=rng)
    x[..., 7] *= 20
    x[1, 2] = 0
    high = x.abs().amax((0, 1))
    spec = LinearSpec(fmt, InputSpec(quant=made))
    tensors = pack_weight(weight, LinearSpec(fmt)).tensors
    values = {f"input_{name}": value for name, value in made.calibrate(-high, high).items()}
    linear = QuantLinear(spec, 70, 130, extents={"input_outliers": 1})
    linear.load_state_dict({**tensors, **values}, assign=True)
    with_tiles = linear(x)
    assert isinstance(linear._weights["integers"].args[2], tiles.Tiles)
    linear.forget()
    monkeypatch.setattr(_integers, "tiles", lambda: None)
    assert torch.equal(_bits(linear(x)), _bits(with_tiles))
    assert isinstance(linear._weights["integers"].args[2], _integers.Prepared)
    assert linear(x[:0]).shape == (0, 5, 70)
