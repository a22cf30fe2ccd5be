"""The CPU's kernel of the `vector` format: entries are looked up and multiplied, see `_vector_loops`.

x is multiplied by the columns' scales beforehand, and what the offsets give is the same for all rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.formats.vector import Vector
from qexport.kernels.cpu._groups import pieces_of
from qexport.kernels.cpu._laid_out import LaidOut
from qexport.kernels.cpu._pages import placed
from qexport.kernels.cpu._vector_loops import KINDS, LONGEST, VECTORS, by_all, by_one, fast
from qexport.schema import Tensors

_ROWS = (4, 8, 16)  # of an entry, filled up
_LINE = 32  # numbers of a line of the cache
_NEAR = 1 << 16  # bytes of codebooks that are fetched before they are needed


@dataclass(frozen=True, eq=False)
class Vectors(LaidOut):
    """A weight [n, k], its vectors filled up to a multiple of `VECTORS`; all arrays are numpy's.

    Attributes:
        rows: that are read of an entry, one of `_ROWS`.
        kind: dtype of entries, the place in `KINDS`.
        step: numbers of a codebook that places count by.
        weight: places in the codebook and then the residual one, uint16 [books, blocks, k, 8]; the entries of both one
            behind the other, [groups, numbers] as int16, see `_apart`; and int64 [books, 2], the bytes before a book's
            first entry and those of a group.
        pieces: of groups of columns, see `pieces_of`.
        columns: scales and offsets, float32 [k], both 0 of outliers.
        outliers: columns, int64 [c], and weights, float32 [blocks, c, 8 x rows].
        length: rows of a vector.
        shape: n and k.
    """

    rows: int
    kind: int
    step: int
    weight: tuple[Any, Any, Any]
    pieces: Any
    columns: tuple[Any, Any]
    outliers: tuple[Any, Any]
    length: int
    shape: tuple[int, int]

    @cached_property
    def given(self) -> tuple[Any, ...]:
        """See `LaidOut`."""
        (places, entries, books), (scales, offsets), (columns, values) = self.weight, self.columns, self.outliers
        numbers = (
            *self.shape, self.length, places.ctypes.data, places.shape[1], entries.ctypes.data,
            min(entries.nbytes, _NEAR), books.ctypes.data,
            len(books), self.pieces.ctypes.data, len(self.pieces), scales.ctypes.data, offsets.ctypes.data,
            columns.ctypes.data, values.ctypes.data, columns.size,
        )  # fmt: skip
        return by_one, by_all, ((0,) * self.rows, (0,) * (self.kind + 1), (0,) * self.step), numbers


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
        apart, step = _apart(length, rows, max(bits for _, _, bits in own.indexed))
        books = [_in_lines(packed[book].view(torch.int16), rows, apart) for _, book, _ in own.indexed]
        starts = np.array([(2 * (i and books[0].numel()), 2 * book[0].numel()) for i, book in enumerate(books)])
        places = np.stack([_places(fields[name], rows, apart, step) for name, _, _ in own.indexed])
        weight = (placed(places), placed(torch.cat([book.flatten() for book in books]).numpy()), starts)
        scales = fields.get("column_scales", torch.ones(k)).float().clone()
        offsets = fields.get("column_offsets", torch.zeros(k)).float().clone()
        at = fields.get("outlier_index", torch.zeros(0)).long()
        scales[at], offsets[at] = 0, 0
        values = fields.get("outlier_values", torch.zeros(n, 0))
        outliers = (at.numpy(), _by_blocks(values.float(), length, rows).numpy())
        pieces, columns = pieces_of(k, own.group_size, LONGEST), (scales.numpy(), offsets.numpy())
        return Vectors(rows, KINDS.index(own.scale_dtype), step, weight, pieces, columns, outliers, length, (n, k))


def _apart(length: int, rows: int, bits: int) -> tuple[int, int]:
    """Numbers from an entry of a line to the next one, and by how many 16 bits count places.

    A line of the cache holds whole entries, the closer the more; steps of up to 4 cost an address nothing.
    """
    for apart in (length, rows):
        for step in (4, 2, 1, 8, 16):
            if apart % step == 0 and _starts(2**bits, rows, apart)[-1] < step << 16:
                return apart, step
    raise AssertionError(f"indices of {bits} bits, more than 16")


def _starts(entries: int, rows: int, apart: int) -> Tensor:
    """Where entries begin, of which `rows` numbers are read at once: int64 [entries]."""
    each, own = (_LINE - rows) // apart + 1, torch.arange(entries)
    return own // each * _LINE + own % each * apart


def _in_lines(book: Tensor, rows: int, apart: int) -> Tensor:
    """A codebook [groups, entries, length] as its lines: [groups, numbers]."""
    groups, entries, length = book.shape
    starts = _starts(entries, rows, apart)
    out = book.new_zeros(groups, (int(starts[-1]) // _LINE + 1) * _LINE)
    out[:, starts.unsqueeze(1) + torch.arange(length)] = book
    return out


def _places(indices: Tensor, rows: int, apart: int, step: int) -> Any:
    """Indices [vectors, k] as places, in the order of the loops."""
    vectors, k = indices.shape
    wide = F.pad(indices, (0, 0, 0, -vectors % VECTORS)).view(-1, VECTORS, k)
    starts = (_starts(int(indices.max()) + 1, rows, apart) // step).to(torch.int32)
    return starts[wide].numpy().astype(np.uint16).transpose(0, 2, 1).copy()


def _by_blocks(values: Tensor, length: int, rows: int) -> Tensor:
    """Weights [n, c] in the order of the loops' totals."""
    n, c = values.shape
    blocks = -(-n // (VECTORS * length))
    wide = F.pad(values, (0, 0, 0, -n % (VECTORS * length))).view(blocks, VECTORS, length, c)
    return F.pad(wide, (0, 0, 0, rows - length)).permute(0, 3, 1, 2).flatten(2).contiguous()


plugin = VectorKernel()
