"""How kernels read `nuq`: codes of a codebook, ranges of channels or tokens, outliers in slots."""

import torch
from torch import Tensor

from qexport.kernels.kv.base import ALL, Numbers, Past, Rows, shape_of, stored


def _codebook(past: Past, heads: int, dim: int) -> dict[str, Tensor]:
    """What a layer's codes stand for, and where they are calibrated the ranges of its channels; made once."""
    coder, memo = past.coder, past.memo
    if not memo:
        values = past.static[f"{coder.side}_lut"].to(torch.float32)
        if coder.qnorm:
            scale, offset = past.static[f"{coder.side}_qnorm"].to(torch.float32)
            values = values * scale + offset
        ranges = coder.range_of(values, past.static) if coder.calibrated else {}
        memo.update({"values": values, **{name: t.view(1, 1, heads, dim) for name, t in ranges.items()}})
    return memo


class Nuq:
    """Codebooks of layers."""

    narrow = True

    def numbers(self, past: Past, heads: int, dim: int) -> Numbers:
        """See `Reader`."""
        coder, packed, memo = past.coder, past.packed, _codebook(past, heads, dim)
        slots = None
        if "outlier_values" in packed:
            slots = packed["outlier_values"].flatten(1, 2), packed["outlier_channels"].flatten(1, 2)
        if coder.calibrated:
            scales, offsets = memo["scales"], memo["offsets"]
            return Numbers(coder.bits, memo["values"], True, ALL, scales, offsets, dim, -1, slots)
        return Numbers(coder.bits, memo["values"], False, dim, packed["scales"], packed["offsets"], 0, -1, slots)

    def rows(self, past: Past, heads: int, dim: int) -> Rows:
        """See `Reader`."""
        from qexport.kernels.kv import _numbers, _tiles

        memo, codes = _codebook(past, heads, dim), past.packed["codes"]
        names = [name for name in ("outlier_values", "outlier_channels") if name in past.packed]
        args, outliers = (*shape_of(past, heads, dim), dim, int(bool(names)), 0), stored(past, *names)
        if past.coder.calibrated:
            ranges = (memo["scales"], memo["offsets"])
            return Rows(_numbers.nuq_channels, _tiles.nuq_channels, (codes, memo["values"], *ranges, *outliers), args)
        tensors = (codes, memo["values"], *stored(past, "scales", "offsets"), *outliers)
        return Rows(_numbers.nuq_tokens, _tiles.nuq_tokens, tensors, args)

    def obstacle(self) -> str | None:
        """AMD's GPUs."""
        return "codebooks and outliers do not fit the registers of AMD GPUs" if torch.version.hip else None


plugin = Nuq
