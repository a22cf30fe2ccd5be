"""Memory in large pages: copies that hold what they were made of, and go back when nothing needs them."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from qexport.kernels.cpu._pages import Pages, placed

KIB = 1 << 10


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
def test_what_an_array_took_goes_back_with_its_last_view_and_others_stay() -> None:
    pages = Pages()
    arrays = [pages.placed(np.full((1 << 20) * 8, i, np.uint8)) for i in range(3)]
    part, full = arrays[1][5:], _resident()
    del arrays[1]
    gc.collect()
    assert _resident() > full - (2 << 20)
    assert (part == 1).all()
    del part
    gc.collect()
    assert _resident() < full - (6 << 20)
    assert [int(a.max()) for a in arrays] == [int(a.min()) for a in arrays] == [0, 2]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_a_chunk_is_no_more_when_its_arrays_are_none() -> None:
    pages = Pages()
    first, second = (pages.placed(np.ones((1 << 20) * 20, np.uint8)) for _ in range(2))
    mapped = _mapped()
    del first
    gc.collect()
    assert _mapped() < mapped
    assert (second == 1).all()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
