"""How the tests of formats make fields: each group fitted, each weight to its nearest value, and a few outliers."""

import pytest
import torch
from torch import Tensor

from qexport.formats.base import ScalarGrid
from tests.vectors import encode


def fields_of(fmt, w: Tensor, outlier_rate: float = 0.05) -> dict[str, Tensor]:
    """Fields of any format for w [n, k]; outliers, where the format has them, at random places."""
    if fmt.name == "vector":
        return encode(fmt, w)
    if not isinstance(fmt, ScalarGrid):
        return fmt.from_weight(w)
    n, k = w.shape
    size = k if fmt.group_size == -1 else fmt.group_size
    codes, params, state = [], [], fmt.begin(w)
    for j in range(0, k, size):
        found = fmt.fit(w[:, j : j + size], None, state, j)
        codes.append(fmt.nearest(w[:, j : j + size], found))
        params.append({name: p for name, p in found.items() if not name.startswith("_")})
    fields = {"codes": torch.cat(codes, 1), **{p: torch.cat([q[p] for q in params], 1) for p in params[0]}}
    if "outlier_values" in fmt.layout(n, k):
        rest = w - fmt.decode(fields)
        rows, columns = (torch.rand(n, k, generator=torch.Generator().manual_seed(1)) < outlier_rate).nonzero(
            as_tuple=True
        )
        fields["outlier_rows"] = torch.searchsorted(rows, torch.arange(n + 1)).int()
        fields["outlier_columns"] = columns.int()
        fields["outlier_values"] = rest[rows, columns].to(fmt.outlier_dtype).float()
    return fields


@pytest.fixture(name="fields_of")
def _fields_of():
    return fields_of
