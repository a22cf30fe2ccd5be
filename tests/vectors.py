"""Fields of the format `vector` without a method: entries are vectors of the matrix itself, each vector takes the
nearest."""

import torch
from torch import Tensor

from qexport.formats.vector import Vector


def encode(fmt: Vector, w: Tensor) -> dict[str, Tensor]:
    """Fields for w [n, k]; outlier columns, where the format has them, are those with the largest weights."""
    n, k = w.shape
    fmt = fmt.sized(n, k)
    v, out = fmt.vector_length, {"rows": torch.tensor(n)}
    rounded = lambda x: x.to(fmt.dtype).float()  # noqa: E731
    rest, scales = w, torch.ones(k, dtype=torch.float32)
    if fmt.normalize:
        out["column_offsets"] = rounded(w.mean(0))
        rest = w - out["column_offsets"]
        largest = rest.abs().amax().clamp(min=1e-38)
        scales = rounded((rest / largest).square().mean(0).sqrt() * largest)
        scales = out["column_scales"] = scales.masked_fill(scales == 0, 1)
    rest = torch.cat((rest / scales, torch.zeros(-n % v, k, dtype=torch.float32)))
    for name, codebook, width in fmt.indexed:
        size = k if fmt.group_size == -1 else fmt.group_size
        found = [_nearest(rest[:, j : j + size], v, 2**width, rounded) for j in range(0, k, size)]
        out[name] = torch.cat([indices for indices, _, _ in found], 1)
        out[codebook] = torch.stack([entries for _, entries, _ in found])
        rest = rest - torch.cat([values for _, _, values in found], 1)
    if fmt.outlier_columns:
        out["outlier_index"] = w.abs().amax(0).topk(fmt.outlier_columns).indices.sort().values.int()
        out["outlier_values"] = rounded(w[:, out["outlier_index"].long()])
    return out


def _nearest(part: Tensor, v: int, entries: int, rounded) -> tuple[Tensor, Tensor, Tensor]:
    """Indices int32 [V, c], codebook [entries, v] and values of a group [V v, c]; the mean is the first entry."""
    vectors = part.view(-1, v, part.shape[1]).transpose(1, 2).reshape(-1, v)
    some = torch.linspace(0, vectors.shape[0] - 1, min(entries, vectors.shape[0]), dtype=torch.float64).long()
    some = rounded(torch.cat((vectors.mean(0, keepdim=True), vectors[some]))[:entries])
    codebook = torch.cat((some, torch.zeros(entries - some.shape[0], v, dtype=torch.float32)))
    found = (vectors[:, None] - some).abs().sum(2).argmin(1)
    values = codebook[found].view(-1, part.shape[1], v).transpose(1, 2).reshape(part.shape)
    return found.view(-1, part.shape[1]).int(), codebook, values
