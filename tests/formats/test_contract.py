"""What every format promises, over many options and shapes."""

import json

import pytest
import torch

from qexport import plugins, schema
from qexport.errors import LayoutError, UsageError
from qexport.formats.base import Format, ScalarGrid, bits_per_weight, dequantize
from qexport.formats.specs import InputSpec, LinearSpec, from_json, make_format, to_json

OPTIONS = {
    "dense": [{}, {"dtype": "bfloat16"}, {"dtype": "float32"}],
    "uniform": [
        {},
        {"bits": 2, "group_size": 16},
        {"bits": 3, "group_size": 64, "scale_dtype": "bfloat16"},
        {"bits": 3, "group_size": -1, "symmetric": True},
        {"bits": 4, "group_size": -1},
        {"bits": 4, "group_size": 24, "symmetric": True},
        {"bits": 5, "group_size": 32},
        {"bits": 6, "group_size": 1},
        {"bits": 7, "group_size": 100},
        {"bits": 8, "group_size": 2**31 - 1, "symmetric": True},
    ],
    "bcq": [
        {},
        {"bits": 1, "group_size": 16, "offset": "none"},
        {"bits": 2, "group_size": -1, "offset": "float32"},
        {"bits": 3, "group_size": 24, "offset": "none", "scale_dtype": "bfloat16"},
        {"bits": 8, "group_size": 100, "scale_dtype": "float32"},
    ],
    "fp_asym": [
        {},
        {"code": "fp4", "group_size": 16, "two_scales": False},
        {"code": "fp3", "group_size": -1},
        {"code": "nf3", "group_size": 24, "scale_dtype": "bfloat16"},
    ],
    "sdr": [
        {},
        {"bits": 2, "group_size": 8, "base_bits": 16},
        {"bits": 4, "group_size": 100, "sign_magnitude": True},
        {"bits": 8, "group_size": -1},
        {"bits": 3, "group_size": 32, "base_bits": 16, "sign_magnitude": True},
    ],
    "spqr": [
        {},
        {"bits": 2, "group_size": 32, "stats_group": 8},
        {"bits": 4, "scale_bits": 4, "zero_bits": 2, "scale_dtype": "bfloat16"},
        {"bits": 8, "group_size": 10, "scale_bits": 8, "zero_bits": 8, "stats_group": 24},
        {"group_size": -1, "scale_bits": 1, "zero_bits": 1, "stats_group": 1},
    ],
    "vector": [
        {},
        {"vector_length": 3, "index_bits": 6, "group_size": 24},
        {"vector_length": 4, "index_bits": 9, "group_size": 64, "normalize": False},
        {"vector_length": 2, "index_bits": 5, "residual_bits": 10, "outlier_columns": 2},
        {"vector_length": 1, "index_bits": 8, "residual_bits": 1, "scale_dtype": "bfloat16"},
        {"bits": 3, "group_size": 32, "normalize": False, "outlier_columns": 1},
    ],
}
CASES = [
    pytest.param(make_format(name, options), id=f"{name}-{i}")
    for name, many in OPTIONS.items()
    for i, options in enumerate(many)
]
SHAPES = [(1, 1), (1, 70), (33, 1), (5, 7), (37, 131), (64, 128)]
FORMATS = pytest.mark.parametrize("fmt", CASES)
GRIDS = pytest.mark.parametrize("fmt", [c for c in CASES if isinstance(c.values[0], ScalarGrid)])


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_every_format_is_tested():
    assert set(plugins.names("formats")) == set(OPTIONS)


@FORMATS
def test_formats_keep_the_protocol(fmt):
    assert isinstance(fmt, Format)
    assert fmt.source
    assert fmt.version == 1
    assert {"n", "k"} == set(fmt.shard_multiple)
    assert plugins.get("formats", fmt.name) is type(fmt)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@FORMATS
def test_packing_is_undone_bit_for_bit_and_fits_the_layout(fmt, n, k, fields_of):
    fields = fields_of(fmt, normal(n, k))
    packed = fmt.pack(fields)
    layout = fmt.layout(n, k)
    extents = schema.check(packed, layout, "m")
    fmt.check_content(packed, n, k, "m")
    assert schema.nbytes(layout, extents) == sum(t.nbytes for t in packed.values())
    assert all(t.is_contiguous() for t in packed.values())
    assert set(extents) == set(fmt.expected_extents(n, k))

    again = fmt.unpack(packed, n, k)
    assert again.keys() == fields.keys()
    for name, field in fields.items():
        assert field.dtype == again[name].dtype
        assert field.shape == again[name].shape
        assert field.flatten().view(torch.uint8).equal(again[name].flatten().view(torch.uint8)), name

    decoded = fmt.decode(again)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (n, k)
    assert decoded.equal(fmt.decode(fields))
    assert decoded.equal(dequantize(fmt, packed, n, k))


