"""Bit planes: published accuracy on Gaussian weights, the algebra of the fit, and uniform weights as planes."""

import itertools

import numpy as np
import pytest
import torch

from qexport.formats import _binary
from qexport.formats.base import bits_per_weight
from qexport.formats.bcq import Bcq, from_uniform
from qexport.formats.uniform import Uniform


@pytest.fixture(scope="module", name="gaussian")
def _gaussian():
    return torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


def error(w, fmt, rounds, evenly):
    """Relative squared error of a fit in groups of 128."""
    part = w.reshape(-1, 128)
    params = fmt.alternated(part, None, rounds, evenly=evenly)
    return float((part - fmt.value(fmt.nearest(part, params), params)).square().sum() / part.square().sum())


@pytest.mark.parametrize(
    ("bits", "greedy", "alternating"), [(2, 0.1283, 0.1137), (3, 0.05686, 0.03491), (4, 0.03147, 0.0108)]
)
def test_error_on_gaussian_weights_as_the_papers_fit_them(gaussian, bits, greedy, alternating):
    fmt = Bcq(bits, 128, offset="none")
    assert error(gaussian, fmt, 0, evenly=False) == pytest.approx(greedy, rel=0.03)
    assert error(gaussian, fmt, 15, evenly=False) == pytest.approx(alternating, rel=0.03)


@pytest.mark.parametrize(("bits", "uniform"), [(2, 0.2528), (3, 0.04642), (4, 0.01013)])
def test_a_constant_and_a_second_start_beat_evenly_spaced_levels(gaussian, bits, uniform):
    plain = error(gaussian, Bcq(bits, 128, offset="none"), 15, evenly=False)
    both = error(gaussian, Bcq(bits, 128), 15, evenly=True)
    assert both < 0.97 * plain
    assert both < 0.87 * uniform


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("bits", [1, 3])
def test_least_squares_through_walsh_transforms_equal_a_direct_solution(bits, offset):
    rng = torch.Generator().manual_seed(0)
    w, weight = torch.randn(5, 40, generator=rng), torch.rand(40, generator=rng) + 0.1
    codes = torch.randint(0, 2**bits, (5, 40), generator=rng)
    alpha, constant = _binary.solve(codes, weight.expand_as(w), w * weight, bits, offset)
    for row in range(5):
        planes = np.stack([(codes[row] >> i & 1) * 2 - 1 for i in range(bits)] + [np.ones(40)] * offset, 1).astype(
            float
        )
        root = np.sqrt(weight.double().numpy())[:, None]
        expected = np.linalg.lstsq(planes * root, w[row].double().numpy() * root[:, 0], rcond=None)[0]
        np.testing.assert_allclose(alpha[row], np.sort(np.abs(expected[:bits]))[::-1], rtol=1e-3, atol=1e-4)
        if offset:
            np.testing.assert_allclose(constant[row], expected[bits], rtol=1e-3, atol=1e-4)


def test_every_round_lowers_the_error():
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    found, last = _binary.greedy(w, weight, 3, True), None
    for _ in range(8):
        now = _binary.error_of(w, weight, *found)
        assert last is None or (now <= last * (1 + 1e-4)).all()
        found, last = _binary.alternate(w, weight, *found, 1), now


def test_nearest_finds_the_closest_of_all_sums():
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    fmt = Bcq(3, 30)
    params = fmt.fit(w, None, None, 0)
    sums = torch.stack(
        [
            params["offset"] + sum(s * params["alpha"][:, :, i] for i, s in enumerate(signs))
            for signs in itertools.product((-1.0, 1.0), repeat=3)
        ],
        -1,
    )
    best = (w.unsqueeze(-1) - sums).abs().amin(-1)
    found = (w - fmt.value(fmt.nearest(w, params), params)).abs()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, -1), (4, 24), (8, 64)])
def test_a_uniform_weight_becomes_planes_without_a_change_of_any_bit(bits, group_size, symmetric, fields_of):
    w = 0.05 * torch.randn(37, 131, generator=torch.Generator().manual_seed(0))
    uniform = Uniform(bits, group_size, symmetric).resolve(w)
    fields = fields_of(uniform, w)
    fmt, planes = from_uniform(fields, bits, group_size)
    again = fmt.unpack(fmt.pack(planes), 37, 131)
    assert fmt.decode(again).equal(uniform.decode(fields))


def test_alphas_are_float32_where_half_of_a_scale_has_no_place():
    scales = torch.tensor([[2.0**-14 * (1 + 2**-10)]])
    fields = {"codes": torch.arange(16, dtype=torch.uint8).view(1, 16), "scales": scales}
    fmt, planes = from_uniform(fields, 4, -1)
    assert fmt.scale_dtype == "float32"
    assert fmt.decode(planes).equal(Uniform(4, -1, symmetric=True).decode(fields))


@pytest.mark.parametrize(
    ("options", "expected"), [((4, 128), 4.625), ((4, 128, "none"), 4.5), ((3, 128, "none"), 3.375), ((2, 128), 2.375)]
)
def test_stored_bits_per_weight(options, expected):
    assert bits_per_weight(Bcq(*options), 4096, 4096) == expected
