"""The CPU's kernel of the `bcq` format: a plane's bit adds 2 alpha, and every column what is left when none is set."""

from typing import Any

from qexport.kernels.cpu import _planes
from qexport.schema import Tensors


class BcqKernel:
    """See `Kernel`."""

    def supports(self, fmt: Any, n: int, k: int) -> str | None:
        """Why not, or None."""
        return _planes.obstacle(fmt.group_size, k)

    def prepare(self, fmt: Any, packed: Tensors, n: int, k: int) -> _planes.Planes:
        """See `Kernel`."""
        fields = fmt.unpack(packed, n, k)
        alpha = fields["alpha"]
        always = -alpha.sum(2) + fields.get("offset", 0)
        return _planes.prepare(fields["codes"], 2 * alpha, always, fmt.group_size)


plugin = BcqKernel()
