"""VPTQ: its k-means, its Hessian after normalisation, and that every step lowers the error at the output."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport import plugins
from qexport.errors import UsageError
from qexport.formats.base import Format
from qexport.formats.bcq import Bcq as BcqFormat
from qexport.formats.uniform import Uniform
from qexport.formats.vector import Vector
from qexport.methods._kmeans import centres, kmeans, largest, nearest
from qexport.methods.bcq import Bcq
from qexport.methods.gptq import Gptq
from qexport.methods.vptq import Vptq
from qexport.statistics import Hessian
from tests.methods.test_columns import loss, problem

FMT = Vector(vector_length=4, index_bits=6)
ONLY_KMEANS = Vptq(feedback=False, rounds=0, sample=0)
ONLY_LOOP = Vptq(passes=1, rounds=0, sample=0)


def coded(w: Tensor, hessian: Tensor, fmt: Format, method: Any, seed: int = 0) -> Tensor:
    """What is read back, float32 [n, k]."""
    found = method.quantize(w, {Hessian: hessian}, fmt, torch.Generator().manual_seed(seed))
    assert found.perm is None
    packed = fmt.pack(found.fields)
    unpacked = fmt.unpack(packed, *w.shape)
    assert all(unpacked[name].equal(found.fields[name]) for name in unpacked)
    return fmt.decode(unpacked)


def error(w: Tensor, hessian: Tensor, fmt: Format, method: Any, seed: int = 0) -> float:
    """tr(D H D^T) / tr(W H W^T)."""
    return loss(w, coded(w, hessian, fmt, method, seed), hessian) / loss(w, torch.zeros_like(w), hessian)


def scaled_problem(n: int = 256, k: int = 128) -> tuple[Tensor, Tensor]:
    """A weight whose columns have scales of their own, log-normal, and a Hessian."""
    w, hessian = problem(n, k)
    return w * torch.randn(k, generator=torch.Generator().manual_seed(1)).exp(), hessian


# ---- k-means -----------------------------------------------------------------------------------


def test_two_bits_in_vectors_of_four_have_the_known_error_on_normal_weights() -> None:
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    fmt = Vector(vector_length=4, index_bits=8, normalize=False)
    method = replace(ONLY_KMEANS, iterations=25)
    assert error(w, torch.eye(1024), fmt, method) == pytest.approx(0.0936, rel=0.03)


def test_two_bits_in_vectors_of_six_have_the_known_error_on_the_vectors_that_they_were_fitted_to() -> None:
    w = torch.randn(60, 6144, generator=torch.Generator().manual_seed(0))  # 15 vectors an entry
    fmt = Vector(vector_length=6, index_bits=12, normalize=False)
    method = replace(ONLY_KMEANS, iterations=6, sample=0)
    assert error(w, torch.eye(6144), fmt, method) == pytest.approx(0.0724, rel=0.03)


def test_nearest_is_the_nearest() -> None:
    rng = torch.Generator().manual_seed(0)
    for count in (1, 3, 100, 256, 384):
        x, entries = torch.randn(50, 3, generator=rng), torch.randn(count, 3, generator=rng)
        assert nearest(x, entries).equal(torch.cdist(x, entries).argmin(1))
        scores = torch.randn(9, count, generator=rng)
        assert largest(scores).equal(scores.argmax(1))


def test_an_entry_is_the_weighted_mean_of_its_vectors_and_stays_if_it_has_none() -> None:
    x, entries = torch.tensor([[1.0], [2.0], [8.0]]), torch.tensor([[0.0], [5.0], [9.0]])
    found = centres(x, torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 2]), entries)
    assert found.equal(torch.tensor([[1.75], [5.0], [8.0]]))


def test_kmeans_finds_clusters_far_apart_and_leaves_none_empty() -> None:
    rng = torch.Generator().manual_seed(0)
    middles = torch.cartesian_prod(torch.arange(8.0), torch.arange(4.0))
    x = (middles.unsqueeze(1) + 0.01 * torch.randn(32, 40, 2, generator=rng)).flatten(0, 1)
    entries = kmeans(x, torch.ones(x.shape[0]), 64, 20, 0, rng)
    at = nearest(x, entries)
    assert at.unique().numel() == 64
    assert (x - entries[at]).square().mean() < 1e-4


def test_a_sample_does_not_miss_the_few_vectors_that_hold_most_of_the_squares() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 3, generator=rng)
    x[:12] *= 300
    everything, some = (kmeans(x, torch.ones(20000), 32, 10, sample, rng) for sample in (0, 16))
    errors = [float((x - entries[nearest(x, entries)]).square().mean()) for entries in (some, everything)]
    assert errors[0] < 1.5 * errors[1]


def test_kmeans_with_fewer_vectors_than_entries_keeps_every_vector() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    entries = kmeans(x, torch.ones(5), 16, 5, 0, torch.Generator())
    assert entries.shape == (16, 3)
    torch.testing.assert_close(entries[nearest(x, entries)], x)


# ---- the error at the output -------------------------------------------------------------------


def test_the_hessian_of_normalised_columns_is_scaled_with_them() -> None:
    w, hessian = scaled_problem()
    plain, fmt = replace(FMT, normalize=False), FMT
    right = error(w, hessian, fmt, ONLY_LOOP)
    middle, deviation = w.mean(0), w.std(0)

    def with_hessian_of_the_weights_as_they_were(method: Vptq) -> float:
        decoded = coded((w - middle) / deviation, hessian, plain, method) * deviation + middle
        return loss(w, decoded, hessian) / loss(w, torch.zeros_like(w), hessian)

    assert right < 0.75 * error(w, hessian, plain, ONLY_LOOP)
    assert right < 0.6 * with_hessian_of_the_weights_as_they_were(ONLY_LOOP)
    assert error(w, hessian, fmt, ONLY_KMEANS) < with_hessian_of_the_weights_as_they_were(ONLY_KMEANS)


def test_every_step_lowers_the_error() -> None:
    w, hessian = scaled_problem()
    errors = [
        error(w, hessian, FMT, ONLY_KMEANS),
        error(w, hessian, FMT, ONLY_LOOP),
        error(w, hessian, FMT, replace(ONLY_LOOP, passes=3)),
        error(w, hessian, FMT, Vptq(rounds=1)),
        error(w, hessian, FMT, Vptq(rounds=4)),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_rounds_of_descent_never_raise_the_error() -> None:
    w, hessian = problem(64, 64)
    errors = [error(w, hessian, FMT, Vptq(damp=0.0, rounds=rounds)) for rounds in range(6)]
    assert all(after <= before * 1.001 for before, after in pairwise(errors))


def test_it_beats_scalar_methods_that_store_more() -> None:
    w, hessian = problem(512, 128)
    found = error(w, hessian, Vector(vector_length=4, index_bits=8), Vptq())
    assert found < 0.75 * error(w, hessian, Uniform(2, 32), Gptq(clip=12))
    assert found < 0.85 * error(w, hessian, BcqFormat(2, 64), Bcq())


def test_a_second_codebook_lowers_the_error() -> None:
    w, hessian = scaled_problem()
    one = error(w, hessian, FMT, Vptq())
    two = error(w, hessian, replace(FMT, residual_bits=4), Vptq())
    assert two < 0.6 * one
    assert two < error(w, hessian, replace(FMT, residual_bits=4), Vptq(tries=1))


def test_columns_kept_apart_lower_the_error_and_are_those_that_matter() -> None:
    w, hessian = problem(128, 64)
    hessian[:, [5, 40]] *= 6
    hessian[[5, 40]] *= 6
    fmt = replace(FMT, outlier_columns=2)
    found = Vptq().quantize(w, {Hessian: hessian}, fmt, torch.Generator()).fields
    assert found["outlier_index"].tolist() == [5, 40]
    assert error(w, hessian, fmt, Vptq()) < 0.9 * error(w, hessian, FMT, Vptq())


def test_columns_kept_apart_take_up_errors_of_the_others() -> None:
    w, hessian = problem(64, 32)
    fmt = replace(FMT, outlier_columns=3)
    decoded = coded(w, hessian, fmt, Vptq(damp=0.0))
    kept = Vptq(damp=0.0).quantize(w, {Hessian: hessian}, fmt, torch.Generator().manual_seed(0)).fields["outlier_index"]
    pull = (w - decoded) @ hessian
    assert (pull[:, kept.long()].abs() / hessian.diagonal()[kept.long()]).max() < 2e-3
    as_they_were = decoded.clone()
    as_they_were[:, kept.long()] = w[:, kept.long()]
    assert loss(w, decoded, hessian) < loss(w, as_they_were, hessian)


def test_groups_with_codebooks_of_their_own_lower_the_error() -> None:
    w, hessian = problem(256, 96)
    w[:, 48:] = w[:, 48:].sign() * w[:, 48:].abs().sqrt()
    assert error(w, hessian, replace(FMT, group_size=48), Vptq()) < error(w, hessian, FMT, Vptq())


# ---- shapes and odd input ----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 40), (3, 8), (37, 1), (37, 24), (64, 130)])
@pytest.mark.parametrize("fmt", [Vector(), FMT, replace(FMT, residual_bits=3, group_size=20, outlier_columns=2)])
def test_any_shape_will_do(n: int, k: int, fmt: Vector) -> None:
    w, hessian = problem(n, k)
    assert error(w, hessian, fmt, Vptq()) < 0.8


def test_rows_that_fill_the_last_vector_do_not_count() -> None:
    w, hessian = problem(65, 48)
    assert error(w, hessian, FMT, Vptq()) < 1.1 * error(w[:64], hessian, FMT, Vptq())


@pytest.mark.parametrize("method", [ONLY_KMEANS, ONLY_LOOP, Vptq(), Vptq(damp=0.0)])
def test_dead_inputs_and_constant_columns_do_no_harm(method: Vptq) -> None:
    w, hessian = problem(64, 48)
    whole = error(w, hessian, FMT, method)
    hessian[:8], hessian[:, :8] = 0.0, 0.0
    w[:, 4], w[:, 20], w[:, 21] = 0.0, 0.0, 3.0
    decoded = coded(w, hessian, FMT, method)
    assert torch.isfinite(decoded).all()
    assert (decoded - w)[:, :8].square().mean() < w[:, :8].square().mean()
    assert error(w, hessian, FMT, method) < 1.2 * whole
    nothing = coded(torch.zeros(8, 8), torch.zeros(8, 8), FMT, method)
    assert nothing.abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_weights_of_any_size_have_about_the_same_error(size: float) -> None:
    w, hessian = problem(64, 32)
    fmt = FMT.resolve(w * size)
    assert fmt.scale_dtype == "bfloat16"
    assert error(w * size, hessian, fmt, Vptq()) < 1.1 * error(w, hessian, FMT, Vptq())


def test_a_seed_decides_everything() -> None:
    w, hessian = problem(64, 32)
    a, b, c = (coded(w, hessian, replace(FMT, residual_bits=2), Vptq(sample=3), seed) for seed in (3, 3, 4))
    assert a.equal(b)
    assert not a.equal(c)


def test_linears_that_share_an_input_get_codebooks_of_their_own() -> None:
    (a, hessian), (b, _) = problem(64, 32), problem(24, 32, seed=1)
    rng = torch.Generator().manual_seed(0)
    found = Vptq().quantize_group([a, b], {Hessian: hessian}, [FMT, Vector()], rng)
    assert [f.fields["indices"].shape[1] for f in found] == [32, 32]
    assert found[0].fields["codebook"].shape == (1, 64, 4)
    assert loss(b, Vector().decode(found[1].fields), hessian) < 0.5 * loss(b, torch.zeros_like(b), hessian)


def test_only_vectors_will_do_and_only_here() -> None:
    assert Vptq().reject(Vector()) is None
    assert "it codes vectors" in str(Vptq().reject(Uniform()))
    for name in ("rtn", "gptq", "bcq", "spqr"):
        assert plugins.get("methods", name)().reject(Vector()) is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"damp": -1}, "damp must be 0 to 10"),
        ({"iterations": 0}, "iterations must be a whole number from 1"),
        ({"passes": 0}, "passes must be a whole number from 1"),
        ({"rounds": 0.5}, "rounds must be a whole number from 0"),
        ({"tries": 0}, "tries must be a whole number from 1"),
        ({"sample": -1}, "sample must be a whole number from 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Vptq(**options)
