"""Bit packing against a statement of it in Python integers."""

import pytest
import torch

from qexport.errors import LayoutError
from qexport.formats import _bits


@pytest.fixture(params=["few", "many"])
def way(request, monkeypatch):
    """Both ways to pack: codes in few calls, and eight at a time."""
    if request.param == "many":
        monkeypatch.setattr(_bits, "_FEW", 0)


def codes_like(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 31, 32, 33, 70, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_little_endian_stream_of_bits(bits, k):
    codes = codes_like(bits, 2, k)
    words = _bits.pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, -(-k // 32) * bits)
    for row, packed in zip(codes.tolist(), words, strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(packed.numpy().astype("<i4").tobytes(), "little") == stream


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5, 33), (0, 32), (2, 3, 2, 64)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_the_codes_back_for_any_leading_shape(bits, shape):
    codes = codes_like(bits, *shape)
    words = _bits.pack_bits(codes, bits)
    assert words.shape == (*shape[:-1], _bits.words_for(shape[-1], bits))
    assert torch.equal(_bits.unpack_bits(words, bits, shape[-1]), codes)


def test_views_are_packed_and_unpacked_like_copies():
    codes = codes_like(3, 64, 96).T[::2]
    words = _bits.pack_bits(codes, 3)
    assert torch.equal(words, _bits.pack_bits(codes.clone(), 3))
    wide = torch.zeros(words.shape[0], words.shape[1] * 2, dtype=torch.int32)
    wide[:, ::2] = words
    assert torch.equal(_bits.unpack_bits(wide[:, ::2], 3, 64), codes)


def test_chunks_do_not_show(monkeypatch):
    codes = codes_like(5, 41, 50)
    whole = _bits.pack_bits(codes, 5)
    monkeypatch.setattr(_bits, "_FEW", 0)
    monkeypatch.setattr(_bits, "_CHUNK", {"cpu": 128})
    assert torch.equal(_bits.pack_bits(codes, 5), whole)
    assert torch.equal(_bits.unpack_bits(whole, 5, 50), codes)


def test_what_pads_a_row_is_zero_and_ignored_when_read():
    words = _bits.pack_bits(torch.full((1, 5), 7, dtype=torch.uint8), 3)
    assert words.tolist() == [[2**15 - 1, 0, 0]]
    words[0, 2] = -1
    assert torch.equal(_bits.unpack_bits(words, 3, 5), torch.full((1, 5), 7, dtype=torch.uint8))


def test_a_code_that_needs_more_bits_is_refused():
    with pytest.raises(LayoutError, match=r"below 8 \(3 bits\), found 8"):
        _bits.pack_bits(torch.tensor([[1, 8]], dtype=torch.uint8), 3)


@pytest.mark.parametrize("n", [1, 31, 64])
def test_small_codes_are_packed_along_n(n):
    codes = codes_like(3, n, 5)
    words = _bits.pack_across(codes, 3)
    assert torch.equal(words, _bits.pack_bits(codes.T, 3))
    assert torch.equal(_bits.unpack_across(words, 3, n), codes)


@pytest.mark.parametrize(("k", "size"), [(10, 4), (8, 4), (3, 4), (5, -1), (4, 2**31 - 1)])
def test_groups_cover_each_column_once(k, size):
    x = torch.arange(2 * k).view(2, k)
    real = k if size == -1 else size
    for part, groups in _bits.grouped(x, size):
        for g in range(groups.start, groups.stop):
            assert torch.equal(part[:, g - groups.start], x[:, g * real : (g + 1) * real])
    assert groups.stop == _bits.groups_in(k, size) == -(-k // real)


@pytest.mark.parametrize("rows", [(1, 32), (0, 33), (32, 32), (0, 65), (-32, 32), (32, 0)])
def test_a_cut_that_the_layout_does_not_allow_is_refused(rows):
    with pytest.raises(LayoutError, match="along n: expected a range within 0:64 at multiples of 32"):
        _bits.check_cut({"n": 32, "k": 64}, 64, 128, rows, (0, 128))


def test_the_range_of_a_view_with_columns_outermost_is_the_same():
    w = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    for a, b in zip(_bits.range_of(w), _bits.range_of(w.T.contiguous().T), strict=True):
        assert torch.equal(a, b)
