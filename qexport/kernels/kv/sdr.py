"""How kernels read `sdr`: signed codes, a scale for each head of a token, and flags that shift it for groups."""

import torch

from qexport.kernels.kv.base import Numbers, Past, Rows, plain, shape_of, stored


class Sdr:
    """Razored integers."""

    narrow = False

    def numbers(self, past: Past, heads: int, dim: int) -> Numbers:
        """See `Reader`."""
        coder, packed = past.coder, past.packed
        half, width = 2 ** (coder.bits - 1), (8 - coder.bits).bit_length()
        values = (plain(coder.bits).to(torch.int32) ^ half).to(torch.float32)
        scales, flags = packed["scales"].flatten(1, 2), packed["flags"].flatten(1, 2).view(torch.uint8)
        group = min(coder.channels, dim)
        offsets = torch.full((1,), -float(half))
        return Numbers(coder.bits, values, False, group, scales, offsets, 1, half, flags=flags, flag_bits=width)

    def rows(self, past: Past, heads: int, dim: int) -> Rows:
        """See `Reader`."""
        from qexport.kernels.kv import _numbers, _tiles

        coder = past.coder
        flags = 256 * (8 - coder.bits).bit_length() + past.packed["flags"].shape[-1]
        args = (*shape_of(past, heads, dim), min(coder.channels, dim), 0, flags)
        return Rows(_numbers.sdr, _tiles.sdr, stored(past, "codes", "flags", "scales"), args)

    def obstacle(self) -> str | None:
        """None."""
        return None


plugin = Sdr
