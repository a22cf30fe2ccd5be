"""Intervals cover what they say, and pairs are drawn as pairs."""

import numpy as np
import pytest

from qexport.evaluate.bootstrap import LEAST, Interval, difference, interval, mean, parts_of, stratum


@pytest.mark.parametrize(("size", "least"), [(LEAST, 0.90), (250, 0.91)])
def test_intervals_hold_the_true_mean_about_as_often_as_they_say(size: int, least: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        found = interval([stratum(rng.exponential(2.0, size).tolist())])
        assert found is not None
        hits += found.low <= 2.0 <= found.high
    assert least <= hits / 200 <= 0.99


def test_interval_of_a_mean_is_that_of_its_normal_limit() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 2000)
    found = interval([stratum(values.tolist())])
    assert found is not None
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 2000**0.5
    assert found.low == pytest.approx(found.value - half, abs=5e-3)
    assert found.high == pytest.approx(found.value + half, abs=5e-3)


def test_pairs_see_a_difference_that_each_interval_hides() -> None:
    rng = np.random.default_rng(2)
    text = rng.normal(3.0, 1.0, 64)
    ours, theirs = text + 0.01 + rng.normal(0, 0.01, 64), text
    own, other = interval([stratum(ours.tolist())]), interval([stratum(theirs.tolist())])
    assert own is not None
    assert other is not None
    assert other.low < own.value < other.high
    found = difference([stratum(ours.tolist())], [stratum(theirs.tolist())])
    assert found is not None
    assert not found.holds_zero
    assert found.value == pytest.approx((ours - theirs).mean())


def test_noise_is_no_difference_most_of_the_time() -> None:
    rng = np.random.default_rng(3)
    told = 0
    for _ in range(200):
        text = rng.normal(3.0, 1.0, 40)
        pair = [[stratum((text + rng.normal(0, 0.1, 40)).tolist())] for _ in range(2)]
        found = difference(*pair)
        assert found is not None
        told += not found.holds_zero
    assert told / 200 < 0.1


def test_means_weigh_predictions_and_strata_alike() -> None:
    text = stratum([1.0, 4.0], [3.0, 1.0])
    assert mean([text]) == 1.75
    assert mean([text, stratum([0.0, 0.5])]) == 1.0


def test_one_observation_has_no_interval() -> None:
    assert interval([stratum([1.0])]) is None
    assert interval([stratum([1.0, 2.0]), stratum([1.0])]) is None


def test_few_windows_are_cut_into_parts() -> None:
    assert [parts_of(n) for n in (1, 4, 31, 32, 141)] == [32, 8, 2, 1, 1]


def test_exponentials_keep_their_bounds() -> None:
    assert Interval(0.0, -1.0, 1.0).of(np.exp) == Interval(1.0, float(np.exp(-1.0)), float(np.e))
