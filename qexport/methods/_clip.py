"""Choosing a group's parameters with less than its full range, when that lowers the error."""

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import ScalarGrid
from qexport.methods.base import Effort


def check_clip(method: str, steps: int) -> None:
    """Raise `UsageError` unless some of the range is left after so many steps."""
    if not 0 <= steps < 40:
        raise UsageError(f"method {method!r}: clip must be 0 to 39 steps, got {steps}.")


def fit_clipped(
    w: Tensor, weight: Tensor | None, grid: ScalarGrid, state: object, j0: int, steps: int
) -> dict[str, Tensor]:
    """Fit a group to its range times 1, 1 - 1/40, 1 - 2/40 ..., and keep the best for each row, or block of rows.

    Args:
        w: float32 [n, g].
        weight: importance of each column for the squared error, float32 [g]; or a matrix H [g, g], for errors d H d^T;
            or None.
        grid: any scalar grid; rows that share parameters choose together.
        state: of the grid.
        j0: first column of the group.
        steps: how many ranges to try beside the full one; 0 just fits.
    """
    whole = weight is not None and weight.ndim == 2
    columns = weight.diagonal() if weight is not None and whole else weight
    best = grid.fit(w, columns, state, j0)
    if steps == 0 or not grid.clips:
        return best
    n, block = w.shape[0], grid.row_block

    def error(params: dict[str, Tensor]) -> Tensor:
        d = w - grid.value(grid.nearest(w, params), params)
        e = d.square() if weight is None else (d @ weight if whole else d * weight) * d
        e = e.sum(1)
        return torch.cat([e, e.new_zeros(-n % block)]).view(-1, block).sum(1)

    lowest = error(best)
    lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    for i in range(1, steps + 1):
        ratio = 1 - i / 40
        params = grid.fit(torch.minimum(torch.maximum(w, lo * ratio), hi * ratio), columns, state, j0)
        found = error(params)
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        rows = better.repeat_interleave(block)[:n]
        for name, p in params.items():
            mask = rows if p.shape[0] == n else better
            best[name] = torch.where(mask.view(-1, *[1] * (p.ndim - 1)), p, best[name])
    return best


def fit_effort(steps: int) -> Effort:
    """Operations of `fit_clipped` on one group, and how often it touches each weight."""
    return Effort(touched=3.0 + 11.0 * steps, calls=12.0 + 34.0 * steps)
