"""Razored integers: published accuracy on Gaussian weights, flags, and codes that fit their base width."""

import pytest
import torch

from qexport.errors import LayoutError
from qexport.formats.base import bits_per_weight
from qexport.formats.sdr import Sdr


@pytest.fixture(scope="module", name="gaussian")
def _gaussian():
    return torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((4, 8), 0.01029),
        ((4, 16), 0.01359),
        ((4, 32), 0.01688),
        ((4, 64), 0.01887),
        ((4, 128), 0.01949),
        ((4, 16, 16), 0.0132),
    ],
)
def test_error_on_gaussian_weights(gaussian, options, expected, fields_of):
    fmt = Sdr(*options)
    w = gaussian
    found = (w - fmt.decode(fields_of(fmt, w))).square().sum() / w.square().sum()
    assert float(found) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("sign_magnitude", [True, False])
@pytest.mark.parametrize(("bits", "base_bits"), [(4, 8), (2, 8), (4, 16), (8, 16)])
def test_shifted_codes_are_integers_of_the_base_width(bits, base_bits, sign_magnitude, fields_of):
    fmt = Sdr(bits, 16, base_bits, sign_magnitude)
    fields = fields_of(fmt, torch.randn(32, 256, generator=torch.Generator().manual_seed(0)))
    integers = fmt.decode({**fields, "scales": torch.ones_like(fields["scales"])})
    assert integers.equal(integers.round())
    assert -(2 ** (base_bits - 1)) <= int(integers.min())
    assert int(integers.max()) < 2 ** (base_bits - 1)
    assert 0 < int(fields["flags"].max()) <= base_bits - bits


def test_the_flag_is_what_the_leading_bit_of_a_group_leaves_over():
    fmt = Sdr(4, 4)
    w = torch.tensor([[127.0, -3, 0, 5, 7, -7, 1, 0, 8, 0, 0, 0, 0, 0, 0, 0]])
    state = fmt.begin(w)
    assert float(state) == 1.0
    assert [float(fmt.fit(w[:, j : j + 4], None, state, j)["flags"]) for j in range(0, 16, 4)] == [4, 0, 1, 0]


def test_two_codings_of_the_sign_mean_the_same_where_both_reach(fields_of):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    twos, magnitude = (Sdr(sign_magnitude=flag) for flag in (False, True))
    a, b = (fmt.decode(fields_of(fmt, w)) for fmt in (twos, magnitude))
    codes = fields_of(twos, w)["codes"]
    assert a[codes != 8].equal(b[codes != 8])


def test_a_flag_beyond_the_base_width_is_refused(fields_of):
    fmt = Sdr()
    fields = fields_of(fmt, torch.randn(4, 32))
    fields["flags"][0, 0] = 5
    with pytest.raises(LayoutError, match=r"m.flags: expected at most 4, found 5"):
        fmt.check_content(fmt.pack(fields), 4, 32, "m")


def test_scales_that_vary_along_a_row_are_refused(fields_of):
    fmt = Sdr()
    fields = fields_of(fmt, torch.randn(4, 32))
    fields["scales"][0, 0] *= 2
    with pytest.raises(LayoutError, match="one scale a row"):
        fmt.pack(fields)


@pytest.mark.parametrize(
    ("options", "expected"), [((4, 8), 4.375), ((4, 16), 4.1875), ((4, 32), 4.09375), ((4, 16, 16), 4.25)]
)
def test_stored_bits_per_weight(options, expected):
    assert bits_per_weight(Sdr(*options), 4096, 4096) == pytest.approx(expected + 32 / 4096)
