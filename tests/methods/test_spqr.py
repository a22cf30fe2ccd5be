"""SpQR against brute force, and what it promises about outliers."""

import pytest
import torch
from torch import Tensor

from qexport.formats.spqr import Spqr as SpqrFormat
from qexport.formats.uniform import Uniform
from qexport.methods._outliers import likely_outliers
from qexport.methods.gptq import Gptq
from qexport.methods.spqr import Spqr
from qexport.statistics import Hessian
from tests.methods.test_columns import loss, problem


def decoded(fmt: SpqrFormat, found: object) -> Tensor:
    """The weight of a result in natural order, read back from its packed tensors."""
    n, k = found.fields["codes"].shape  # type: ignore[attr-defined]
    w = fmt.decode(fmt.unpack(fmt.pack(found.fields), n, k))  # type: ignore[attr-defined]
    if found.perm is None:  # type: ignore[attr-defined]
        return w
    natural = torch.empty_like(w)
    natural[:, found.perm] = w  # type: ignore[attr-defined]
    return natural


def test_likely_outliers_equal_brute_force_over_every_weight() -> None:
    fmt = SpqrFormat()
    w, pivots = torch.randn(64, 16), torch.rand(16) + 0.5
    w[torch.rand(64, 16) < 0.05] *= 5

    def error(part: Tensor, scale: Tensor) -> Tensor:
        params = fmt.spread(part.amin(1, keepdim=True), part.amax(1, keepdim=True))
        return ((part - fmt.value(fmt.nearest(part, params), params)) / scale).square().sum(1)

    everything = error(w, pivots)
    gain = torch.stack(
        [everything - error(w[:, [i for i in range(16) if i != j]], pivots[[i for i in range(16) if i != j]])
         for j in range(16)], 1
    )  # fmt: skip
    assert torch.equal(likely_outliers(w, pivots, torch.full((64, 1), 0.3), fmt), gain > 0.3)


@pytest.mark.parametrize("order", ["act", "group"])
def test_outlier_rate_is_met_and_outliers_lower_the_error(order: str) -> None:
    w, h = problem(64, 96)
    w[torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) < 0.004] *= 6
    fmt = SpqrFormat()
    found = Spqr(outlier_rate=0.02, order=order).quantize(w, {Hessian: h}, fmt, torch.Generator())
    assert found.fields["outlier_values"].numel() == pytest.approx(0.02 * w.numel(), rel=0.25)
    plain = Gptq(order=order).quantize(w, {Hessian: h}, fmt, torch.Generator())
    assert loss(w, decoded(fmt, found), h) < 0.8 * loss(w, decoded(fmt, plain), h)


def test_outliers_are_differences_so_the_decoded_weight_is_nearly_exact_there() -> None:
    w, h = problem(32, 48)
    w[4, 7] = 30.0
    found = Spqr(order="group").quantize(w, {Hessian: h}, SpqrFormat(), torch.Generator())
    columns = found.fields["outlier_columns"][found.fields["outlier_rows"][4] : found.fields["outlier_rows"][5]]
    assert 7 in columns.tolist()
    assert decoded(SpqrFormat(), found)[4, 7].item() == pytest.approx(30.0, rel=0.05)


def test_rows_need_not_be_a_multiple_of_the_statistics_block() -> None:
    w, h = problem(41, 40)
    fmt = SpqrFormat()
    for found, part in zip(
        Spqr().quantize_group([w[:19], w[19:]], {Hessian: h}, [fmt, fmt], torch.Generator()),
        (w[:19], w[19:]),
        strict=True,
    ):
        assert decoded(fmt, found).shape == part.shape
        assert loss(part, decoded(fmt, found), h) < 0.1 * loss(part, torch.zeros_like(part), h)


def test_members_share_one_permutation() -> None:
    w, h = problem(32, 40)
    a, b = Spqr().quantize_group([w[:16], w[16:]], {Hessian: h}, [SpqrFormat()] * 2, torch.Generator())
    assert a.perm is not None
    assert torch.equal(a.perm, b.perm)


def test_other_formats_are_refused_with_the_reason() -> None:
    assert "outliers" in str(Spqr().reject(Uniform()))
    assert Spqr().reject(SpqrFormat()) is None
