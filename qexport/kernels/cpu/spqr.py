"""The CPU's kernel of the `spqr` format: scales and zeros are made from both levels where blocks are of 16 rows."""

from typing import Any

from qexport.kernels.cpu import _codes
from qexport.schema import Tensors

_BLOCK = 16  # rows that share second-level steps, as the loops read them


class SpqrKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _codes.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _codes.Codes:
        """See `Kernel`."""
        fields = fmt.unpack(packed, n, k)
        sparse = tuple(fields[f"outlier_{name}"] for name in ("rows", "columns", "values"))
        parameters, kind = fmt.parameters(fields), "plain"
        if fmt.stats_group == _BLOCK:
            parameters, kind = (fields["scale_codes"], fields["zero_codes"], fields["stats"]), "levels"
        return _codes.prepare(fields["codes"], parameters, kind, fmt.bits, fmt.group_size, sparse)


plugin = SpqrKernel()
