"""What formats of packed codes share: exact bit packing, groups along k, cuts and the checking of options.

Bit packing: a row of codes is a little-endian stream of bits in int32 words. Code i of a row of b-bit codes takes the
bits [i b, (i + 1) b) of the stream, lowest bit first; bit p of the stream is bit p % 32 of word p // 32. Rows are
padded with zero codes to a multiple of 32 codes, so that 32 codes take exactly b words, whatever b is.

Eight codes take exactly b bytes, so they are moved eight at a time inside one int64: three rounds of masks and shifts
bring eight bytes together to b bytes, or apart again. That is a dozen elementwise operations for every width, with no
more memory than twice the codes, and less in practice, because rows are worked off in chunks that fit a cache.
Bytes and words are views of each other, which assumes a little-endian machine, as all that run torch kernels are.
"""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from qexport.errors import LayoutError, UsageError

_CHUNK = {"cpu": 1 << 18}  # codes in flight: a cache's worth
_FEW = 1 << 12  # codes that are packed with as few calls as possible
_CHUNK_ELSEWHERE = 1 << 26  # an accelerator wants few, large launches


def words_for(count: int, bits: int) -> int:
    """Int32 words that a row of `count` codes takes."""
    return -(-count // 32) * bits


def _rounds(bits: int) -> Iterator[tuple[int, int, int]]:
    """(mask of the fields that stay, mask of those that move, by how much), from eight bytes to `bits` bytes."""
    for lane in (8, 16, 32):
        width = bits * lane // 8
        stay = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * lane))
        yield stay, stay << lane, lane - width


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    step = max(_CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 [..., k], every code below 2^bits.
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(k / 32) * bits].

    Raises:
        LayoutError: a code needs more bits; packed, it would change its neighbours.
    """
    *lead, k = codes.shape
    check_codes(codes, bits)
    flat = codes.reshape(-1, k)
    padded = -(-k // 32) * 32
    if codes.device.type == "cpu" and 0 < flat.shape[0] * padded <= _FEW:
        return _pack_few(flat, bits).reshape(*lead, words_for(k, bits))
    out = torch.empty(flat.shape[0], padded // 8, bits, dtype=torch.uint8, device=codes.device)
    for rows in _chunks(flat.shape[0], padded, codes.device):
        piece = torch.zeros(rows.stop - rows.start, padded, dtype=torch.uint8, device=codes.device)
        piece[:, :k] = flat[rows]
        wide = piece.view(torch.int64)
        if bits < 8:
            moved = torch.empty_like(wide)
            for stay, move, shift in _rounds(bits):
                torch.bitwise_and(wide, move, out=moved)
                wide.bitwise_and_(stay).bitwise_or_(moved.bitwise_right_shift_(shift))
        out[rows] = piece.view(-1, padded // 8, 8)[:, :, :bits]
    return out.view(-1, padded // 8 * bits).view(torch.int32).reshape(*lead, words_for(k, bits))


def _pack_few(codes: Tensor, bits: int) -> Tensor:
    """What `pack_bits` gives for codes [rows, k], in few calls: a token of a cache is all overhead."""
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // 32) * 32, 1), np.uint8)
    padded[:, : codes.shape[1], 0] = codes.numpy()
    stream = np.unpackbits(padded, axis=2, count=bits, bitorder="little").reshape(codes.shape[0], -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32))


def check_codes(codes: Tensor, bits: int) -> None:
    """Raise `LayoutError` unless every code, uint8, is below 2^bits."""
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise LayoutError(f"codes: expected values below {1 << bits} ({bits} bits), found {int(codes.max())}.")


def unpack_bits(words: Tensor, bits: int, k: int) -> Tensor:
    """Exact inverse of `pack_bits`.

    Args:
        words: int32 [..., ceil(k / 32) * bits].
        bits: 1 to 8.
        k: codes in a row; what pads it is ignored.

    Returns:
        uint8 [..., k].
    """
    lead = words.shape[:-1]
    padded = -(-k // 32) * 32
    flat = words.contiguous().view(torch.uint8).view(-1, padded // 8, bits)
    out = torch.empty(flat.shape[0], k, dtype=torch.uint8, device=words.device)
    for rows in _chunks(flat.shape[0], padded, words.device):
        piece = torch.zeros(rows.stop - rows.start, padded, dtype=torch.uint8, device=words.device)
        piece.view(-1, padded // 8, 8)[:, :, :bits] = flat[rows]
        wide = piece.view(torch.int64)
        if bits < 8:
            moved = torch.empty_like(wide)
            for stay, move, shift in reversed(list(_rounds(bits))):
                torch.bitwise_and(wide, move >> shift, out=moved)
                wide.bitwise_and_(stay).bitwise_or_(moved.bitwise_left_shift_(shift))
        out[rows] = piece[:, :k]
    return out.view(*lead, k)


def pack_across(codes: Tensor, bits: int) -> Tensor:
    """Pack small codes [n, G] along n: uint8 [n, G] to int32 [G, ceil(n / 32) * bits].

    There are few groups in a row and many rows, so padding along n costs next to nothing, and along k it would double
    the bytes of a matrix with one group.
    """
    return pack_bits(codes.T.contiguous(), bits)


def unpack_across(words: Tensor, bits: int, n: int) -> Tensor:
    """Exact inverse of `pack_across`: int32 [G, ceil(n / 32) * bits] to uint8 [n, G]."""
    return copy_of(unpack_bits(words, bits, n).T)


def cut_words(words: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The words of the codes [start, stop) of each row; start is a multiple of 32."""
    return copy_of(words[..., start // 32 * bits : words_for(stop, bits)])


def copy_of(view: Tensor) -> Tensor:
    """A contiguous copy, so that a slice does not keep the whole matrix in memory."""
    return view.clone(memory_format=torch.contiguous_format)


def groups_in(k: int, group_size: int) -> int:
    """Groups in a row of k columns; the last may be shorter. A group size of -1 is one group."""
    return 1 if group_size == -1 else -(-k // group_size)


def grouped(x: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [n, groups, columns] of x [n, k] with the groups they cover: the whole groups, then a shorter last one."""
    k = x.shape[1]
    size = k if group_size == -1 else min(group_size, k)
    whole = k // size
    yield x[:, : whole * size].view(x.shape[0], whole, size), slice(0, whole)
    if whole * size < k:
        yield x[:, None, whole * size :], slice(whole, whole + 1)


def range_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest along the last axis, which is dropped.

    A column loop hands over views with the columns outermost, whose two reductions run across rows in vector registers:
    eight times as fast as the fused one.
    """
    if w.ndim == 2 and w.stride(0) == 1:
        return w.amin(1), w.amax(1)
    lo, hi = torch.aminmax(w, dim=-1)
    return lo, hi


def cut_groups(group_size: int, columns: tuple[int, int]) -> slice:
    """Groups that the columns [start, stop) touch; start is a multiple of the group size."""
    if group_size == -1:
        return slice(0, 1)
    return slice(columns[0] // group_size, -(-columns[1] // group_size))


def check_cut(multiple: Mapping[str, int], n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Raise `LayoutError` unless an [n, k] matrix can be cut to these half-open ranges."""
    for axis, size, (start, stop) in (("n", n, rows), ("k", k, columns)):
        step = multiple[axis] or size  # 0: not at all
        if not (0 <= start < stop <= size and start % step == 0 and (stop % step == 0 or stop == size)):
            raise LayoutError(
                f"an [{n}, {k}] matrix can't be cut to {start}:{stop} along {axis}: "
                f"expected a range within 0:{size} at multiples of {step}."
            )


def require(ok: bool, fmt: str, option: str, value: object, allowed: str) -> None:
    """Raise `UsageError` with what an option may be, unless it is."""
    if not ok:
        raise UsageError(f"format {fmt!r}: {option} must be {allowed}, found {str(value)[:80]!r}.")


def require_group_size(size: object, fmt: str) -> None:
    """Raise `UsageError` unless a number of columns can be a group: 1 or more, or -1."""
    sized = is_int(size, 1, 2**31 - 1) or is_int(size, -1, -1)
    require(sized, fmt, "group_size", size, "a whole number from 1 on, or -1 for one group per row")


def is_int(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether a value is an int (a bool is none) within [low, high]."""
    return type(value) is int and low <= value <= high
