"""The column loop against a slow statement of GPTQ, and the orders in which it visits columns."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qexport.errors import CalibrationError
from qexport.formats.spqr import Spqr
from qexport.formats.uniform import Uniform
from qexport.methods._columns import BLOCK, Visit, blocks, factor, plan_visit, stack
from qexport.methods.gptq import Gptq
from qexport.methods.rtn import Rtn
from qexport.statistics import Hessian


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and the Hessian of correlated inputs with unequal variances."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=rng) / k**0.5
    x = torch.randn(4 * k, k, generator=rng) @ mix * torch.randn(k, generator=rng).mul(0.5).exp()
    return torch.randn(n, k, generator=rng), x.T @ x / x.shape[0]


def loss(w: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T)."""
    d = w - decoded
    return float(((d @ hessian) * d).sum())


def slow_gptq(w: np.ndarray, h: np.ndarray, bits: int, group: int, damp: float) -> np.ndarray:
    """Frantar et al., equations 2 and 3, left to right with the inverse updated by elimination: float64, no blocks."""
    w, k = w.copy(), w.shape[1]
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(k))
    out = np.zeros_like(w)
    for j in range(k):
        if j % group == 0:
            part = w[:, j : j + group]
            lo, hi = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = ((hi - lo) / (2**bits - 1)).astype(np.float16).astype(np.float64)
            zero = np.clip(np.round(-lo / scale), 0, 2**bits - 1)
        out[:, j] = (np.clip(np.round(w[:, j] / scale) + zero, 0, 2**bits - 1) - zero) * scale
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


@pytest.mark.parametrize("group", [8, 20, 32])
def test_gptq_left_to_right_equals_the_papers_elimination(group: int) -> None:
    w, h = problem(6, 32)
    fmt = Uniform(bits=4, group_size=group)
    found = Gptq(order="none").quantize(w, {Hessian: h}, fmt, torch.Generator())
    slow = slow_gptq(w.double().numpy(), h.double().numpy(), 4, group, 0.01)
    np.testing.assert_allclose(fmt.decode(found.fields).numpy(), slow, atol=1e-4)


@pytest.mark.parametrize("order", ["group", "act", "none"])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (100, 32), (300, 128), (300, -1), (37, 100), (200, 150)])
def test_gptq_has_less_output_error_than_rtn(order: str, k: int, group: int) -> None:
    w, h = problem(24, k)
    fmt = Uniform(bits=3, group_size=group)
    found = Gptq(order=order).quantize(w, {Hessian: h}, fmt, torch.Generator())
    decoded = fmt.decode(found.fields)
    if found.perm is not None:
        natural = torch.empty_like(decoded)
        natural[:, found.perm] = decoded
        decoded = natural
    nearest = fmt.decode(Rtn().quantize(w, {}, fmt, torch.Generator()).fields)
    assert (found.perm is not None) == (order == "act")
    assert loss(w, decoded, h) < 0.9 * loss(w, nearest, h)


def test_blocks_cover_all_steps_and_no_group_starts_inside_and_ends_beyond() -> None:
    for k, group in ((576, 64), (576, 100), (600, 150), (1000, 300), (64, -1), (129, 1)):
        visit = plan_visit(torch.rand(k), group, "group")
        found = blocks(visit)
        assert [s for s, _, _ in found] == [0, *[e for _, e, _ in found[:-1]]]
        assert found[-1][1] == k
        assert sorted(number for _, _, g in found for _, _, number in g) == list(range(len(visit.groups)))
        for start, stop, groups in found:
            assert stop - start <= max(BLOCK, 1)
            assert all(s >= start and (e <= stop or len(groups) == 1) for s, e, _ in groups)


def test_group_order_visits_whole_groups_by_importance() -> None:
    importance = torch.tensor([1.0, 5, 2, 9, 9, 8, 0, 3])
    visit = plan_visit(importance, 3, "group")
    assert visit.columns.tolist() == [3, 4, 5, 1, 2, 0, 7, 6]
    assert visit.groups == ((0, 3, 1), (3, 6, 0), (6, 8, 2))
    assert not visit.stored


def test_factor_inverts_the_damped_hessian_in_visiting_order() -> None:
    _, h = problem(1, 40)
    visit = plan_visit(h.diagonal(), 8, "act")
    found = factor(h, visit, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(40)
    product = found.upper.T @ found.upper @ damped[visit.columns][:, visit.columns]
    torch.testing.assert_close(product, torch.eye(40), atol=1e-3, rtol=0)
    assert torch.equal(found.upper, found.upper.triu())


def test_damping_is_raised_until_the_hessian_can_be_factored() -> None:
    x = torch.randn(3, 64).mul(100)
    h = x.T @ x / 3  # rank 3
    found = factor(h, plan_visit(h.diagonal(), 16, "group"), 0.0)
    assert found.damp > 0


def test_indefinite_hessian_names_the_input_feature() -> None:
    h = -torch.eye(4)
    with pytest.raises(CalibrationError, match="not positive definite at input feature"):
        factor(h, Visit(torch.arange(4), ((0, 4, 0),), stored=False), 0.01)


def test_dead_columns_are_coded_as_zero_and_counted() -> None:
    w, h = problem(8, 32)
    h[:, [3, 17]] = h[[3, 17]] = 0
    fmt = Uniform(bits=4, group_size=8)
    found = Gptq().quantize(w, {Hessian: h}, fmt, torch.Generator())
    assert not fmt.decode(found.fields)[:, [3, 17]].any()
    assert found.diagnostics["dead_columns"] == 2


def test_members_of_a_group_come_out_as_if_they_were_alone() -> None:
    w, h = problem(40, 48)
    fmt, other = Uniform(bits=4, group_size=16), Uniform(bits=3, group_size=16)
    parts, fmts = [w[:7], w[7:30], w[30:]], [fmt, fmt, other]
    together = Gptq().quantize_group(parts, {Hessian: h}, fmts, torch.Generator())
    for part, f, found in zip(parts, fmts, together, strict=True):
        alone = Gptq().quantize(part, {Hessian: h}, f, torch.Generator())
        decoded = f.decode(found.fields)
        assert decoded.shape == part.shape
        assert (decoded != f.decode(alone.fields)).float().mean() < 0.01


def test_stack_fills_up_row_blocks_with_copies_of_the_last_row() -> None:
    w, ranges = stack([torch.full((3, 2), 1.0), torch.full((16, 2), 2.0)], 16)
    assert (w.shape, ranges) == ((32, 2), [(0, 3), (16, 32)])
    assert w[:16].eq(1).all()


def test_clip_search_lowers_the_error_and_zero_steps_change_nothing() -> None:
    w, h = problem(16, 64)
    w[:, 5] *= 8
    for fmt, (method, stats) in product(
        (Uniform(bits=3, group_size=64), Spqr(group_size=64)), ((Rtn, {}), (Gptq, {Hessian: h}))
    ):
        plain, clipped = (
            fmt.decode(method(clip=steps).quantize(w, stats, fmt, torch.Generator()).fields) for steps in (0, 20)
        )
        metric = h if stats else torch.eye(64)
        assert loss(w, clipped, metric) < loss(w, plain, metric)
