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

    Kept as a running mean, of which only the lower blocks are computed: about 60 % of the multiplications of a full
    product, and no second matrix when it is read. Half of the Hessian of Frantar et al. (arXiv:2210.17323), which no
    method here can notice, since damping is relative.
    """

    BLOCKS = 4

    def __init__(self, k: int) -> None:
        self._mean = torch.zeros(k, k)
        self._step = max(-(-k // self.BLOCKS), 1)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """Add rows x [tokens, k]."""
        x = x.reshape(-1, x.shape[-1]).float()
        total = self._tokens + x.shape[0]
        if not x.shape[0]:
            return
        self._mean = self._mean.to(x.device)
        for j in range(0, x.shape[1], self._step):
            part = self._mean[j:, j : j + self._step]
            part.addmm_(x[:, j:].T, x[:, j : j + self._step], beta=self._tokens / total, alpha=1 / total)
        self._tokens = total

    def result(self) -> Tensor:
        """Mean over tokens, float32 [k, k]; a view of what `update` goes on changing."""
        for j in range(0, self._mean.shape[0], self._step):
            stop = j + self._step
            square = self._mean[j:stop, j:stop]
            square.copy_(square.tril() + square.tril(-1).T)
            self._mean[j:stop, stop:] = self._mean[stop:, j:stop].T
        return self._mean


class _Mean:
    """A mean over tokens for each feature, float32 [k]."""

    def __init__(self, k: int) -> None:
        self._sum = torch.zeros(k, dtype=torch.float64)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """Add rows x [tokens, k]."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum = self._sum.to(x.device) + self._of(x).sum(0)
        self._tokens += x.shape[0]

    def result(self) -> Tensor:
        """Mean over tokens, float32 [k]."""
        return (self._sum / max(self._tokens, 1)).float()

    def _of(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AbsMean(_Mean):
    """Mean of |x| of each feature, float32 [k]."""

    def _of(self, x: Tensor) -> Tensor:
        return x.abs()


class MeanSquare(_Mean):
    """Mean of x^2 of each feature, float32 [k]: the diagonal of the Hessian without the rest of it."""

    def _of(self, x: Tensor) -> Tensor:
        return x.square()


class FeatureRange:
    """Lowest and highest value of each feature, float32 [2, k]."""

    def __init__(self, k: int) -> None:
        self._low = torch.full((k,), torch.inf)
        self._high = torch.full((k,), -torch.inf)

    def update(self, x: Tensor) -> None:
        """Take in rows x [tokens, k]."""
        x = x.reshape(-1, x.shape[-1]).float()
        if x.shape[0]:
            self._low = torch.minimum(self._low.to(x.device), x.amin(0))
            self._high = torch.maximum(self._high.to(x.device), x.amax(0))

    def result(self) -> Tensor:
        """Lowest, then highest, float32 [2, k]."""
        return torch.stack((self._low, self._high))
