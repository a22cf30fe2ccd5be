"""Statistics against their plain definitions."""

import torch

from qexport.statistics import Hessian


def test_hessian_is_the_mean_outer_product_over_all_batches() -> None:
    x = torch.randn(50, 13)
    hessian = Hessian(13)
    hessian.update(x[:20])
    hessian.update(x[20:].reshape(2, 15, 13))
    torch.testing.assert_close(hessian.result(), x.T @ x / 50)
    assert torch.equal(hessian.result(), hessian.result().T)


def test_hessian_takes_half_precision_and_fewer_features_than_blocks() -> None:
    x = torch.randn(7, 3)
    hessian = Hessian(3)
    hessian.update(x.half())
    torch.testing.assert_close(hessian.result(), x.half().float().T @ x.half().float() / 7)
