"""What each quantizer of inputs makes of numbers: its paper's rule, number by number, and the cases at the edges."""

import math
from dataclasses import replace

import pytest
import torch

from qexport import plugins, schema
from qexport.formats.specs import InputSpec
from qexport.inputs.base import Codes, InputQuant, make_input
from tests.rounding import QUANTS, sample, slowly, stored_for, whole

QUANTIZERS = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
LARGEST = torch.finfo(torch.float16).max


def test_every_quantizer_is_tested() -> None:
    assert set(plugins.names("inputs")) == {q.name for q in QUANTS.values()}


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 70), (5, 7), (3, 131), (8, 64)])
@QUANTIZERS
def test_integers_and_scales_are_those_of_the_stated_rule(quant: InputQuant, m: int, k: int) -> None:
    x = sample(m, k, seed=m + k)
    stored = stored_for(quant, x)
    codes = quant.encode(x, stored)
    wanted, scales = slowly(quant, x, stored)
    assert whole(codes) == wanted
    assert codes.scales.flatten().tolist() == scales


@QUANTIZERS
def test_codes_keep_their_contract(quant: InputQuant) -> None:
    x = sample(6, 50)
    kept = x.clone()
    codes = quant.encode(x, stored_for(quant, x))
    assert torch.equal(x, kept)
    assert (codes.codes.dtype, codes.codes.shape) == (torch.int8, (6, 50))
    assert (codes.scales.dtype, codes.scales.shape) == (torch.float32, (6, 1))
    assert (codes.scales > 0).all()
    if codes.zeros is not None:
        assert (codes.zeros.dtype, codes.zeros.shape) == (torch.int32, (6, 1))
    if codes.high is not None:
        assert (codes.high.dtype, codes.high.shape) == (torch.int8, (6, 50))
    values = codes.values(x)
    if codes.columns is not None:
        assert codes.columns.dtype == torch.int64
        assert (codes.columns.diff() > 0).all()
        assert (codes.codes[:, codes.columns] == 0).all()
        assert torch.equal(values[:, codes.columns], x[:, codes.columns])
        values = values.index_fill(1, codes.columns, 0.0)
    assert torch.equal(values, torch.tensor(whole(codes)).float() * codes.scales)


@QUANTIZERS
def test_what_is_stored_is_what_the_layout_says(quant: InputQuant) -> None:
    x = sample(6, 50)
    stored = stored_for(quant, x)
    assert all(name.startswith("input_quant_") for name in stored)
    extents = schema.check(stored, quant.layout(50), "m")
    quant.check_content(stored, 50, "m")
    assert set(extents) == set(quant.expected_extents(50))
    assert schema.nbytes(quant.layout(50), extents) == sum(t.nbytes for t in stored.values())
    assert bool(quant.layout(50)) == quant.calibrated
    assert set(quant.calibrate(x.amin(0), x.amax(0))) == {name.removeprefix("input_") for name in stored}


@QUANTIZERS
def test_rows_of_zeros_stay_zeros(quant: InputQuant) -> None:
    x = sample(4, 40)
    x[1:3] = 0
    codes = quant.encode(x, stored_for(quant, x))
    assert torch.isfinite(codes.scales).all()
    assert (codes.values(x)[1:3] == 0).all()
    assert not any(any(row) for row in whole(codes)[1:3])
    none = torch.zeros(3, 40)
    assert (quant.encode(none, stored_for(quant, none)).values(none) == 0).all()


@QUANTIZERS
def test_numbers_up_to_the_largest_float16_keep_their_relative_accuracy(quant: InputQuant) -> None:
    x = sample(5, 64)
    usual = quant.encode(x, stored_for(quant, x)).values(x)
    factor = LARGEST / float(x.abs().max())
    large = x * factor
    own = replace(quant, threshold=quant.threshold * factor) if quant.name == "outliers" else quant  # type: ignore
    found = own.encode(large, stored_for(own, large)).values(large)
    assert torch.isfinite(found).all()
    worst = (usual - x).abs().max() / x.abs().max()
    assert (found - large).abs().max() / LARGEST <= 1.05 * worst + 1e-6
    tiny = x * 1e-30
    found = own.encode(tiny, stored_for(own, tiny)).values(tiny)
    if quant.name != "outliers":
        assert (found / 1e-30 - x).abs().max() / x.abs().max() <= 1.05 * worst + 1e-6


@pytest.mark.parametrize("name", ["token", "outliers", "token with zero", "sdr 2 by token", "sdr 8 by token"])
def test_a_row_does_not_depend_on_others(name: str) -> None:
    quant, x = QUANTS[name], sample(6, 50).clamp(-1.9, 1.9)
    together = quant.encode(x, {})
    for i in range(6):
        alone = quant.encode(x[i : i + 1], {})
        assert whole(alone) == whole(together)[i : i + 1]
        assert torch.equal(alone.scales, together.scales[i : i + 1])


def test_outliers_found_in_a_call_depend_on_all_its_rows() -> None:
    x = sample(4, 50).clamp(-1.9, 1.9)
    alone = QUANTS["outliers"].encode(x[:1], {})
    x[3, 7] = 2.0  # at the threshold
    together = QUANTS["outliers"].encode(x, {})
    assert alone.columns is None
    assert together.columns is not None
    assert together.columns.tolist() == [7]
    assert torch.equal(together.values(x)[0, 7], x[0, 7])