@GRIDS
def test_decoding_is_what_value_says_group_by_group(fmt, fields_of):
    n, k = 37, 131
    fields = fields_of(fmt, normal(n, k), outlier_rate=0.0)
    decoded = fmt.decode(fields)
    size = k if fmt.group_size == -1 else fmt.group_size
    for g, j in enumerate(range(0, k, size)):
        params = {p: t[:, g : g + 1] for p, t in fields.items() if p != "codes" and not p.startswith("outlier")}
        codes = fields["codes"][:, j : j + size]
        assert fmt.value(codes, params).equal(decoded[:, j : j + size])
        assert fmt.nearest(decoded[:, j : j + size], params).equal(codes)
        assert fmt.nearest(decoded[:, j : j + 1], params).equal(codes[:, :1])


@FORMATS
def test_a_slice_decodes_to_the_same_bits(fmt, fields_of):
    step_n, step_k = (min(fmt.shard_multiple[axis], 256) for axis in "nk")
    n, k = 2 * step_n + 5, 2 * step_k + 7  # a step of 0 leaves one range, the whole axis
    packed = fmt.pack(fields_of(fmt, normal(n, k)))
    whole = dequantize(fmt, packed, n, k)
    steps_k = [0, step_k, 2 * step_k, k] if fmt.shard_multiple["k"] <= 256 else [0, k]
    for rows in {(0, n), (0, step_n), (step_n, 2 * step_n), (step_n, n), (2 * step_n, n)} - {(0, 0)}:
        for columns in [(a, b) for a in steps_k for b in steps_k if a < b]:
            part = fmt.slice(packed, n, k, rows, columns)
            size = rows[1] - rows[0], columns[1] - columns[0]
            schema.check(part, fmt.layout(*size), "part")
            fmt.check_content(part, *size, "part")
            assert dequantize(fmt, part, *size).equal(whole[slice(*rows), slice(*columns)])
    with pytest.raises(LayoutError, match="can't be cut"):
        fmt.slice(packed, n, k, (0, n + 1), (0, k))


@FORMATS
def test_sizing_twice_is_sizing_once_and_stores_the_same(fmt, fields_of):
    for n, k in SHAPES:
        own = fmt.sized(n, k)
        assert own.sized(n, k) == own
        assert own.layout(n, k) == fmt.layout(n, k)
        packed = own.pack(fields_of(fmt, normal(n, k)))
        assert dequantize(own, packed, n, k).equal(dequantize(fmt, packed, n, k))


def test_a_slice_keeps_nothing_else_in_memory(fields_of):
    for fmt in (*(c.values[0] for c in CASES[:4]), make_format("vector", OPTIONS["vector"][2])):
        packed = fmt.pack(fields_of(fmt, normal(64, 256)))
        part = fmt.slice(packed, 64, 256, (0, 32), (0, 256))
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in part.values())


@FORMATS
def test_all_zero_decodes_to_zero(fmt, fields_of):
    w = torch.zeros(19, 40)
    packed = fmt.resolve(w).pack(fields_of(fmt.resolve(w), w))
    fmt.check_content(packed, 19, 40, "m")
    assert dequantize(fmt, packed, 19, 40).equal(w)


@pytest.mark.parametrize("constant", [0.37, -1e-3])
@FORMATS
def test_a_constant_matrix_is_kept_to_the_precision_of_its_scales(fmt, constant, fields_of):
    w = torch.full((19, 40), constant)
    fmt = fmt.resolve(w)
    packed = fmt.pack(fields_of(fmt, w))
    fmt.check_content(packed, 19, 40, "m")
    # A razored integer keeps so many bits, whatever the other weights are: its scale is the row's.
    rtol = 0.5 ** (fmt.bits - 1) if fmt.name == "sdr" else 1e-2
    torch.testing.assert_close(dequantize(fmt, packed, 19, 40), w, rtol=rtol, atol=0)


@pytest.mark.parametrize("factor", [1e30, 1e6, 1e-6, 1e-30])
@FORMATS
def test_huge_and_tiny_weights_keep_their_accuracy_once_resolved(fmt, factor, fields_of):
    w = normal(37, 131)

    def error(w):
        own = fmt.resolve(w)
        packed = own.pack(fields_of(own, w))
        own.check_content(packed, 37, 131, "m")
        extents = schema.extents_of(packed, own.layout(37, 131))
        assert schema.nbytes(own.layout(37, 131), extents) == schema.nbytes(fmt.layout(37, 131), extents)
        largest = w.abs().max()
        return float((dequantize(own, packed, 37, 131) / largest - w / largest).square().mean().sqrt())

    if fmt.name == "dense" and factor < 1:
        pytest.skip("a dense weight below float16's range is rounded, as in any float16 model")
    assert error(w * factor) <= 1.05 * error(w) + 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@FORMATS
def test_weights_that_are_not_finite_are_refused(fmt, bad, fields_of):
    w = normal(37, 70)
    w[20, 33] = bad

    def pack_and_check():
        packed = fmt.pack(fields_of(fmt, w))
        fmt.check_content(packed, 37, 70, "model.layers.0.mlp.up_proj")

    with pytest.raises(LayoutError):
        pack_and_check()


