"""The rotation: an orthogonal matrix at every width, and the same product after it."""

import pytest
import torch

from qexport.formats._rotation import rotate
from qexport.statistics import Hessian, MeanSquare
from qexport.transforms.base import Change, Site
from qexport.transforms.rotation import Rotation


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 45, 64, 128, 576, 1536, 2048])
def test_it_is_orthogonal_and_undone_by_its_inverse(k: int) -> None:
    matrix = rotate(torch.eye(k)).T  # column j is what feature j becomes
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(k), atol=2e-5, rtol=0)
    x = torch.randn(3, 2, k)
    torch.testing.assert_close(rotate(x), x @ matrix.T, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(rotate(x), inverse=True), x, atol=1e-5, rtol=1e-5)


def test_a_power_of_two_gives_the_hadamard_matrix() -> None:
    entries = rotate(torch.eye(256)).abs()
    torch.testing.assert_close(entries, torch.full_like(entries, 1 / 16))


def test_one_large_feature_is_spread_over_all() -> None:
    x = torch.zeros(1, 576)
    x[0, 100] = 1.0
    assert rotate(x).abs().max() < 0.06


@pytest.mark.parametrize("change", [
    Change(),
    Change(scale=torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5),
    Change(signs=torch.tensor([1.0, -1.0] * 12)),
    Change(torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.5, torch.tensor([-1.0, 1.0, 1.0] * 8)),
])  # fmt: skip
def test_product_and_hessian_follow_a_change(change: Change) -> None:
    w, x = torch.randn(5, 24), torch.randn(200, 24)
    stored = change.stored
    changed = x * stored.get("scale", torch.ones(24))
    changed = rotate(changed * stored["signs"]) if "signs" in stored else changed
    torch.testing.assert_close(changed @ change.weight(w).T, x @ w.T, atol=1e-4, rtol=1e-4)
    a, b = Hessian(24), Hessian(24)
    a.update(x)
    b.update(changed)
    torch.testing.assert_close(change.hessian(a.result()), b.result(), atol=1e-5, rtol=1e-4)


def test_signs_are_random_but_seeded() -> None:
    def signs(seed: int) -> torch.Tensor:
        site = Site([torch.randn(3, 64)], [], {}, None, lambda _: 0.0, torch.Generator().manual_seed(seed))
        found = Rotation(balance=False).decide(site).signs
        assert found is not None
        return found

    assert torch.equal(signs(1), signs(1))
    assert not torch.equal(signs(1), signs(2))
    assert set(signs(1).tolist()) == {-1.0, 1.0}


def test_balance_makes_the_product_of_the_mean_squares_the_least() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x = (
        torch.randn(40, 64, generator=rng),
        torch.randn(500, 64, generator=rng) * (1 + 30 * (torch.arange(64) % 9 == 0)),
    )
    square = MeanSquare(64)
    square.update(x)
    site = Site([w], [], {MeanSquare: square.result()}, None, lambda _: 0.0, rng)
    scale = Rotation().decide(site).scale
    assert scale is not None

    def product(s: torch.Tensor) -> float:
        return float((w * s).square().sum() * (x / s).square().sum())

    best = product(scale)
    assert best < 0.3 * product(torch.ones(64))
    for _ in range(20):
        assert best < product(scale * torch.exp(0.1 * torch.randn(64, generator=rng)))


def test_features_that_are_always_0_stay_as_they_are() -> None:
    site = Site([torch.randn(3, 8)], [], {MeanSquare: torch.zeros(8)}, None, lambda _: 0.0, torch.Generator())
    assert torch.equal(Rotation().decide(site).scale, torch.ones(8))
    half = Site([torch.zeros(3, 8)], [], {MeanSquare: torch.arange(8.0)}, None, lambda _: 0.0, torch.Generator())
    scale = Rotation().decide(half).scale
    assert torch.equal(scale, torch.ones(8))
