"""SpQR: published accuracy on Gaussian weights, the second level's corner cases, outliers, hostile sparse matrices."""

import pytest
import torch

from qexport.errors import LayoutError
from qexport.formats.base import bits_per_weight
from qexport.formats.spqr import Spqr

WHERE = "model.layers.3.q_proj"


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_error_on_gaussian_weights_without_outliers(fields_of):
    w = normal(256, 4096)
    fmt = Spqr()
    error = (w - fmt.decode(fields_of(fmt, w, outlier_rate=0.0))).square().sum() / w.square().sum()
    assert float(error) == pytest.approx(0.02023, rel=2e-3)


def test_an_outlier_is_added_to_the_dense_value(fields_of):
    fmt, w = Spqr(), normal(37, 70)
    dense, full = fields_of(fmt, w, outlier_rate=0.0), fields_of(fmt, w, outlier_rate=0.2)
    apart = torch.zeros(37, 70, dtype=torch.bool)
    for i in range(37):
        apart[i, full["outlier_columns"][full["outlier_rows"][i] : full["outlier_rows"][i + 1]].long()] = True
    assert 300 < apart.sum() < 800
    decoded = fmt.decode(full)
    assert decoded[~apart].equal(fmt.decode(dense)[~apart])
    torch.testing.assert_close(decoded[apart], w[apart], rtol=0, atol=2e-4)


def test_outlier_fields_may_be_left_out(fields_of):
    fmt, w = Spqr(), normal(20, 40)
    fields = {name: t for name, t in fields_of(fmt, w, outlier_rate=0.0).items() if not name.startswith("outlier")}
    packed = fmt.pack(fields)
    fmt.check_content(packed, 20, 40, WHERE)
    assert packed["outlier_columns"].numel() == 0
    assert fmt.decode(fields).equal(fmt.decode(fmt.unpack(packed, 20, 40)))


