"""How kernels read `kivi`: codes that are numbers, scales and offsets of channels for keys, of tokens for values."""

from qexport.kernels.kv.base import Numbers, Past, Rows, plain, shape_of, stored


class Kivi:
    """Keys by channels over groups of tokens, values by tokens."""

    narrow = False

    def numbers(self, past: Past, heads: int, dim: int) -> Numbers:
        """See `Reader`."""
        coder, values = past.coder, plain(past.coder.bits)
        scales, offsets = past.packed["scales"].flatten(2), past.packed["offsets"].flatten(2)
        group = min(coder.channels, dim) if coder.fifo else coder.group
        return Numbers(coder.bits, values, not coder.fifo, group, scales, offsets, scales.shape[2] // heads, 0)

    def rows(self, past: Past, heads: int, dim: int) -> Rows:
        """See `Reader`."""
        from qexport.kernels.kv import _numbers, _tiles

        coder, base, tensors = past.coder, shape_of(past, heads, dim), stored(past, "codes", "scales", "offsets")
        if coder.fifo:
            args = (*base, min(coder.channels, dim), 0, 0)
            return Rows(_numbers.kivi_values, _tiles.kivi_values, tensors, args)
        return Rows(_numbers.kivi_keys, _tiles.kivi_keys, tensors, (*base, coder.group, 0, 0))

    def obstacle(self) -> str | None:
        """None."""
        return None


plugin = Kivi
