"""The CPU's kernel of the `vector` format: entries are looked up and multiplied, see `_vector_loops`.

x is multiplied by the columns' scales beforehand, and what the offsets give is the same for all rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats.vector import Vector
from qexport.kernels._threads import many
from qexport.kernels.cpu._groups import pieces_of
from qexport.kernels.cpu._vector_loops import KINDS, LONGEST, VECTORS, by_all, by_one, fast
from qexport.schema import Tensors

_ROWS = (4, 8, 16)  # of an entry, filled up
_SMALL = 1 << 18  # products that one thread works off before others would have started


@dataclass(frozen=True, eq=False)
class Vectors:
    """A weight [n, k], its vectors filled up to a multiple of `VECTORS`; all arrays are numpy's.

    Attributes:
        rows: of an entry, one of `_ROWS`.
        kind: dtype of entries, the place in `KINDS`.
        weight: indices into the codebook and then the residual one, uint16 [books, blocks, k, 8]; the entries of both
            one behind the other, [groups, entries, rows] as int16; and int64 [books, 2], the bytes before a book's
            first entry and those of a group.
        pieces: of groups of columns, see `pieces_of`.
        columns: scales and offsets, float32 [k], both 0 of outliers.
        outliers: columns, int64 [c], and weights, float32 [blocks, c, 8 x rows].
        length: rows of a vector.
        shape: n and k.
    """

    rows: int
    kind: int
    weight: tuple[Any, Any, Any]
    pieces: Any
    columns: tuple[Any, Any]
    outliers: tuple[Any, Any]
    length: int
    shape: tuple[int, int]

    def product(self, x: Tensor) -> Tensor:
        """See `Weight`."""
        n, k = self.shape
        y = torch.empty(x.shape[0], n)
        run = by_all if many(x.shape[0] * n * k, _SMALL) else by_one
        run(
            (0,) * self.rows, (0,) * (self.kind + 1), x.numpy(), self.weight, self.pieces, self.columns, self.outliers,
            self.length, y.numpy(),
        )  # fmt: skip
        return y


class VectorKernel:
    """See `Kernel`."""

    def supports(self, fmt: Vector, n: int, k: int) -> str | None:
        """Why not, or None."""
        length = fmt.sized(n, k).vector_length
        if length > _ROWS[-1]:
            return f"vectors of {length} rows; the CPU's kernel reads up to {_ROWS[-1]}"
        return None if fast() else "this processor lacks AVX-512, in which the CPU's kernel keeps sums of vectors"

    def prepare(self, fmt: Vector, packed: Tensors, n: int, k: int) -> Vectors:
        """See `Kernel`."""
        own, fields = fmt.sized(n, k), fmt.unpack(packed, n, k)
        length = own.vector_length
        rows = next(r for r in _ROWS if r >= length)
        books = [F.pad(packed[book], (0, rows - length)).view(torch.int16) for _, book, _ in own.indexed]
        places = np.array([(2 * (i and books[0].numel()), 2 * book[0].numel()) for i, book in enumerate(books)])
        indices = np.stack([_indices(fields[name]) for name, _, _ in own.indexed])
        weight = (indices, torch.cat([book.flatten() for book in books]).numpy(), places)
        scales = fields.get("column_scales", torch.ones(k)).clone()
        offsets = fields.get("column_offsets", torch.zeros(k)).clone()
        at = fields.get("outlier_index", torch.zeros(0)).long()
        scales[at], offsets[at] = 0, 0
        values = fields.get("outlier_values", torch.zeros(n, 0))
        outliers = (at.numpy(), _by_blocks(values, length, rows).numpy())
        pieces, columns = pieces_of(k, own.group_size, LONGEST), (scales.numpy(), offsets.numpy())
        return Vectors(rows, KINDS.index(own.scale_dtype), weight, pieces, columns, outliers, length, (n, k))


def _indices(indices: Tensor) -> Any:
    """Indices [vectors, k] in the order of the loops."""
    vectors, k = indices.shape
    wide = F.pad(indices, (0, 0, 0, -vectors % VECTORS)).view(-1, VECTORS, k)
    return wide.numpy().astype(np.uint16).transpose(0, 2, 1).copy()


def _by_blocks(values: Tensor, length: int, rows: int) -> Tensor:
    """Weights [n, c] in the order of the loops' totals."""
    n, c = values.shape
    blocks = -(-n // (VECTORS * length))
    wide = F.pad(values, (0, 0, 0, -n % (VECTORS * length))).view(blocks, VECTORS, length, c)
    return F.pad(wide, (0, 0, 0, rows - length)).permute(0, 3, 1, 2).flatten(2).contiguous()


plugin = VectorKernel()