@GRIDS
def test_fit_leaves_its_input_alone_and_ignores_its_strides(fmt):
    w = normal(48, 16)
    kept = w.clone()
    found = fmt.fit(w, None, fmt.begin(w), 0)
    assert w.equal(kept)
    other = fmt.fit(w.T.contiguous().T, None, fmt.begin(w), 0)
    assert all(found[name].equal(other[name]) for name in found)
    one = fmt.fit(w[:, :1], None, fmt.begin(w), 0)
    fmt.value(fmt.nearest(w[:, :1], one), one)
    assert w.equal(kept)


@GRIDS
def test_rows_may_be_fitted_apart_at_multiples_of_the_row_block(fmt):
    step = fmt.row_block
    w = normal(3 * step + min(2, step - 1), 16)
    whole = fmt.fit(w, None, fmt.begin(w), 0)
    rows = [w[i : i + step] for i in range(0, w.shape[0], step)]
    parts = [fmt.fit(part, None, fmt.begin(part), 0) for part in rows]
    for name, t in whole.items():
        assert torch.cat([p[name] for p in parts]).equal(t), name


@FORMATS
def test_the_default_dtype_changes_nothing(fmt, fields_of):
    w = normal(20, 70)
    expected = fmt.pack(fields_of(fmt, w))
    torch.set_default_dtype(torch.float64)
    try:
        packed = fmt.pack(fields_of(fmt, w))
        assert dequantize(fmt, packed, 20, 70).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    if "outlier_rows" not in expected:  # the places of the test's own outliers depend on the default dtype
        assert all(packed[name].equal(expected[name]) for name in packed)


@FORMATS
def test_a_spec_survives_json(fmt):
    spec = LinearSpec(fmt, InputSpec(permute=True))
    assert from_json(json.loads(json.dumps(to_json(spec))), "config.json") == spec


@FORMATS
def test_tables_and_sizes_follow_from_the_layout(fmt):
    table = schema.markdown_table(fmt.layout(64, 256))
    assert all(f"| `{name}` |" in table for name in fmt.layout(64, 256))
    assert 0 < bits_per_weight(fmt, 64, 256) <= 40


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uniform", {"bits": 1}, "bits must be a whole number from 2 to 8, found '1'"),
        ("uniform", {"bits": True}, "bits must be"),
        ("uniform", {"bits": 4.0}, "bits must be"),
        ("uniform", {"group_size": 0}, "group_size must be a whole number from 1 on, or -1"),
        ("uniform", {"group_size": 10**30}, "group_size must be"),
        ("uniform", {"symmetric": 1}, "symmetric must be true or false"),
        ("uniform", {"scale_dtype": "float32"}, "scale_dtype must be float16 or bfloat16"),
        ("uniform", {"scale_dtype": ["float16"]}, "scale_dtype must be float16 or bfloat16"),
        ("spqr", {"bits": 9}, "bits must be"),
        ("spqr", {"scale_bits": 0}, "scale_bits must be a whole number from 1 to 8"),
        ("spqr", {"zero_bits": "3"}, "zero_bits must be"),
        ("spqr", {"stats_group": 0}, "stats_group must be"),
        ("vector", {"bits": 0}, "bits must be a whole number from 1 to 8"),
        ("vector", {"vector_length": 33}, "vector_length must be a whole number from 0 to 32"),
        ("vector", {"index_bits": 17}, "index_bits must be a whole number from 0 to 16"),
        ("vector", {"bits": 3, "vector_length": 6}, "at most 5 at 3 bits, unless index_bits is given, found '6'"),
        ("vector", {"residual_bits": 17}, "residual_bits must be"),
        ("vector", {"outlier_columns": -1}, "outlier_columns must be"),
        ("vector", {"group_size": 0}, "group_size must be"),
        ("vector", {"normalize": 1}, "normalize must be true or false"),
        ("vector", {"scale_dtype": "float32"}, "scale_dtype must be float16 or bfloat16"),
        ("dense", {"dtype": "int8"}, "dtype must be float16 or bfloat16 or float32"),
    ],
)
def test_options_out_of_range_are_usage_errors(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_format(name, options)


@FORMATS
def test_random_fields_are_fields(fmt):
    n, k = 37, 131
    fmt, rng = fmt.sized(n, k), torch.Generator().manual_seed(0)
    fields = fmt.random(n, k, rng)
    packed = fmt.pack(fields)
    schema.check(packed, fmt.layout(n, k), "m")
    fmt.check_content(packed, n, k, "m")
    found = fmt.unpack(packed, n, k)
    assert all(torch.equal(found[name].float(), fields[name].float()) for name in found)
    assert 0.01 < fmt.decode(fields).abs().mean() < 100
    assert not torch.equal(fmt.decode(fmt.random(n, k, rng)), fmt.decode(fields))
