"""What the decoders share: views of stored tensors that loops read, and the choice of threads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.kernels._threads import many
from qexport.kernels.decode import _loops
from qexport.kernels.decode._lanes import LANES

_SMALL = 1 << 16  # weights that one thread decodes before others would have started
_MOST = 4  # bits of codes of which a table of pairs fits a first-level cache


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight [n, k] that loops decode: see `Fill`, and `Weight` of `kernels.cpu`.

    Attributes:
        kind: one of those of `_loops`.
        given: what they read.
        shape: n and k.
        step: rows that are decoded at a time.
    """

    kind: tuple[int, ...]
    given: tuple[Any, ...]
    shape: tuple[int, int]
    step: int = 4

    def __call__(self, first: int, out: Tensor) -> None:
        """See `Fill`."""
        run = _loops.fill_by_all if many(out.numel(), _SMALL) else _loops.fill_by_one
        run(self.kind, self.given, self.step, first, out.numpy())

    def product(self, x: Tensor) -> Tensor:
        """See `Weight`."""
        n, k = self.shape
        rows = F.pad(x.reshape(-1, k).float(), (0, -k % LANES))
        y = torch.empty(rows.shape[0], n, dtype=torch.float32, device="cpu")
        run = _loops.product_by_all if many(n * k, _SMALL) else _loops.product_by_one
        run(self.kind, self.given, self.step, k, rows.numpy(), y.numpy())
        return y.to(x.dtype).view(*x.shape[:-1], n)


def raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, numpy's uint8."""
    return tensor.contiguous().view(torch.uint8).view(-1).numpy()


def across(words: Tensor, values: Tensor, n: int) -> Tensor:
    """Values, float32 [2^bits], of small codes that lie along n: float32 [n, groups]; see `_bits.pack_across`."""
    out = words.new_empty(n, words.shape[0], dtype=torch.float32)
    _loops.across(raw(words), values.numel().bit_length() - 1, values.numpy(), out.numpy())
    return out


def numbers(bits: int) -> Tensor:
    """All codes as floats."""
    return torch.arange(2**bits, dtype=torch.float32, device="cpu")


def affine(
    words: Tensor, bits: int, size: int, zeros: Tensor, scales: Tensor, sparse: tuple[Tensor, Tensor, Tensor] | None,
    shape: tuple[int, int],
) -> Rows:  # fmt: skip
    """Rows of scale * (code - zero), plus outliers; see `_loops._affine`."""
    none = words.new_empty(0)
    outliers = tuple(t.numpy() for t in sparse or (none, none, none.float()))
    return Rows(_loops.AFFINE, (raw(words), bits, size, zeros.numpy(), scales.numpy(), *outliers), shape)


def levels(
    words: Tensor, bits: int, size: int, values: Tensor, above: Tensor, below: Tensor, scales: Tensor,
    shape: tuple[int, int],
) -> Rows:  # fmt: skip
    """Rows of levels times factors for their sign and scales; see `_loops._levels`."""
    two = torch.cartesian_prod(values, values).flip(1) if bits <= _MOST else values.new_empty(0, 2)
    pairs = two.contiguous().view(torch.int64).view(-1).numpy().view("uint64")
    given = (raw(words), bits, size, values.numpy(), pairs, *(t.numpy() for t in (above, below, scales)))
    return Rows(_loops.LEVELS, given, shape)


def planes(words: Tensor, size: int, alpha: Tensor, offsets: Tensor, shape: tuple[int, int]) -> Rows:
    """Rows of sums of signed numbers; see `_loops._planes`."""
    return Rows(_loops.PLANES, (raw(words), size, alpha.contiguous().numpy(), offsets.numpy()), shape)