def test_ties_go_to_the_even_integer() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert make_input("token", {}).encode(x, {}).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    one = {"input_quant_scale": torch.ones(1), "input_quant_zero": torch.zeros(1, dtype=torch.int32)}
    assert make_input("tensor", {}).encode(x, one).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    asymmetric = make_input("tensor", {"symmetric": False}).encode(x, one)
    assert asymmetric.codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    # Razored twice: to a 16-bit integer, then to the bits that lead the group; each time half to even.
    x = torch.tensor([[15.0, 2.5, 3.5, -2.5, 3.0, 5.0, 7.0, 1.0]])
    found = make_input("sdr", {"bits": 4, "group_size": 8}).encode(x, {"input_quant_scale": torch.ones(1)})
    assert whole(found) == [[14, 2, 4, -2, 4, 4, 8, 0]]


def test_static_scales_saturate() -> None:
    x = torch.tensor([[1e4, -1e4, math.inf, -math.inf, 3.0]])
    one = {"input_quant_scale": torch.ones(1), "input_quant_zero": torch.full((1,), -100, dtype=torch.int32)}
    assert whole(make_input("tensor", {}).encode(x, one)) == [[127, -127, 127, -127, 3]]
    assert whole(make_input("tensor", {"symmetric": False}).encode(x, one)) == [[227, -28, 227, -28, 3]]
    x = torch.tensor([[1e9, -1e9, math.inf, -math.inf, 3.0]])
    razored = make_input("sdr", {"group_size": 4}).encode(x, one)
    assert whole(razored) == [[32512, -32768, 32512, -32768, 3]]


def test_razored_integers_are_two_planes_of_bytes() -> None:
    rng = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        quant = make_input("sdr", {"bits": bits, "group_size": 4})
        x = torch.randint(-40000, 40001, (200, 30), generator=rng).float()
        x = x * torch.exp2(-torch.randint(0, 16, (200, 1), generator=rng))
        codes = quant.encode(x, {"input_quant_scale": torch.ones(1)})
        assert isinstance(codes, Codes)
        assert codes.high is not None
        found = 256 * codes.high.int() + codes.codes.int()
        assert found.tolist() == slowly(quant, x, {"input_quant_scale": torch.ones(1)})[0]
        assert int(found.min()) >= -(2**15)
        assert int(found.max()) < 2**15


def test_a_group_of_the_input_larger_than_the_input_costs_nothing() -> None:
    x = sample(3, 40)
    one = {"input_quant_scale": torch.full((1,), 1e-4)}
    huge = make_input("sdr", {"bits": 4, "group_size": 2**31 - 1}).encode(x, one)
    assert whole(huge) == whole(make_input("sdr", {"bits": 4, "group_size": 40}).encode(x, one))


@QUANTIZERS
def test_a_row_with_a_nan_becomes_nan_and_the_others_stay(quant: InputQuant) -> None:
    x = sample(4, 40).clamp(-1.9, 1.9)
    stored = stored_for(quant, x)
    before = quant.encode(x, stored)
    x[1, 9] = math.nan
    after = quant.encode(x, stored)
    assert after.scales[1].isnan()
    rest = [0, 2, 3]
    assert torch.equal(after.values(x)[rest], before.values(x)[rest])


@QUANTIZERS
def test_an_infinite_number_is_clipped_by_a_static_scale_and_spoils_its_row_otherwise(quant: InputQuant) -> None:
    x = sample(4, 40).clamp(-1.9, 1.9)
    stored = stored_for(quant, x)
    x[1, 9] = math.inf
    found = quant.encode(x, stored).values(x)
    if quant.name == "tensor" or (quant.name == "sdr" and quant.calibrated):
        assert torch.isfinite(found).all()
    else:
        assert not torch.isfinite(found[1]).all()
    assert torch.isfinite(found[[0, 2, 3]]).all()


def test_calibration_takes_the_widest_feature_and_outliers_those_that_reach_the_threshold() -> None:
    low, high = torch.tensor([-1.0, -8.0, 0.5]), torch.tensor([2.0, 3.0, 7.0])
    assert make_input("tensor", {}).calibrate(low, high)["quant_scale"].item() == torch.tensor(8 / 127).item()
    spread = make_input("tensor", {"symmetric": False}).calibrate(low, high)
    assert spread["quant_scale"].item() == torch.tensor(15 / 255).item()
    assert spread["quant_zero"].tolist() == [8]  # 8 / (15 / 255) = 136, less 128
    assert make_input("sdr", {}).calibrate(low, high)["quant_scale"].item() == torch.tensor(8 / 32767).item()
    static = make_input("outliers", {"threshold": 7.0, "static": True}).calibrate(low, high)
    assert static["quant_columns"].tolist() == [1, 2]
    assert static["quant_columns"].dtype == torch.int32


def test_features_that_never_ran_are_calibrated_to_something_valid() -> None:
    none = torch.full((4,), torch.inf)
    for quant in QUANTS.values():
        stored = InputSpec(quant=quant).pack(quant.calibrate(torch.zeros(4), torch.zeros(4)))
        quant.check_content(stored, 4, "m")
        if quant.name != "outliers" and getattr(quant, "symmetric", True):
            quant.check_content(InputSpec(quant=quant).pack(quant.calibrate(none, -none)), 4, "m")
