"""Arrays in large pages: each token reads all weights, and to look up where small pages lie takes a fifth of that.

Linux makes large pages where it is asked to. Elsewhere, and where it has none to give, memory is as usual.
"""

import mmap
import weakref
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
        self._memory: Any = None  # the last chunk
        self._start, self._stop = 0, 0  # what is left of it

    def placed(self, array: Any) -> Any:
        """A numpy array as a copy in large pages, or itself if it is small or there are none.

        Chunks are shared, by the order in which arrays come, so what a model reads in a row lies in a row. What an
        array took goes back to the system with it, but for pages that others lie in, too.
        """
        if array.nbytes < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
            return array
        size = -(-array.nbytes // _LINE) * _LINE
        with self._lock:
            if size > self._stop - self._start:
                self._memory, self._start = _mapped(max(size, _CHUNK))
                self._stop = self._start + max(size, _CHUNK)
            memory, start = self._memory, self._start
            self._start += size
        own = np.frombuffer(memory, np.uint8, array.nbytes, start)  # which all views of it keep alive
        weakref.finalize(own, _give_back, memory, start, start + size).atexit = False
        out = own.view(array.dtype).reshape(array.shape)
        out[...] = array
        return out


def _mapped(size: int) -> tuple[Any, int]:
    """Fresh memory, and where in it so many bytes begin with a large page; nothing is taken before it is written to."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -np.frombuffer(memory, np.uint8).ctypes.data % _PAGE


def _give_back(memory: Any, start: int, stop: int) -> None:
    """Give whole small pages between two places back; they lie at the same places of `memory`."""
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


placed = Pages().placed  # of all kernels of a process
