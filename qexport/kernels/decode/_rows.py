"""What the decoders share: views of stored tensors that loops read, and the choice of threads."""

from typing import Any

import torch
from torch import Tensor

from qexport.kernels._threads import many
from qexport.kernels.decode import _loops
from qexport.kernels.decode.base import Fill

_SMALL = 1 << 16  # weights that one thread decodes before others would have started


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
    words: Tensor, bits: int, size: int, zeros: Tensor, scales: Tensor, sparse: tuple[Tensor, Tensor, Tensor] | None
) -> Fill:
    """What writes rows of scale * (code - zero), plus outliers; see `_loops.affine_by_one`."""
    none = words.new_empty(0)
    outliers = tuple(t.numpy() for t in sparse or (none, none, none.float()))
    given = (raw(words), bits, numbers(bits).numpy(), size, zeros.numpy(), scales.numpy(), outliers)
    return filling(_loops.affine_by_one, _loops.affine_by_all, given)


def levels(
    words: Tensor, bits: int, size: int, values: Tensor, above: Tensor, below: Tensor, scales: Tensor
) -> Fill:  # fmt: skip
    """What writes rows of levels times factors for their sign and scales; see `_loops.levels_by_one`."""
    given = (raw(words), bits, size, *(t.numpy() for t in (values, above, below, scales)))
    return filling(_loops.levels_by_one, _loops.levels_by_all, given)


def planes(words: Tensor, size: int, alpha: Tensor, offsets: Tensor) -> Fill:
    """What writes rows of sums of signed numbers; see `_loops.planes_by_one`."""
    return filling(_loops.planes_by_one, _loops.planes_by_all, (raw(words), size, alpha.numpy(), offsets.numpy()))


def filling(by_one: Any, by_all: Any, given: tuple[Any, ...]) -> Fill:
    """What writes rows by a loop of one thread or the same of all."""

    def fill(first: int, out: Tensor) -> None:
        run = by_all if many(out.numel(), _SMALL) else by_one
        run(*given, first, out.numpy())

    return fill
