"""One fixed orthogonal matrix R for every width k, that mixes all features: quick to apply, and nothing to store.

With k = m 2^p and m odd, R is the Kronecker product of the orthonormal cosine transform (DCT-II) of size m and the
Hadamard matrix of size 2^p, Sylvester's, over 2^(p/2).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

_WIDEST = 6  # a Hadamard matrix of 2^p is a product of ones of at most 2^6: fewer operations than one product


def rotate(x: Tensor, *, inverse: bool = False) -> Tensor:
    """R times every row of x [.., k], in float32; `inverse` undoes it."""
    k = x.shape[-1]
    out = x.reshape(-1, k).to(torch.float32)
    right = k
    for size in _sizes(k):
        right //= size
        matrix = _matrix(size, x.device)
        matrix = matrix.T if inverse else matrix
        if right == 1:
            out = (out.reshape(-1, size) @ matrix.T).view(-1, k)
        else:
            out = torch.matmul(matrix, out.reshape(-1, size, right)).view(-1, k)
    return out.view(x.shape)


def _sizes(k: int) -> tuple[int, ...]:
    """Sizes of the matrices whose Kronecker product is R: an odd one, then powers of two."""
    powers = (k & -k).bit_length() - 1
    odd = k >> powers
    parts = -(-powers // _WIDEST)
    return (*([odd] if odd > 1 else []), *(2 ** (powers // parts + (i < powers % parts)) for i in range(parts)))


@lru_cache(maxsize=64)
def _matrix(size: int, device: torch.device) -> Tensor:
    """Orthonormal float32 [size, size]: Hadamard for a power of two, else the cosine transform.

    It is kept on its device: to bring it there waits, which a recorded graph can't.
    """
    i = torch.arange(size, dtype=torch.float64)
    if size & (size - 1):
        rows = torch.cos(math.pi / size * (i + 0.5) * i.unsqueeze(1)) * math.sqrt(2 / size)
        rows[0] = size**-0.5
        return rows.float().to(device)
    out = torch.ones(1, 1)
    while out.shape[0] < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return (out / math.sqrt(size)).to(device)
