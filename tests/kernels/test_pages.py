"""Memory in large pages: copies that hold what they were made of, and go back when nothing needs them."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from qexport.kernels.cpu._pages import Pages, placed

KIB = 1 << 10


def _whole(array: np.ndarray) -> object:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_contents_and_shape_are_kept_and_places_are_not_shared(dtype: type) -> None:
    arrays = [np.arange(i * 7 * 101, dtype=np.int64).astype(dtype).reshape(-1, 7) for i in range(20, 40)]
    copies = [placed(a) for a in arrays]
    for array, copy in zip(arrays, copies, strict=True):
        assert copy is not array
        assert copy.dtype == array.dtype
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % 64 == 0
        assert np.array_equal(copy, array)


def test_what_is_not_contiguous_is_afterwards() -> None:
    array = np.arange(64 * KIB, dtype=np.float32).reshape(256, 256).T
    assert np.array_equal(placed(array), array)
    assert placed(array).flags.c_contiguous


def test_small_arrays_and_systems_without_such_pages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small, array = np.ones(8, np.float32), np.ones(64 * KIB, np.float32)
    assert placed(small) is small
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert placed(array) is array


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_chunks_are_shared_and_go_when_their_last_array_does() -> None:
    pages = Pages()
    arrays = [pages.placed(np.ones((1 << 20) * size, np.uint8)) for size in (12, 12, 12, 20)]
    first, second, third, own = (_whole(array) for array in arrays)
    assert first is second
    assert third not in (first, own)
    assert _whole(pages.left) is third
    mapped = len(Path("/proc/self/maps").read_text().splitlines())
    del arrays, first, second, own
    gc.collect()
    assert len(Path("/proc/self/maps").read_text().splitlines()) < mapped
