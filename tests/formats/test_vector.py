"""Vector codebooks: what an index means, sizes that follow from the matrix, gradients, and hostile contents."""

import pytest
import torch

from qexport import schema
from qexport.errors import LayoutError
from qexport.formats.base import ScalarGrid, bits_per_weight, dequantize
from qexport.formats.vector import Vector

WHERE = "model.layers.3.q_proj"
ALL = Vector(vector_length=3, index_bits=5, residual_bits=9, group_size=16, outlier_columns=3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_codes_several_weights_at_a_time():
    assert not isinstance(Vector(), ScalarGrid)


def round_trip(fmt, fields, n, k):
    return dequantize(fmt, fmt.pack(fields), n, k)


def test_decode_equals_a_plain_statement(fields_of):
    n, k, v = 35, 45, 3
    fields = fields_of(ALL, normal(n, k))
    rng = torch.Generator().manual_seed(1)
    fields["indices"] = torch.randint(0, 32, fields["indices"].shape, generator=rng, dtype=torch.int32)
    found = round_trip(ALL, fields, n, k)
    outliers = fields["outlier_index"].tolist()
    for r in range(n):
        for j in range(k):
            value = fields["codebook"][j // 16, fields["indices"][r // v, j], r % v]
            value = value + fields["residual_codebook"][j // 16, fields["residual_indices"][r // v, j], r % v]
            value = value * fields["column_scales"][j] + fields["column_offsets"][j]
            if j in outliers:
                value = fields["outlier_values"][r, outliers.index(j)]
            assert found[r, j] == value


def test_decode_passes_gradients_to_every_float_field_and_changes_none(fields_of):
    fields = fields_of(ALL, normal(20, 33))
    floats = {name: t.clone().requires_grad_() for name, t in fields.items() if t.is_floating_point()}
    assert len(floats) == 5
    out = ALL.decode({**fields, **floats})
    out.square().sum().backward()
    for name, t in floats.items():
        assert t.grad is not None
        assert t.grad.abs().sum() > 0, name
        assert t.detach().equal(fields[name])
    # Of outlier columns only the values count.
    columns = fields["outlier_index"].long()
    assert floats["column_scales"].grad[columns].abs().max() == 0
    torch.testing.assert_close(floats["outlier_values"].grad, 2 * fields["outlier_values"])
    others = [j for j in range(33) if j not in columns]
    torch.testing.assert_close(floats["column_offsets"].grad[others], 2 * out.detach().sum(0)[others])


@pytest.mark.parametrize("k", [1, 31, 33, 70])
@pytest.mark.parametrize("n", [1, 4, 5, 7])
@pytest.mark.parametrize("width", [1, 8, 9, 16])
def test_every_index_survives(width, n, k):
    fmt = Vector(vector_length=5, index_bits=width, normalize=False)
    vectors, rng = -(-n // 5), torch.Generator().manual_seed(0)
    fields = {
        "rows": torch.tensor(n),
        "indices": torch.randint(0, 2**width, (vectors, k), dtype=torch.int32, generator=rng),
        "codebook": normal(1, 2**width, 5).half().float(),
    }
    fields["indices"][0, 0] = 2**width - 1
    packed = fmt.pack(fields)
    assert schema.check(packed, fmt.layout(n, k), WHERE) == {}
    assert ("indices_high" in packed) == (width > 8)
    assert fmt.unpack(packed, n, k)["indices"].equal(fields["indices"])
    assert fmt.decode(fields).shape == (n, k)


@pytest.mark.parametrize("name", ["indices", "residual_indices"])
@pytest.mark.parametrize("bad", [-1, 512])
def test_an_index_that_does_not_fit_is_refused(name, bad, fields_of):
    fields = fields_of(ALL, normal(6, 32))
    fields[name][1, 2] = bad
    with pytest.raises(LayoutError, match=rf"{name}: expected values from 0 to (31|511), found .*{bad}"):
        ALL.pack(fields)


@pytest.mark.parametrize(
    ("options", "n", "k", "expected"),
    [
        ({}, 4096, 4096, (6, 12)),  # indices have at most 12 bits
        ({}, 1536, 1536, (5, 10)),  # 6 rows, 12 bits would take 8.3 % for the codebook
        ({}, 64, 64, (2, 4)),
        ({}, 1, 1, (1, 2)),
        ({"bits": 3}, 4096, 4096, (4, 12)),
        ({"bits": 4}, 4096, 4096, (3, 12)),
        ({"bits": 8}, 4096, 4096, (1, 8)),
        ({"group_size": 128}, 4096, 4096, (5, 10)),
        ({"residual_bits": 12}, 4096, 4096, (6, 12)),
        ({"residual_bits": 16}, 4096, 4096, (5, 10)),
        ({"bits": 1}, 2**20, 4096, (12, 12)),
        ({"vector_length": 6}, 4096, 4096, (6, 12)),
        ({"index_bits": 12}, 4096, 4096, (6, 12)),
        ({"index_bits": 13, "bits": 3}, 64, 64, (4, 13)),
        ({"index_bits": 1, "bits": 8}, 64, 64, (1, 1)),
        ({"index_bits": 4, "bits": 3}, 64, 64, (1, 4)),  # 4 and 2 bits are as near: the shorter
        ({"vector_length": 6, "index_bits": 9}, 64, 64, (6, 9)),
    ],
)
def test_sizes_follow_from_the_matrix(options, n, k, expected):
    fmt = Vector(**options).sized(n, k)
    assert (fmt.vector_length, fmt.index_bits) == expected
    assert fmt.sized(n, k) == fmt
    assert Vector(**options).layout(n, k) == fmt.layout(n, k)


@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"bits": 1, "group_size": 512}, {"residual_bits": 8}])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1000, 512), (128, 64), (11008, 4096)])
def test_chosen_codebooks_take_at_most_eight_percent_and_the_next_longer_would_not(options, n, k):
    def share(fmt):
        index = -(-n // fmt.vector_length) * k * (fmt.index_bits + fmt.residual_bits)
        return sum(8 * schema.nbytes({"": f}) for name, f in fmt.layout(n, k).items() if "codebook" in name) / index

    fmt = Vector(**options).sized(n, k)
    if fmt.vector_length > 1:
        assert share(fmt) <= 0.08
    if fmt.bits * (fmt.vector_length + 1) <= 12:
        assert share(Vector(**{**options, "vector_length": fmt.vector_length + 1}).sized(n, k)) > 0.08


@pytest.mark.parametrize(("k", "expected"), [(1, 0), (2, 1), (5, 4), (6, 5), (100, 5)])
def test_some_column_is_always_coded(k, expected, fields_of):
    fmt = Vector(outlier_columns=5)
    assert fmt.sized(4, k).outlier_columns == expected
    w = normal(4, k)
    fields = fields_of(fmt, w)
    assert ("outlier_index" in fields) == (expected > 0)
    assert round_trip(fmt, fields, 4, k).shape == (4, k)


def test_outlier_columns_are_the_weights_themselves(fields_of):
    w = normal(10, 64).half().float()
    w[:, [7, 33, 50]] *= 16
    fields = fields_of(ALL, w)
    assert fields["outlier_index"].tolist() == [7, 33, 50]
    assert round_trip(ALL, fields, 10, 64)[:, [7, 33, 50]].equal(w[:, [7, 33, 50]])


def test_a_matrix_with_outlier_columns_is_cut_along_rows_only(fields_of):
    packed = ALL.pack(fields_of(ALL, normal(12, 64)))
    part = ALL.slice(packed, 12, 64, (3, 12), (0, 64))
    assert dequantize(ALL, part, 9, 64).equal(dequantize(ALL, packed, 12, 64)[3:])
    for rows, columns in (((0, 12), (0, 32)), ((0, 12), (32, 64)), ((1, 12), (0, 64)), ((0, 4), (0, 64))):
        with pytest.raises(LayoutError, match="can't be cut"):
            ALL.slice(packed, 12, 64, rows, columns)


def test_what_is_not_sized_yet_is_not_cut(fields_of):
    fmt = Vector()
    assert fmt.shard_multiple == {"n": 0, "k": 0}
    packed = fmt.pack(fields_of(fmt, normal(64, 64)))
    assert fmt.slice(packed, 64, 64, (0, 64), (0, 64)).keys() == packed.keys()
    with pytest.raises(LayoutError, match="can't be cut"):
        fmt.slice(packed, 64, 64, (0, 32), (0, 64))
    assert fmt.sized(64, 64).slice(packed, 64, 64, (0, 32), (32, 64))["indices"].shape == (16, 4)


@pytest.mark.parametrize(("k", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_outlier_columns_are_stored_in_as_few_bytes_as_k_allows(k, dtype):
    fmt = Vector(vector_length=1, index_bits=1, normalize=False, outlier_columns=2)
    fields = {
        "rows": torch.tensor(1),
        "indices": torch.zeros(1, k, dtype=torch.int32),
        "codebook": torch.zeros(1, 2, 1),
        "outlier_index": torch.tensor([5, k - 1], dtype=torch.int32),
        "outlier_values": torch.tensor([[0.5, -0.25]]),
    }
    packed = fmt.pack(fields)
    assert packed["outlier_index"].dtype == dtype
    fmt.check_content(packed, 1, k, WHERE)
    assert fmt.unpack(packed, 1, k)["outlier_index"].equal(fields["outlier_index"])


@pytest.mark.parametrize("bad", [[3, 2, 9], [2, 2, 9], [2, 9, 64], [-1, 2, 9]])
def test_outlier_columns_out_of_place_are_refused(bad, fields_of):
    packed = ALL.pack(fields_of(ALL, normal(6, 64)))
    ALL.check_content(packed, 6, 64, WHERE)
    packed["outlier_index"] = torch.tensor(bad).to(torch.uint16)
    with pytest.raises(LayoutError, match=rf"{WHERE}.outlier_index: expected columns that ascend strictly"):
        ALL.check_content(packed, 6, 64, WHERE)


@pytest.mark.parametrize("name", ["codebook", "residual_codebook", "column_scales", "column_offsets", "outlier_values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(name, bad, fields_of):
    packed = ALL.pack(fields_of(ALL, normal(6, 64)))
    packed[name].view(-1)[-1] = bad
    with pytest.raises(LayoutError, match=rf"{WHERE}.{name}: expected finite values"):
        ALL.check_content(packed, 6, 64, WHERE)


@pytest.mark.parametrize("normalize", [True, False])
def test_bfloat16_where_float16_would_not_do(normalize):
    fmt, w = Vector(normalize=normalize), normal(64, 32)
    assert fmt.resolve(0.02 * w) is fmt
    for factor in (1e5, 1e-6):
        assert fmt.resolve(factor * w).scale_dtype == "bfloat16"
    w[:, 3] *= 1e-6
    assert fmt.resolve(w).scale_dtype == ("bfloat16" if normalize else "float16")
    w[:, 3] = 0
    assert fmt.resolve(w) is fmt


@pytest.mark.parametrize(
    ("options", "n", "k", "expected"),
    [
        ({"vector_length": 6, "index_bits": 12}, 4096, 4096, 2.035),
        ({"vector_length": 8, "index_bits": 16, "residual_bits": 8}, 4096, 4096, 3.51),
        ({"vector_length": 8, "index_bits": 16, "residual_bits": 8}, 4096, 14336, 3.15),
    ],
)
def test_stored_bits_per_weight(options, n, k, expected):
    assert bits_per_weight(Vector(**options), n, k) == pytest.approx(expected, abs=0.01)
