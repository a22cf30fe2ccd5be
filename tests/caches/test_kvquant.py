"""Percentiles, levels and Q-Norm against slow statements of what they are."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from qexport.caches import _lines
from qexport.caches.kvquant import KvQuant, matching, thresholds
from qexport.errors import CalibrationError
from qexport.formats.kv.base import make_kv


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", [0.0, 0.005, 0.1, 0.5])
@pytest.mark.parametrize("tokens", [1, 2, 7, 400])
def test_quantiles_of_a_stream_are_those_of_all_of_it(part, tokens):
    x = rand(tokens, 5)
    kept = torch.full((_lines.extremes_for(tokens, part), 5), torch.inf)
    for piece in x.split(3):
        kept = _lines.keep_least(kept, piece)
    expected = np.quantile(x.double().numpy(), part, axis=0)
    torch.testing.assert_close(_lines.quantile(kept, tokens, part).double().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_levels_are_the_best_there_are(count, seed):
    x, w = rand(9, seed=seed).double().sort().values, rand(9, seed=seed + 9).double().square()
    w[3] = 0

    def cost(centres):
        return float((w * (x[:, None] - centres).square().amin(1)).sum())

    best = min(
        cost(torch.stack([(w[a:b] * x[a:b]).sum() / w[a:b].sum().clamp(min=1e-30) for a, b in pairwise([0, *cut, 9])]))
        for cut in combinations(range(1, 9), count - 1)
    )
    found = _lines.levels(x, w, count)
    assert found.shape == (count,)
    assert found.equal(found.sort().values)
    assert cost(found) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_levels_without_enough_points_are_still_as_many():
    found = _lines.levels(torch.tensor([0.2, 0.7]).double(), torch.ones(2).double(), 4)
    assert found.shape == (4,)
    assert found.equal(found.sort().values)
    assert {0.2, 0.7} <= {round(v, 6) for v in found.tolist()}
    assert torch.isfinite(_lines.levels(_lines.middles(16), torch.zeros(16).double(), 4)).all()


def test_a_histogram_counts_what_lies_within():
    x = torch.tensor([-1.0, -0.99, 0.1, 1.0, 1.01, -3.0])
    assert _lines.add_to(torch.zeros(4).double(), x).tolist() == [2, 0, 1, 1]
    assert _lines.add_to(torch.ones(4).double(), x, 2 * torch.ones(6)).tolist() == [5, 1, 3, 3]


def data_of(tokens=64, scale=1.0):
    data = {name: scale * rand(2, tokens, 3, 8, seed=i) for i, name in enumerate(("keys", "values"))}
    return data | {f"{name}_grads": rand(2, tokens, 3, 8, seed=i) for i, name in enumerate(("key", "value"), 5)}


def run(method, fmt, pieces, tokens=128):
    state = method.start(fmt, 24, tokens)
    for name in method.passes:
        for data in pieces:
            state = method.see(fmt, name, state, data)
    return state


def test_thresholds_are_percentiles_of_each_channel_without_first_tokens():
    fmt, data = make_kv("kvquant-4bit", {"outlier_rate": 0.1, "sink_tokens": 3}), data_of()
    data["keys"][:, :3] = 1e3
    found = thresholds(fmt, run(KvQuant(), fmt, [data]))
    own = data["keys"][:, 3:].reshape(-1, 24).double().numpy()
    for name, part in (("k_lower", 5), ("k_upper", 95)):
        np.testing.assert_allclose(found[name].double().numpy(), np.percentile(own, part, axis=0), rtol=2e-3, atol=1e-3)


def test_a_threshold_for_each_channel_even_where_nothing_varies():
    fmt = make_kv("kvquant-4bit")
    for value in (0.0, 3.7, -900.0, 1e30):
        data = {name: torch.full((2, 64, 3, 8), value) for name in ("keys", "values", "key_grads", "value_grads")}
        fmt.check_static(KvQuant().finish(fmt, run(KvQuant(), fmt, [data])), 3, 8, "cache.0")


@pytest.mark.parametrize("name", ["kvquant-4bit", "kvquant-2bit"])
def test_sequence_by_sequence_finds_the_same(name):
    fmt, data = make_kv(name), data_of()
    whole = KvQuant().finish(fmt, run(KvQuant(), fmt, [data]))
    pieces = [{key: t[i : i + 1] for key, t in data.items()} for i in range(2)]
    parts = KvQuant().finish(fmt, run(KvQuant(), fmt, pieces))
    assert set(whole) == set(fmt.static(3, 8))
    assert all(parts[key].equal(whole[key]) for key in whole)


def test_numbers_to_which_the_loss_is_sensitive_get_the_levels():
    fmt, data = make_kv("kvquant-2bit"), data_of(512)
    data["value_grads"] = torch.where(data["values"] > 1, 1.0, 1e-3)
    lut = KvQuant().finish(fmt, run(KvQuant(), fmt, [data], 1024))["v_lut"]
    equal = KvQuant(fisher=False).finish(fmt, run(KvQuant(), fmt, [data], 1024))["v_lut"]
    assert (lut > 0.2).sum() >= 3
    assert (equal > 0.2).sum() <= 2


def test_q_norm_keeps_mean_and_deviation():
    x = rand(100_000).mul_(0.3).clamp_(-1, 1)
    counts = _lines.add_to(torch.zeros(1024).double(), x)
    lut = torch.tensor([-0.4, -0.1, 0.15, 0.5], dtype=torch.float16)
    scale, offset = matching(counts, lut).tolist()
    taken = lut.float()[torch.bucketize(x, (lut[1:] + lut[:-1]).float() / 2)] * scale + offset
    assert float(taken.mean()) == pytest.approx(float(x.mean()), abs=1e-3)
    assert float(taken.std()) == pytest.approx(float(x.std()), rel=2e-3)


def test_evenly_spaced_levels():
    fmt = make_kv("kvquant-3bit", {"uniform": True})
    found = KvQuant().finish(fmt, run(KvQuant(), fmt, [data_of()]))
    assert found["k_lut"].equal(torch.linspace(-1, 1, 8).half())


def test_no_token_is_an_error_and_other_formats_are_rejected():
    fmt = make_kv("kvquant-4bit", {"sink_tokens": 70})
    with pytest.raises(CalibrationError, match="no sequence was longer than the 70 first tokens"):
        KvQuant().finish(fmt, run(KvQuant(), fmt, [data_of()]))
    assert "codebooks" in KvQuant().reject(make_kv("kivi-4bit"))
