"""The uniform grid: published accuracy on Gaussian weights, the rule of its levels, what resolve decides."""

import pytest
import torch

from qexport.errors import LayoutError
from qexport.formats.base import bits_per_weight
from qexport.formats.uniform import Uniform


@pytest.fixture(scope="module", name="gaussian")
def _gaussian():
    return torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [
        (2, 16, 0.1223),
        (2, 32, 0.1650),
        (2, 64, 0.2084),
        (2, 128, 0.2528),
        (3, 16, 0.02216),
        (3, 32, 0.02990),
        (3, 64, 0.03799),
        (3, 128, 0.04642),
        (4, 16, 0.004837),
        (4, 32, 0.006533),
        (4, 64, 0.008297),
        (4, 128, 0.01013),
    ],
)
def test_asymmetric_error_on_gaussian_weights(gaussian, bits, group_size, expected, fields_of):
    fmt = Uniform(bits, group_size)
    error = (gaussian - fmt.decode(fields_of(fmt, gaussian))).square().sum() / gaussian.square().sum()
    assert float(error) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(4, 128, 0.01378), (8, -1, 7.56e-5)])
def test_symmetric_error_on_gaussian_weights(gaussian, bits, group_size, expected, fields_of):
    fmt = Uniform(bits, group_size, symmetric=True)
    error = (gaussian - fmt.decode(fields_of(fmt, gaussian))).square().sum() / gaussian.square().sum()
    assert float(error) == pytest.approx(expected, rel=2e-3)


def test_nearest_finds_the_closest_level_there_is():
    fmt = Uniform(bits=3, group_size=16)
    w = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    params = fmt.fit(w, None, None, 0)
    levels = torch.stack([fmt.value(torch.full((64, 1), c, dtype=torch.uint8), params) for c in range(8)], -1)
    best = (levels - w.unsqueeze(-1)).abs().amin(-1)
    chosen = (fmt.value(fmt.nearest(w, params), params) - w).abs()
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-6)


def test_values_far_outside_of_the_range_take_the_outermost_codes():
    fmt = Uniform(bits=3)
    params = fmt.fit(torch.tensor([[-1.0, 2.0]]), None, None, 0)
    assert fmt.nearest(torch.tensor([[-1e30, 1e30, float("inf")]]), params).tolist() == [[0, 7, 7]]


@pytest.mark.parametrize("w", [[0.5, 1.0], [-1.0, -0.25], [-1.0, 2.0], [0.0, 0.0]])
def test_zero_is_always_a_level(w):
    fmt = Uniform(bits=4)
    group = torch.tensor([w])
    params = fmt.fit(group, None, None, 0)
    assert float(params["zeros"]) in range(16)
    zero = torch.zeros(1, 1)
    assert fmt.value(fmt.nearest(zero, params), params).equal(zero)


def test_symmetric_levels_lie_around_the_middle_code():
    fmt = Uniform(bits=4, symmetric=True)
    params = fmt.fit(torch.tensor([[-3.0, 7.0]]), None, None, 0)
    assert params.keys() == {"scales"}
    assert fmt.value(torch.arange(16, dtype=torch.uint8)[None], params).tolist() == [list(range(-8, 8))]


FACTORS = [(1.0, "float16"), (1e-5, "bfloat16"), (1e7, "bfloat16"), (2.0**-14, "float16"), (0.0, "float16")]


@pytest.mark.parametrize(("factor", "dtype"), FACTORS)
def test_scales_become_bfloat16_when_one_leaves_float16s_normal_range(factor, dtype):
    w = torch.zeros(4, 40)
    w[1, 33:] = 15 * factor
    assert Uniform(group_size=16).resolve(w).scale_dtype == dtype


def test_scales_are_rounded_before_codes_are_chosen():
    fmt = Uniform(bits=8, group_size=-1)
    w = torch.randn(32, 300, generator=torch.Generator().manual_seed(2))
    scales = fmt.fit(w, None, None, 0)["scales"]
    assert scales.equal(scales.half().float())


@pytest.mark.parametrize(
    ("options", "expected"),
    [((4, 128), 4.15625), ((3, 128), 3.1484375), ((2, 64), 2.28125), ((4, -1), 4.0048828125), ((4, 128, True), 4.125)],
)
def test_stored_bits_per_weight(options, expected):
    assert bits_per_weight(Uniform(*options), 4096, 4096) == expected


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_scale_that_is_zero_or_not_finite_is_refused(bad, fields_of):
    fmt = Uniform()
    packed = fmt.pack(fields_of(fmt, torch.randn(4, 32)))
    packed["scales"][2, 0] = bad
    with pytest.raises(LayoutError, match=r"^model\.layers\.3\.q_proj\.scales: expected finite scales other than 0"):
        fmt.check_content(packed, 4, 32, "model.layers.3.q_proj")


def test_any_words_decode_to_something_finite():
    fmt = Uniform(bits=3, group_size=32)
    words = torch.randint(-(2**31), 2**31 - 1, (8, 6), generator=torch.Generator().manual_seed(3)).int()
    packed = {"qweight": words, "scales": torch.ones(8, 2).half(), "qzeros": words[:2, :3].contiguous()}
    fmt.check_content(packed, 8, 64, "m")
    assert fmt.decode(fmt.unpack(packed, 8, 64)).abs().max() <= 7
