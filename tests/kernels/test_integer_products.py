"""Products of rounded inputs and integer weights on the CPU: sums are exact, and the floats around them nearly so."""

import itertools
from typing import Any

import pytest
import torch

from qexport.formats.base import IntegerFormat, Integers
from qexport.formats.specs import InputSpec, LinearSpec, make_format, refuse_input
from qexport.inputs.base import Codes, InputQuant
from qexport.kernels import _integers
from tests.packing import pack_weight
from tests.rounding import QUANTS, sample, stored_for, whole

FORMATS: list[tuple[str, dict[str, Any]]] = [
    *(("uniform", {"bits": b, "group_size": 24, "symmetric": b % 2 == 0}) for b in range(2, 9)),
    *(("uniform", {"bits": b, "group_size": -1, "symmetric": b % 2 == 1}) for b in range(2, 9)),
    ("uniform", {"bits": 8, "group_size": 1000}),
    ("uniform", {"bits": 4, "group_size": 1, "scale_dtype": "bfloat16"}),
    ("sdr", {}),
    ("sdr", {"bits": 2, "group_size": 8, "sign_magnitude": True}),
    ("sdr", {"bits": 8, "group_size": -1}),
    ("sdr", {"bits": 3, "group_size": 24}),
]
PAIRS = [
    pytest.param(name, options, quant, id=f"{name}-{'-'.join(map(str, options.values()))}-{label}")
    for (name, options), (label, quant) in itertools.product(FORMATS, QUANTS.items())
    if refuse_input(LinearSpec(make_format(name, options), InputSpec(quant=quant))) is None
]
BYTES = pytest.mark.skipif(_integers.obstacle() is not None, reason=str(_integers.obstacle()))


def test_all_quantizers_meet_both_formats() -> None:
    assert {(p.values[0], p.values[2].name) for p in PAIRS} == set(
        itertools.product(("uniform", "sdr"), ("token", "tensor", "sdr", "outliers"))
    )


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_scales_times_integers_are_the_decoded_weight(name: str, options: dict[str, Any]) -> None:
    fmt = make_format(name, options)
    assert isinstance(fmt, IntegerFormat)
    for n, k in ((1, 1), (7, 61), (33, 96)):
        found = pack_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(k)), LinearSpec(fmt))
        w = fmt.integers(found.tensors, n, k)
        assert (w.codes.dtype, w.codes.shape, w.scales.dtype) == (torch.int8, (n, k), torch.float32)
        top = 2 ** (fmt.integer_bits - 1)
        assert w.group_size == fmt.integer_group
        assert -top <= int(w.codes.min()) <= int(w.codes.max()) < top
        size = k if w.group_size == -1 else w.group_size
        groups = torch.arange(k) // size
        assert w.scales.shape == (n, int(groups[-1]) + 1)
        integers = w.codes.int()
        if w.zeros is not None:
            assert w.zeros.dtype == torch.int32
            integers = integers - w.zeros[:, groups]
        assert torch.equal(integers.float() * w.scales[:, groups], found.decoded)


@pytest.mark.parametrize(("name", "options", "quant"), PAIRS)
def test_sums_are_those_of_whole_numbers_and_the_product_that_of_the_decoded_numbers(
    name: str, options: dict[str, Any], quant: InputQuant
) -> None:
    fmt = make_format(name, options)
    assert isinstance(fmt, IntegerFormat)
    for m, n, k in ((5, 7, 61), (1, 3, 33)):
        found = pack_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(k)), LinearSpec(fmt))
        x = sample(m, k, seed=n)
        codes = quant.encode(x, stored_for(quant, x))
        w = fmt.integers(found.tensors, n, k)
        ready = _integers.prepare(w)
        _check_sums(codes, w, ready)
        y = _integers.product(codes, x, ready, _integers.exact)
        values = codes.values(x).double()
        bound = 1e-5 * (values.abs() @ found.decoded.double().abs().T) + 1e-30
        assert ((y.double() - values @ found.decoded.double().T).abs() <= bound).all()
        if _integers.obstacle() is None:
            assert torch.equal(_integers.product(codes, x, ready, _integers.by_int8), y)


