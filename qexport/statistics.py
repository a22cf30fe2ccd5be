"""What calibration collects about the input of a linear: `update(x)` batch by batch, then `result()`."""

from typing import Protocol

import torch
from torch import Tensor


class Statistic(Protocol):
    """Accumulates over batches of rows; merges over processes by `state`."""

    def __init__(self, k: int) -> None: ...

    def update(self, x: Tensor) -> None:
        """Take in finite rows, [tokens, k]."""
        ...

    def result(self) -> Tensor:
        """The statistic so far."""
        ...


class Hessian:
    """X^T X / tokens, float32 [k, k], symmetric.

    The sum is kept in float32 and only its lower blocks are computed: about 60 % of the multiplications of a full
    product. Half of the Hessian of Frantar et al. (arXiv:2210.17323), which no method here can notice, since damping is
    relative.
    """

    BLOCKS = 4

    def __init__(self, k: int) -> None:
        self._sum = torch.zeros(k, k)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """Add rows x [tokens, k]."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum = self._sum.to(x.device)
        k = x.shape[1]
        step = max(-(-k // self.BLOCKS), 1)
        for j in range(0, k, step):
            self._sum[j:, j : j + step].addmm_(x[:, j:].T, x[:, j : j + step])
        self._tokens += x.shape[0]

    def result(self) -> Tensor:
        """Mean over tokens, float32 [k, k]."""
        lower = self._sum.tril()
        return (lower + lower.tril(-1).T) / max(self._tokens, 1)
