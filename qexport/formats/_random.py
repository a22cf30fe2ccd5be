"""Random fields of formats, for tests and benchmarks, which want every code and weights about 1 large."""

import torch
from torch import Tensor


def codes(rng: torch.Generator, bits: int, *shape: int) -> Tensor:
    """Codes of all kinds, uint8."""
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=rng, device=rng.device)


def scales(rng: torch.Generator, dtype: torch.dtype, *shape: int, size: float = 1.0) -> Tensor:
    """Numbers from 0.5 to 1.5 times `size`, float32 with values that are exact in `dtype`."""
    return ((torch.rand(shape, generator=rng, device=rng.device) + 0.5) * size).to(dtype).to(torch.float32)


def normal(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers, float32 with values that are exact in `dtype`."""
    return torch.randn(shape, generator=rng, device=rng.device).to(dtype).to(torch.float32)