def _check_sums(codes: Codes, w: Integers, ready: _integers.Prepared) -> None:
    k = w.codes.shape[1]
    size = k if w.group_size == -1 else w.group_size
    inputs, weights = whole(codes), w.codes.tolist()
    found = list(_integers.accumulators(codes, ready, _integers.exact))
    assert [g for g, _, _ in found] == list(range(-(-k // size)))
    for g, low, high in found:
        assert low.dtype == torch.int32
        sums = low.tolist() if high is None else (low.long() + 256 * high.long()).tolist()
        own = range(g * size, min((g + 1) * size, k))
        zeros = [0] * len(weights) if w.zeros is None else w.zeros[:, g].tolist()
        for row, got in zip(inputs, sums, strict=True):
            assert got == [
                sum(row[j] * (line[j] - zero) for j in own) for line, zero in zip(weights, zeros, strict=True)
            ]


@BYTES
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (5, 7, 1), (1, 7, 3), (3, 1, 17), (17, 33, 129), (2, 5, 4096), (33, 16, 64), (7, 3, 2)]
)
def test_products_of_bytes_equal_those_by_way_of_floats(m: int, n: int, k: int) -> None:
    rng = torch.Generator().manual_seed(m + n + k)
    for low, high in ((-128, 128), (127, 128), (-128, -127)):
        a, b = (torch.randint(low, high, (rows, k), generator=rng, dtype=torch.int8) for rows in (m, n))
        found = _integers.by_int8(a, b)
        assert found.dtype == torch.int32
        assert torch.equal(found, _integers.exact(a, b))
        assert torch.equal(found.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [_integers._LONGEST, _integers._LONGEST + 1, 3 * _integers._LONGEST + 5])
def test_long_rows_of_the_largest_numbers_do_not_overflow(k: int, sign: int) -> None:
    x = Codes(torch.full((1, k), 127, dtype=torch.int8), torch.ones(1, 1), torch.full((1, 1), -128, dtype=torch.int32))
    code, zero = (127, -128) if sign == 1 else (-128, 127)
    w = Integers(
        torch.full((1, k), code, dtype=torch.int8), torch.ones(1, 1), torch.full((1, 1), zero, dtype=torch.int32), -1
    )
    ready = _integers.prepare(w)
    assert [p.shape[1] for p in ready.parts] == [len(r) for r in torch.arange(k).split(_integers._LONGEST)]
    assert set(ready.group) == {0}
    total = sum(int(low) for _, low, _ in _integers.accumulators(x, ready, _integers.exact))
    assert total == sign * 255 * 255 * k
    assert float(_integers.product(x, torch.zeros(1, k), ready, _integers.exact)) == pytest.approx(total, rel=1e-6)


def test_long_rows_of_two_planes_do_not_overflow() -> None:
    k = 2 * _integers._LONGEST + 1
    top = torch.full((1, k), -128, dtype=torch.int8)
    w = Integers(top, torch.ones(1, 1), torch.full((1, 1), 127, dtype=torch.int32), -1)
    parts = list(
        _integers.accumulators(Codes(torch.cat((top, top)), torch.ones(1, 1)), _integers.prepare(w), _integers.exact)
    )
    assert sum(int(low) for _, low, _ in parts) == 128 * 255 * k
    assert sum(int(high) for _, _, high in parts if high is not None) == 128 * 255 * k


def test_columns_that_stay_floats_meet_the_decoded_weight() -> None:
    fmt = make_format("uniform", {"bits": 4, "group_size": 24})
    assert isinstance(fmt, IntegerFormat)
    found = pack_weight(torch.randn(7, 61, generator=torch.Generator().manual_seed(0)), LinearSpec(fmt))
    ready = _integers.prepare(fmt.integers(found.tensors, 7, 61))
    wanted = torch.tensor([0, 23, 24, 25, 47, 48, 60])
    assert torch.equal(_integers.columns(ready, wanted), found.decoded[:, wanted])


def test_a_processor_that_adds_in_16_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = a.int().unsqueeze(1) * b.int()
        return pairs.view(*pairs.shape[:2], -1, 2).sum(3).clamp(-(2**15), 2**15 - 1).sum(2).int()

    def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented\nmore")

    for replaced, message in ((saturating, "is not exact"), (missing, "here (not implemented)")):
        monkeypatch.setattr(_integers, "by_int8", replaced)
        assert message in str(_integers.obstacle.__wrapped__())