@pytest.mark.parametrize(("k", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_columns_are_stored_in_as_few_bytes_as_k_allows(k, dtype):
    fmt = Spqr()
    fields = {
        "codes": torch.zeros(1, k, dtype=torch.uint8),
        "scale_codes": torch.zeros(1, -(-k // 16), dtype=torch.uint8),
        "zero_codes": torch.zeros(1, -(-k // 16), dtype=torch.uint8),
        "stats": torch.tensor([1.0, -1.0, 1.0, 0.0]).expand(1, -(-k // 16), 4),
        "outlier_rows": torch.tensor([0, 2], dtype=torch.int32),
        "outlier_columns": torch.tensor([5, k - 1], dtype=torch.int32),
        "outlier_values": torch.tensor([0.5, -0.25]),
    }
    packed = fmt.pack(fields)
    assert packed["outlier_columns"].dtype == dtype
    fmt.check_content(packed, 1, k, WHERE)
    assert fmt.unpack(packed, 1, k)["outlier_columns"].equal(fields["outlier_columns"])
    cut = k // 32 * 32 - 32
    part = fmt.slice(packed, 1, k, (0, 1), (cut, k))
    assert part["outlier_columns"].dtype == torch.uint16
    assert part["outlier_columns"].tolist() == [k - 1 - cut]


def test_fit_equals_a_plain_statement_of_the_two_levels():
    """Group by group and block by block, in Python floats; the least step is not reached here."""
    fmt, w = Spqr(bits=3, stats_group=8), normal(24, 16, seed=4)
    found = fmt.fit(w, None, None, 0)
    for b in range(3):
        rows = w[8 * b : 8 * b + 8]
        lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = (hi - lo) / 7
        for at, codes, values in ((0, "scale_codes", scale), (2, "zero_codes", -lo / scale)):
            step = ((values.max() - values.min()) / 7).half().float()
            zero = (-values.min() / step).half().float()
            assert found["stats"][b, 0, at] == step
            assert found["stats"][b, 0, at + 1] == zero
            assert found[codes][8 * b : 8 * b + 8, 0].tolist() == (values / step + zero).round().clamp(0, 7).tolist()


def test_parameters_that_fit_derives_are_those_that_readers_compute():
    fmt, w = Spqr(), normal(50, 16)
    found = fmt.fit(w, None, None, 0)
    stored = {name: t for name, t in found.items() if not name.startswith("_")}
    assert stored.keys() < found.keys()
    codes = fmt.nearest(w, found)
    assert codes.equal(fmt.nearest(w, stored))
    assert fmt.value(codes, found).equal(fmt.value(codes, stored))


def test_spread_is_the_first_level_alone():
    fmt = Spqr()
    params = fmt.spread(torch.tensor([[-1.0], [0.5], [0.0]]), torch.tensor([[6.0], [3.5], [0.0]]))
    assert params["_scales"].tolist() == [[1.0], [0.5], [1.0]]
    assert params["_zeros"].tolist() == [[1.0], [0.0], [0.0]]
    w = torch.tensor([[2.2], [1.1], [0.0]])
    assert fmt.value(fmt.nearest(w, params), params).tolist() == [[2.0], [1.0], [0.0]]


def test_an_all_zero_row_decodes_to_zero_and_does_not_disturb_its_neighbours(fields_of):
    w = normal(32, 64)
    w[[3, 17, 18]] = 0
    fmt = Spqr()
    decoded = fmt.decode(fields_of(fmt, w, outlier_rate=0.0))
    assert decoded[[3, 17, 18]].abs().max() < 2e-3
    others = [i for i in range(32) if i not in (3, 17, 18)]
    assert (decoded - w)[others].square().mean() / w[others].square().mean() < 0.03


def test_groups_on_one_side_of_zero_keep_their_zero_within_the_codes():
    w = normal(16, 16)
    w[5] = 1.0 + 0.01 * w[5]
    fmt = Spqr()
    found = fmt.fit(w, None, None, 0)
    assert found["_zeros"].min() >= -0.01
    assert found["_zeros"].max() <= 7.01


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spread", [1e-8, 1e-3, 1.0, 1e3, 1e8, 1e12])
def test_no_scale_ever_decodes_to_zero_or_less(spread, scale_dtype):
    """However far apart the rows of one block are."""
    w = normal(64, 16) * torch.logspace(0, float(torch.tensor(spread).log10()), 64)[:, None] * 1e-4
    fmt = Spqr(scale_dtype=scale_dtype).resolve(w)
    found = fmt.fit(w, None, None, 0)
    assert (found["_scales"] > 0).all()
    assert torch.isfinite(found["stats"]).all()


def test_a_single_row_has_an_accurate_scale(fields_of):
    """One row is its own block: the second level must not cost anything there."""
    w = 0.02 * normal(1, 512)
    bilevel, plain = Spqr(), Spqr(scale_bits=8, zero_bits=8, stats_group=1)
    for fmt in (bilevel, plain):
        found = fmt.fit(w[:, :16], None, None, 0)
        expected = (w[:, :16].max() - w[:, :16].min()) / 7
        torch.testing.assert_close(found["_scales"], expected.view(1, 1), rtol=1e-3, atol=0)


def test_an_unused_part_of_the_last_block_changes_nothing():
    fmt, w = Spqr(), normal(21, 16)
    found = fmt.fit(w, None, None, 0)
    full = fmt.fit(torch.cat([w, w[20:].expand(11, -1)]), None, None, 0)
    assert found["stats"].equal(full["stats"])
    assert found["scale_codes"].equal(full["scale_codes"][:21])


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.0, "float16"), (1e-5, "bfloat16"), (1e6, "bfloat16"), (0.0, "float16")]
)
def test_steps_become_bfloat16_where_float16_would_be_coarser(factor, dtype):
    assert Spqr().resolve(normal(20, 40) * factor).scale_dtype == dtype


def test_stored_bits_per_weight():
    dense = 3 + 6 / 16 + 64 / 256
    rows = 32 * 4097 / 4096**2
    assert bits_per_weight(Spqr(), 4096, 4096, {"nnz": 0}) == pytest.approx(dense + rows)
    assert bits_per_weight(Spqr(), 4096, 4096) == pytest.approx(dense + rows + 0.32, abs=1e-5)


def _damage(name, index, value):
    def apply(packed):
        packed[name] = packed[name].clone()
        packed[name].view(-1)[index] = value

    return apply


def _swap_columns(packed):
    columns, starts = packed["outlier_columns"].to(torch.int32), packed["outlier_rows"].tolist()
    row = next(i for i in range(20) if starts[i + 1] - starts[i] >= 2)
    columns[starts[row]], columns[starts[row] + 1] = columns[starts[row] + 1].item(), columns[starts[row]].item()
    packed["outlier_columns"] = columns.to(torch.uint16)


def _repeat_column(packed):
    columns, starts = packed["outlier_columns"].to(torch.int32), packed["outlier_rows"].tolist()
    row = next(i for i in range(20) if starts[i + 1] - starts[i] >= 2)
    columns[starts[row] + 1] = columns[starts[row]]
    packed["outlier_columns"] = columns.to(torch.uint16)


def _no_entries(packed):
    packed["outlier_columns"], packed["outlier_values"] = packed["outlier_columns"][:0], packed["outlier_values"][:0]


@pytest.mark.parametrize(
    ("damage", "tensor"),
    [
        (_damage("outlier_rows", 0, 1), "outlier_rows"),
        (_damage("outlier_rows", 0, -1), "outlier_rows"),
        (_damage("outlier_rows", 5, 2**31 - 1), "outlier_rows"),
        (_damage("outlier_rows", 5, -(2**31)), "outlier_rows"),
        (_damage("outlier_rows", 7, 0), "outlier_rows"),
        (_damage("outlier_rows", -1, 10**6), "outlier_rows"),
        (_no_entries, "outlier_rows"),
        (_damage("outlier_columns", 0, 40), "outlier_columns"),
        (_damage("outlier_columns", -1, 65535), "outlier_columns"),
        (_swap_columns, "outlier_columns"),
        (_repeat_column, "outlier_columns"),
        (_damage("outlier_values", 3, float("nan")), "outlier_values"),
        (_damage("stats", 0, float("inf")), "stats"),
        (_damage("stats", 0, 0.0), "stats"),
        (_damage("stats", 0, -1.0), "stats"),
        (_damage("stats", 1, 7.0), "stats"),
    ],
)
def test_hostile_contents_are_refused_by_name(damage, tensor, fields_of):
    fmt = Spqr()
    packed = fmt.pack(fields_of(fmt, normal(20, 40), outlier_rate=0.3))
    fmt.check_content(packed, 20, 40, WHERE)
    damage(packed)
    with pytest.raises(LayoutError, match=f"^{WHERE}.{tensor}: expected".replace(".", r"\.")):
        fmt.check_content(packed, 20, 40, WHERE)


def test_negative_columns_are_refused_where_they_are_stored_as_int32():
    fmt = Spqr(group_size=-1)
    k = 65537
    fields = {
        "codes": torch.zeros(1, k, dtype=torch.uint8),
        "scale_codes": torch.zeros(1, 1, dtype=torch.uint8),
        "zero_codes": torch.zeros(1, 1, dtype=torch.uint8),
        "stats": torch.tensor([[[1.0, -1.0, 1.0, 0.0]]]),
        "outlier_rows": torch.tensor([0, 1], dtype=torch.int32),
        "outlier_columns": torch.tensor([-1], dtype=torch.int32),
        "outlier_values": torch.tensor([0.5]),
    }
    with pytest.raises(LayoutError, match="outlier_columns: expected columns from 0 to 65536, found -1 to -1"):
        fmt.check_content(fmt.pack(fields), 1, k, WHERE)


def test_rows_without_outliers_are_fine():
    fmt = Spqr()
    w = normal(20, 40)
    found = fmt.fit(w[:, :16], None, None, 0)
    fields = {
        "codes": fmt.nearest(w[:, :16], found),
        **{name: t for name, t in found.items() if not name.startswith("_")},
        "outlier_rows": torch.tensor([0] * 8 + [2] * 5 + [3] * 8, dtype=torch.int32),
        "outlier_columns": torch.tensor([3, 15, 0], dtype=torch.int32),
        "outlier_values": torch.tensor([1.0, 2.0, 4.0]),
    }
    packed = fmt.pack(fields)
    fmt.check_content(packed, 20, 16, WHERE)
    added = fmt.decode(fields) - fmt.decode({n: t for n, t in fields.items() if not n.startswith("outlier")})
    torch.testing.assert_close(added[[7, 7, 12], [3, 15, 0]], torch.tensor([1.0, 2.0, 4.0]))
    assert added.count_nonzero() == 3
