"""Which weights of a group to keep apart, and the sparse matrix that they make."""

import torch
from torch import Tensor

from qexport.formats.spqr import Spqr


def likely_outliers(w: Tensor, pivots: Tensor, tolerance: Tensor, fmt: Spqr) -> Tensor:
    """Weights of a group whose removal lowers the error of the others' fit by more than the tolerance: bool [n, g].

    Args:
        w: float32 [n, g].
        pivots: U's diagonal at the group's columns, float32 [g].
        tolerance: float32 [n, 1].
        fmt: for its first-level fit.
    """
    if w.shape[1] < 3:
        return torch.zeros_like(w, dtype=torch.bool)
    low, low_at = w.topk(2, 1, largest=False)
    high, high_at = w.topk(2, 1)

    def errors(lo: Tensor, hi: Tensor) -> Tensor:
        params = fmt.spread(lo.unsqueeze(1), hi.unsqueeze(1))
        return ((w - fmt.value(fmt.nearest(w, params), params)) / pivots).square()

    everything = errors(low[:, 0], high[:, 0])
    total = everything.sum(1, keepdim=True)
    gain = everything.clone()  # leaving out a weight inside the range saves just its own error
    for lo, hi, at in ((low[:, 1], high[:, 0], low_at), (low[:, 0], high[:, 1], high_at)):
        left = errors(lo, hi).scatter_(1, at[:, :1], 0.0)
        gain.scatter_(1, at[:, :1], total - left.sum(1, keepdim=True))
    return gain > tolerance


def to_csr(outliers: Tensor) -> dict[str, Tensor]:
    """Compressed sparse rows of a matrix [n, k]: rows int32 [n + 1], columns int32, values float32 [nnz]."""
    rows, columns = outliers.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=outliers.shape[0]).cumsum(0)
    starts = torch.cat([counts.new_zeros(1), counts])
    return {
        "outlier_rows": starts.int(),
        "outlier_columns": columns.int(),
        "outlier_values": outliers[rows, columns].float(),
    }
