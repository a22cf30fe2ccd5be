"""The decoder of the `spqr` format."""

from typing import Any

import torch

from qexport.kernels.decode import _rows
from qexport.schema import Tensors


class SpqrDecoder:
    """See `Decoder`."""

    def rows(self, fmt: Any, packed: Tensors, n: int, k: int) -> _rows.Rows:
        """See `Decoder`."""
        codes = {"scale_codes": _rows.across(packed["qscales"], _rows.numbers(fmt.scale_bits), n)}
        codes["zero_codes"] = _rows.across(packed["qzeros"], _rows.numbers(fmt.zero_bits), n)
        scales, zeros = fmt.parameters({**codes, "stats": packed["stats"].to(torch.float32)})
        outliers = (packed["outlier_rows"], packed["outlier_columns"], packed["outlier_values"].to(torch.float32))
        size = k if fmt.group_size == -1 else fmt.group_size
        return _rows.affine(packed["qweight"], fmt.bits, size, zeros, scales, outliers, (n, k))


plugin = SpqrDecoder()
