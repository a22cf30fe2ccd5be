"""Arrays in large pages: each token reads all weights, and to look up where small pages lie takes a fifth of that.

Linux makes large pages where it is asked to. Elsewhere, and where it has none to give, memory is as usual.
"""

import mmap
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np

_PAGE = 2 << 20  # bytes of a large page
_CHUNK = 32 << 20  # bytes that are asked for at once
_LINE = 64  # arrays begin at a line of the cache
_SMALL = 2048  # bytes of arrays that stay where they are


class Pages:
    """Where arrays are put, chunk after chunk."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.left: Any = np.empty(0, np.uint8)  # of the last chunk

    def placed(self, array: Any) -> Any:
        """A numpy array as a copy in large pages, or itself if it is small or there are none.

        Chunks are shared, by the order in which arrays come, so what a model reads in a row lies in a row. One goes
        back to the system when the last array in it is gone.
        """
        if array.nbytes < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
            return array
        size = -(-array.nbytes // _LINE) * _LINE
        with self._lock:
            if size > _CHUNK // 2:
                own = _mapped(size)
            else:
                if size > self.left.size:
                    self.left = _mapped(_CHUNK)
                own, self.left = self.left[:size], self.left[size:]
        out = own[: array.nbytes].view(array.dtype).reshape(array.shape)
        out[...] = array
        return out


def _mapped(size: int) -> Any:
    """Fresh memory, uint8 [size], that begins with a large page; nothing is taken before it is written to."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _PAGE
    return whole[start : start + size]


placed = Pages().placed  # of all kernels of a process
