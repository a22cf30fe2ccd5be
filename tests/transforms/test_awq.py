"""AWQ's search: it lowers the loss that it is given, keeps tied features equal, and may leave all as it is."""

import pytest
import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import rounded
from qexport.formats.uniform import Uniform
from qexport.statistics import AbsMean
from qexport.transforms.awq import Awq
from qexport.transforms.base import Change, Site


def site(x: Tensor, w: Tensor, fmt: Uniform, ties: Tensor | None = None) -> Site:
    mean = AbsMean(x.shape[1])
    mean.update(x)

    def loss(weights, change):
        return float(((x / change.scale) @ weights[0].T - x @ w.T).square().mean())

    return Site([w], [fmt], {AbsMean: mean.result()}, ties, loss, torch.Generator())


def example() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=rng)
    x[:, ::16] *= 20  # a few features are large, as in language models
    return x, torch.randn(32, 64, generator=rng)


def test_large_activations_lead_to_larger_columns_and_a_lower_loss() -> None:
    x, w = example()
    fmt = Uniform(bits=3, group_size=32)
    place = site(x, w, fmt)
    scale = Awq().decide(place).scale
    assert scale is not None
    assert scale[::16].min() > 1.5 * scale[1:16].max()
    found = place.loss([rounded(fmt, w * scale)], Change(scale=scale))
    assert found < 0.6 * place.loss([rounded(fmt, w)], Change(scale=torch.ones(64)))


def test_tied_features_get_one_scale() -> None:
    x, w = example()
    ties = torch.arange(64) // 4
    scale = Awq().decide(site(x, w, Uniform(bits=3, group_size=32), ties)).scale
    assert scale is not None
    assert all(len(set(scale[ties == t].tolist())) == 1 for t in range(16))
    assert len(set(scale.tolist())) > 1


def test_weights_that_lie_on_the_grid_are_left_alone() -> None:
    x, _ = example()
    w = torch.randint(0, 8, (32, 64), generator=torch.Generator().manual_seed(1)).float() - 3
    w[:, ::32], w[:, 1::32] = -3, 4
    scale = Awq().decide(site(x, w, Uniform(bits=3, group_size=32))).scale
    assert scale is not None
    assert torch.equal(scale, torch.ones(64))


@pytest.mark.parametrize("grid", [0, -1, 2000])
def test_a_grid_of_no_points_is_refused(grid: int) -> None:
    with pytest.raises(UsageError, match="grid must be 1 to 1000"):
        Awq(grid=grid)
