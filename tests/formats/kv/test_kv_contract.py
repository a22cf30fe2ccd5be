"""What every cache format promises, over many options and shapes."""

import functools
import json

import pytest
import torch
from torch import Tensor

from qexport import plugins, schema
from qexport.caches.kvquant import KvQuant
from qexport.errors import LayoutError, UsageError
from qexport.formats.kv.base import (
    PRESETS,
    KVFormat,
    kv_from_json,
    kv_json,
    kv_name,
    kv_options,
    make_kv,
    packed_after,
    predicted_nbytes,
)

OPTIONS = {
    "kivi-4bit": [{}, {"group_size": 7, "residual_window": 0}, {"bits": 8}],
    "kivi-2bit": [{}, {"group_size": 2, "residual_window": 4}, {"bits": 3}],
    "kvquant-4bit": [{}, {"outlier_rate": 0}, {"per_channel": False}, {"uniform": True, "residual_window": 9}],
    "kvquant-3bit": [{}, {"outlier_rate": 0.1, "sink_tokens": 0}, {"pre_rope": False}],
    "kvquant-2bit": [{}, {"qnorm": False}, {"qnorm": True, "per_channel": False, "outlier_rate": 0.5}],
    "sdr-4bit": [{}, {"bits": 7, "group_size": 7}, {"bits": 2, "group_size": 128, "residual_window": 3}],
}
CASES = [(name, options) for name, found in OPTIONS.items() for options in found]
FORMATS = pytest.mark.parametrize("fmt", [make_kv(n, o) for n, o in CASES], ids=[f"{n}-{o}" for n, o in CASES])
SHAPES = [(3, 64), (3, 20), (1, 8), (2, 80), (5, 7)]
GROUPS = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Keys or values: channels differ in size and middle."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    spread = torch.randn(2, *shape[-2:], generator=torch.Generator().manual_seed(99))
    return x * spread[0].exp() + 3 * spread[1]


@functools.cache
def static_of(fmt: KVFormat, heads: int, dim: int) -> dict[str, Tensor]:
    """As a calibration on other tokens of the same kind finds it."""
    method = KvQuant(bins=128)
    if method.reject(fmt):
        return {}
    data = dict.fromkeys(("keys", "values"), normal(1, 200, heads, dim)) | dict.fromkeys(
        ("key_grads", "value_grads"), torch.ones(1, 200, heads, dim)
    )
    state = method.start(fmt, heads * dim, 200)
    for name in method.passes:
        state = method.see(fmt, name, state, data)
    return method.finish(fmt, state)


def through(coder, x: Tensor, static) -> Tensor:
    packed = coder.encode(x, static)
    for name, field in coder.layout(*x.shape[-2:]).items():
        assert packed[name].shape == (*x.shape[:2], *field.shape)
        assert packed[name].dtype == field.dtype
    assert set(packed) == set(coder.layout(*x.shape[-2:]))
    out = coder.decode(packed, static, *x.shape[-2:])
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    return out


def coders(fmt: KVFormat):
    return (fmt.keys, fmt.values)


def test_every_cache_format_is_tested():
    assert set(OPTIONS) == set(PRESETS)
    assert {fmt for fmt, _ in PRESETS.values()} == set(plugins.names("formats.kv"))


@FORMATS
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_what_is_stored_has_the_layout_and_one_decoding(fmt, heads, dim):
    static = static_of(fmt, heads, dim)
    schema.check(static, fmt.static(heads, dim), "cache.0")
    fmt.check_static(static, heads, dim, "cache.0")
    for coder in coders(fmt):
        x = normal(2, GROUPS, coder.group, heads, dim, seed=1)
        kept = x.clone()
        out = through(coder, x, static)
        assert x.equal(kept)
        assert torch.isfinite(out).all()
        assert through(coder, x, static).equal(out)
        packed = coder.encode(x, static)
        assert sum(t[0, 0].nbytes for t in packed.values()) == schema.nbytes(coder.layout(heads, dim))
        alone = coder.encode(x[1:, 1:2].contiguous(), static)
        assert all(alone[name].equal(t[1:, 1:2]) for name, t in packed.items())
        part = {name: t[:, 1:] for name, t in packed.items()}
        assert coder.decode(part, static, heads, dim).equal(out[:, 1:])


