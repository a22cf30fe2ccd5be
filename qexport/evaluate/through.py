"""Predictions through a quantized cache, as decoding would make them.

A model that reads a text at once attends to keys and values as they were computed, whatever its cache then stores. So
text is fed in chunks of at most a group of the format: what a query reads has been packed before, its own chunk
included, but for first tokens and the window that the format declares.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.kv.base import KVFormat, chunk_of, kv_json, kv_name
from qexport.runtime.cache import QuantCache, cache_of
from qexport.schema import Tensors


class Through:
    """A model that reads through a quantized cache, and what was read so far.

    Args:
        model: causal language model in eval mode.
        fmt: of the cache.
        statics: what calibration found, by layer.

    Raises:
        UsageError: the model has no such cache, or the format needs calibration that is not there.
    """

    def __init__(self, model: Any, fmt: KVFormat, statics: Mapping[int, Tensors]) -> None:
        self.model, self.fmt, self.statics = model, fmt, statics
        self.reads = self.packed_reads = 0
        self.largest: dict[str, int] = {"tokens": 0}
        self.cache()

    def cache(self) -> QuantCache:
        """A new one, empty."""
        return cache_of(self.model, self.fmt, self.statics)

    @torch.no_grad()
    def logits(self, ids: Tensor, kept: int) -> Tensor:
        """Logits of the last positions.

        Args:
            ids: int64 [b, length], without pads.
            kept: so many positions at the end.

        Returns:
            [b, kept, vocabulary] in the model's dtype.
        """
        cache, chunk, length = self.cache(), chunk_of(self.fmt), ids.shape[1]
        out = []
        for start in range(0, length, chunk):
            part = ids[:, start : start + chunk]
            found = self.model(input_ids=part.to(self.model.device), past_key_values=cache, use_cache=True).logits
            skipped = max(length - kept - start, 0)
            if skipped < found.shape[1]:
                out.append(found[:, skipped:])
        self.note(cache)
        return torch.cat(out, 1)

    def note(self, cache: QuantCache) -> None:
        """Add what was read from a cache that is full."""
        self.reads += cache.key_reads
        self.packed_reads += cache.packed_reads
        tokens = cache.get_seq_length()
        if tokens > self.largest["tokens"]:
            self.largest = {
                "tokens": tokens, "bytes": cache.nbytes, "capacity_bytes": cache.capacity_bytes,
                "fp16_bytes": cache.fp16_bytes,
            }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What was used and read, as it stands in the results; bytes are those of the longest text read at once.

        Raises:
            UsageError: no query read a quantized key: the result would not be one of this cache.
        """
        fraction = self.packed_reads / self.reads if self.reads else 0.0
        if not fraction:
            raise UsageError(
                f"kv {kv_name(self.fmt)}: no key that a query read was quantized: expected texts longer than the "
                f"{self.fmt.residual_window + self.fmt.sink_tokens} tokens that stay in full precision, found at most "
                f"{self.largest['tokens']}. Use a longer --seqlen, or -s kv.residual_window=0."
            )
        return {
            "name": kv_name(self.fmt), **kv_json(self.fmt), "chunk": chunk_of(self.fmt), **self.largest,
            "quantized_read_fraction": fraction,
        }  # fmt: skip
