"""Small floats with two scales: published accuracy on Gaussian weights, and which scale a weight gets."""

import pytest
import torch

from qexport.formats.base import bits_per_weight
from qexport.formats.fp_asym import TABLES, FpAsym


@pytest.fixture(scope="module", name="gaussian")
def _gaussian():
    return torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("code", "group_size", "one", "two"),
    [
        ("fp4", 128, 0.01186, 0.01117),
        ("fp3", 128, 0.05696, 0.05125),
        ("nf4", 128, 0.009135, 0.008464),
        ("nf4", 64, 0.008461, 0.007623),
        ("nf3", 128, 0.04398, 0.03905),
    ],
)
def test_error_on_gaussian_weights(gaussian, code, group_size, one, two, fields_of):
    for two_scales, expected in ((False, one), (True, two)):
        fmt = FpAsym(code, group_size, two_scales)
        found = (gaussian - fmt.decode(fields_of(fmt, gaussian))).square().sum() / gaussian.square().sum()
        assert float(found) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("code", TABLES)
def test_the_outermost_weights_are_kept_on_both_sides(code):
    fmt = FpAsym(code)
    w = torch.tensor([[-0.5, -0.1, 0.0, 0.2, 2.0]])
    params = fmt.fit(w, None, None, 0)
    decoded = fmt.value(fmt.nearest(w, params), params)
    assert decoded[0, [0, 2, 4]].tolist() == pytest.approx([-0.5, 0.0, 2.0], rel=1e-3)


def test_nearest_finds_the_closest_level_of_the_weights_own_sign():
    fmt = FpAsym("fp4", 64)
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    params = fmt.fit(w, None, None, 0)
    levels = torch.stack([fmt.value(torch.full((32, 1), c, dtype=torch.uint8), params) for c in range(16)], -1)
    best = (levels - w.unsqueeze(-1)).abs().amin(-1)
    found = (fmt.value(fmt.nearest(w, params), params) - w).abs()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"), [(("nf4", 128), 4.25), (("nf4", 128, False), 4.125), (("fp3", 64), 3.5)]
)
def test_stored_bits_per_weight(options, expected):
    assert bits_per_weight(FpAsym(*options), 4096, 4096) == expected
