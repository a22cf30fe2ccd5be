"""The decoder of the `vector` format."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.kernels.decode import _loops, _rows
from qexport.kernels.decode._lanes import LANES
from qexport.schema import Tensors


class VectorDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        own, none = fmt.sized(n, k), packed["codebook"].new_empty(0)
        books = [_book(packed, *names) for names in own.indexed]
        rest = books[1] if len(books) > 1 else (*_NOTHING, *_NOTHING, books[0][-2], 0)
        scales, offsets = (
            packed.get(name, none).to(torch.float32).numpy() for name in ("column_scales", "column_offsets")
        )
        columns = packed.get("outlier_index", none).to(torch.int32).numpy()
        values = packed.get("outlier_values", none.view(0, 0)).to(torch.float32).numpy()
        size = k if own.group_size == -1 else own.group_size
        given = (own.vector_length, size, *books[0], *rest, scales, offsets, columns, values)
        return _rows.Rows(_loops.VECTORS, given, (n, k), own.vector_length)


_NOTHING = (np.empty(0, np.uint8), 0, 0)


def _book(packed: Tensors, indices: str, codebook: str, width: int) -> Any:
    """Indices and the codebook that they point into, as the loops read them."""
    high, book = packed.get(f"{indices}_high"), packed[codebook].to(torch.float32)
    streams = (*_stream(packed[indices], min(width, 8)), *(_NOTHING if high is None else _stream(high, width - 8)))
    return (*streams, F.pad(book.flatten(), (0, LANES)).numpy(), book[0].numel())


def _stream(words: Tensor, bits: int) -> Any:
    return _rows.raw(words), bits, words.shape[1] * 4


plugin = VectorDecoder()
