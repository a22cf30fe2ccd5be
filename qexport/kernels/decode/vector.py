"""The decoder of the `vector` format."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.kernels.decode import _loops, _rows
from qexport.kernels.decode.base import Fill
from qexport.schema import Tensors


class VectorDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> Fill:
        """See `Decoder`."""
        own, none = fmt.sized(n, k), packed["codebook"].new_empty(0)
        books = [_book(packed, *names) for names in own.indexed]
        rest = books[1] if len(books) > 1 else (_NOTHING, _NOTHING, books[0][2])
        scales, offsets = (
            packed.get(name, none).to(torch.float32).numpy() for name in ("column_scales", "column_offsets")
        )
        columns = packed.get("outlier_index", none).to(torch.int32).numpy()
        values = packed.get("outlier_values", none.view(0, 0)).to(torch.float32).numpy()
        size = k if own.group_size == -1 else own.group_size
        given = (books[0], rest, size, scales, offsets, columns, values)
        return _rows.filling(_loops.vectors_by_one, _loops.vectors_by_all, given)


_NOTHING = (np.empty(0, np.uint8), 0, np.empty(0, np.int32), 0)


def _book(packed: Tensors, indices: str, codebook: str, width: int) -> Any:
    """Indices and the codebook that they point into, as the loops read them."""
    high = packed.get(f"{indices}_high")
    streams = [_stream(packed[indices], min(width, 8), 1), _NOTHING if high is None else _stream(high, width - 8, 256)]
    return (*streams, packed[codebook].to(torch.float32).numpy())


def _stream(words: Tensor, bits: int, unit: int) -> Any:
    return _rows.raw(words), bits, np.arange(2**bits, dtype=np.int32) * np.int32(unit), words.shape[1] * 4


plugin = VectorDecoder()