@FORMATS
def test_no_groups_are_no_tokens(fmt):
    static = static_of(fmt, 3, 20)
    for coder in coders(fmt):
        assert through(coder, torch.zeros(1, 0, coder.group, 3, 20), static).numel() == 0


@pytest.mark.parametrize("value", [0.0, 0.37, -1e-3, 1e-9, 1e4, -65504.0, 1e30, -1e30])
@FORMATS
def test_constants_make_neither_nan_nor_infinity(fmt, value):
    static = static_of(fmt, 3, 20)
    for coder in coders(fmt):
        out = through(coder, torch.full((1, 2, coder.group, 3, 20), value), static)
        assert torch.isfinite(out).all()
        if coder is fmt.values and fmt.name != "sdr" and abs(value) < 1e5:
            torch.testing.assert_close(out, torch.full_like(out, value), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e3, 1e30])
@FORMATS
def test_huge_and_tiny_numbers_stay_finite(fmt, factor):
    static = static_of(fmt, 3, 20)
    for coder in coders(fmt):
        assert torch.isfinite(through(coder, normal(1, 2, coder.group, 3, 20) * factor, static)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda bits: make_kv("kivi-4bit", {"bits": bits}),
        lambda bits: make_kv("kvquant-4bit", {"bits": bits}),
        lambda bits: make_kv("kvquant-4bit", {"bits": bits, "uniform": True}),
        lambda bits: make_kv("sdr-4bit", {"bits": bits}),
    ],
    ids=["kivi", "nuq", "uniform", "sdr"],
)
def test_more_bits_are_closer(make):
    for side in ("keys", "values"):
        errors = []
        for bits in (2, 3, 4):
            fmt = make(bits)
            coder = getattr(fmt, side)
            x = normal(1, 64 // coder.group, coder.group, 3, 64, seed=2)
            out = through(coder, x, static_of(fmt, 3, 64))
            errors.append(float((out - x).square().mean() / (x - x.mean((0, 1, 2))).square().mean()))
        assert errors[0] < 0.8
        assert errors[1] < 0.6 * errors[0]
        assert errors[2] < 0.6 * errors[1]


@FORMATS
def test_sizes_follow_from_the_layout(fmt):
    tokens, heads, dim = 300, 3, 20
    expected = 0
    for coder in coders(fmt):
        packed = packed_after(coder, tokens - fmt.sink_tokens, fmt.residual_window)
        expected += packed // coder.group * schema.nbytes(coder.layout(heads, dim)) + (tokens - packed) * 60 * 2
    assert predicted_nbytes(fmt, tokens, heads, dim, 2) == expected


@FORMATS
def test_a_format_survives_json(fmt):
    assert kv_from_json(json.loads(json.dumps(kv_json(fmt))), "config.json") == fmt


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_name_and_typed_options(name):
    assert kv_name(make_kv(name)) == name
    assert 1 <= len(kv_options(name)) <= 8
    assert set(kv_options(name).values()) <= {int, float, bool}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kvquant-4bit", {"bits": 5}, "bits must be a whole number from 2 to 4, found '5'"),
        ("kvquant-4bit", {"outlier_rate": 0.6}, "outlier_rate must be a number from 0 to 0.5"),
        ("kvquant-4bit", {"outlier_rate": float("nan")}, "outlier_rate must be"),
        ("kvquant-4bit", {"outlier_rate": True}, "outlier_rate must be"),
        ("kvquant-4bit", {"sink_tokens": -1}, "sink_tokens must be"),
        ("kvquant-4bit", {"uniform": 1}, "uniform must be true or false"),
        ("sdr-4bit", {"bits": 8}, "bits must be a whole number from 2 to 7"),
        ("sdr-4bit", {"group_size": 1}, "group_size must be"),
        ("sdr-4bit", {"residual_window": "x"}, "kv.residual_window: expected a whole number, found 'x'"),
        ("kivi-4bit", {"residual_window": 33}, "residual_window must be 0 or a multiple of the group size 32"),
    ],
)
def test_options_out_of_range_are_usage_errors(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_kv(name, options)


# ---- NUQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["keys", "values"])
def test_slots_hold_the_largest_errors_and_make_them_exact(side):
    fmt = make_kv("kvquant-2bit", {"outlier_rate": 0.05})
    bare = make_kv("kvquant-2bit", {"outlier_rate": 0})
    static = static_of(fmt, 3, 64)
    coder = getattr(fmt, side)
    x = normal(2, 5, 1, 3, 64, seed=3)
    x[0, 2, 0, 1, 7] = 900.0
    packed = coder.encode(x, static)
    out = coder.decode(packed, static, 3, 64)
    dense = {name: t for name, t in packed.items() if not name.startswith("outlier")}
    left = (x - getattr(bare, side).decode(dense, static, 3, 64)).flatten(2)
    cost = left * static["k_importance"].float() if side == "keys" else left
    at = packed["outlier_channels"].flatten(2).long()
    assert at.shape[-1] == coder.slots(192) == 10
    assert all(len(set(row.tolist())) == 10 for row in at.flatten(0, 1))
    assert cost.gather(-1, at).abs().amin(-1).ge(cost.scatter(-1, at, 0).abs().amax(-1)).all()
    exact = out.flatten(2).gather(-1, at), x.flatten(2).gather(-1, at)
    assert (exact[0] - exact[1]).abs().le(left.gather(-1, at).abs() * 2**-10).all()


def test_equal_numbers_take_no_more_slots_than_there_are():
    fmt = make_kv("kvquant-4bit")
    packed = fmt.values.encode(torch.tensor([-1.0, 1.0]).repeat(96).view(1, 1, 1, 3, 64), static_of(fmt, 3, 64))
    assert packed["outlier_values"].shape == (1, 1, 1, 2)


def test_channels_beyond_signed_numbers_are_found_again():
    fmt = make_kv("kvquant-4bit", {"outlier_rate": 1e-5, "per_channel": False})
    static = static_of(fmt, 3, 64)
    x = torch.zeros(1, 1, 1, 512, 128)
    x[0, 0, 0, 500, 3] = 7.0
    assert fmt.keys.decode(fmt.keys.encode(x, static), static, 512, 128).equal(x)
    with pytest.raises(UsageError, match="at most 65536"):
        fmt.keys.layout(513, 128)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_lower", lambda t: t * float("nan"), "cache.7.k_lower: expected finite numbers, found NaN"),
        ("v_lut", lambda t: t + float("inf"), "cache.7.v_lut: expected finite"),
        ("k_lut", lambda t: t.flip(0), "cache.7.k_lut: expected sorted numbers"),
        ("v_lut", lambda t: t * 100, "cache.7.v_lut: expected numbers up to 2"),
        ("k_upper", lambda t: t * 0 - 500, "cache.7.k_upper: expected more than k_lower"),
        ("k_importance", lambda t: t * 0, "cache.7.k_importance: expected numbers above 0"),
        ("v_qnorm", lambda t: t * 0, "cache.7.v_qnorm: expected a scale near 1"),
    ],
)
def test_statics_that_would_mislead_are_refused_by_name(name, change, message):
    fmt = make_kv("kvquant-2bit", {"qnorm": True})
    static = static_of(fmt, 3, 20)
    with pytest.raises(LayoutError, match=message):
        fmt.check_static({**static, name: change(static[name])}, 3, 20, "cache.7")


def test_a_token_of_many_heads_costs_what_the_paper_says():
    bits = [8 * schema.nbytes(make_kv("kvquant-3bit").values.layout(32, 128)) / 4096]
    bits += [8 * schema.nbytes(make_kv("kvquant-3bit").keys.layout(32, 128)) / 4096]
    assert bits == [pytest.approx(3.336, abs=1e-3), pytest.approx(3.328, abs=1e-3)]
