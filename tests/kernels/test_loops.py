"""Loops on the CPU give what tensor operations give, bit for bit."""

import pytest
import torch

from qexport.formats.base import Integers
from qexport.inputs.base import BY_TENSORS
from qexport.inputs.sdr import Sdr
from qexport.inputs.token import Token
from qexport.kernels import _integers

loops = pytest.importorskip("qexport.kernels._loops", reason="numba is not installed", exc_type=ImportError)


def _rows(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows with a zero one, a huge feature, ties to round and a NaN in the last one of many."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=rng)
    x[:, ::7] *= 40
    x[0] = torch.arange(k).remainder(9) - 4.5
    if m > 2:
        x[1] = 0
        x[-1, k // 2] = torch.nan
    return x


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 577), (5, 64), (3, 4099), (600, 130)])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_tokens_are_those_of_tensor_operations(m: int, k: int, bits: int) -> None:
    x = _rows(m, k)
    wanted, found = Token(bits=bits).encode(x, {}), Token(bits=bits).encode(x, {}, loops.BY_LOOPS)
    assert _same(found.scales, wanted.scales)
    whole = ~wanted.scales[:, 0].isnan()
    assert torch.equal(found.codes[whole], wanted.codes[whole])


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 577), (5, 64), (3, 4099), (600, 130)])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 16), (4, 7), (8, 16), (8, 32), (8, 2**31 - 1)])
def test_razored_planes_are_those_of_tensor_operations(m: int, k: int, bits: int, group: int) -> None:
    x, quant = _rows(m, k), Sdr(bits=bits, group_size=group, static=False)
    wanted, found = quant.encode(x, {}), quant.encode(x, {}, loops.BY_LOOPS)
    whole = ~wanted.scales[:, 0].isnan()
    assert torch.equal(found.codes[whole], wanted.codes[whole])
    assert torch.equal(found.high[whole], wanted.high[whole])


@pytest.mark.parametrize("quant", [Token(), Sdr(bits=8, static=False)], ids=["one plane", "two planes"])
@pytest.mark.parametrize(("n", "k", "group"), [(33, 130, -1), (17, 130, 32), (9, 65, 64), (1100, 96, 8)])
@pytest.mark.parametrize("m", [1, 16, 90])
def test_products_in_one_pass_are_those_group_by_group(quant: Token, n: int, k: int, group: int, m: int) -> None:
    rng = torch.Generator().manual_seed(1)
    groups = 1 if group == -1 else -(-k // group)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    w = _integers.prepare(Integers(codes, torch.rand(n, groups, generator=rng), None, group))
    x = torch.randn(m, k, generator=rng)
    rounded = quant.encode(x, {}, BY_TENSORS)
    assert w.one_a_group
    fast = _integers.product(rounded, x, w, _integers.by_int8)
    assert torch.equal(fast, _integers.product(rounded, x, w, _integers.exact))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-45])
@pytest.mark.parametrize(
    "quant", [Token(), Sdr(static=False), Sdr(bits=4, static=False, group_size=8)], ids=["token", "sdr", "sdr 4"]
)
def test_what_is_hardly_a_number_does_not_harm(quant: Token, value: float) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    x[1, 3] = value
    found, wanted = quant.encode(x, {}, loops.BY_LOOPS), quant.encode(x, {})
    assert _same(found.scales, wanted.scales)
    whole = wanted.scales[:, 0].isfinite()
    assert torch.equal(found.codes[whole], wanted.codes[whole])
    assert whole.all() or not found.values(x)[~whole].isfinite().all()


def test_without_numba_everything_goes_by_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _rows(2, 40)
    w = _integers.prepare(Integers(torch.ones(3, 40, dtype=torch.int8), torch.ones(3, 1), None, -1))
    from qexport.formats.specs import InputSpec

    found = _integers.linear(InputSpec(quant=Token()), {}, w, _integers.by_int8, x)
    monkeypatch.setattr(_integers, "loops", lambda: None)
    assert torch.equal(found, _integers.linear(InputSpec(quant=Token()), {}, w, _integers.by_int8, x))
