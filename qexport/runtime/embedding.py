"""A packed embedding: only the rows that are asked for are decoded."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qexport.formats.specs import LinearSpec
from qexport.runtime.decoding import decoded_rows
from qexport.runtime.dispatch import Choice
from qexport.runtime.packed import Budget, PackedWeight
from qexport.schema import Extents

# Weights: so many are decoded in the time that one more call takes; so many at a time, which bounds the memory.
_JOINED, _AT_ONCE = 1 << 16, 1 << 24


class QuantEmbedding(PackedWeight):
    """Stands for an embedding, an `nn.Embedding` or one that multiplies its rows by a constant, whatever the format.

    The module that it stands for stays inside without its table: its `forward`, given a table of the rows at hand, is
    what computes. So results are equal bit for bit to those of the module with the decoded table.

    Args:
        spec: what is stored.
        own: the module that this stands for; it is left as it is.
        dtype: the model's dtype.
        extents: data-dependent extents.
        device: where the empty tensors are made.
        budget: where to ask before keeping the decoded table; by default nothing is kept.
    """

    choice = Choice("reference", "of an embedding only the rows that are asked for are decoded")

    def __init__(
        self,
        spec: LinearSpec,
        own: nn.Embedding,
        *,
        dtype: torch.dtype | None = None,
        extents: Extents | None = None,
        device: torch.device | str = "meta",
        budget: Budget | None = None,
    ) -> None:
        n, k = own.weight.shape
        super().__init__(spec, n, k, dtype=dtype, extents=extents, device=device, budget=budget)
        self.num_embeddings, self.embedding_dim, self.padding_idx = n, k, own.padding_idx
        self.own = _without_table(own)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Embedding calls it
        """The rows of ids, int64 [...], as [..., k] in the model's dtype; on the meta device only their shape.

        Raises:
            IndexError: an id is no row of the table.
        """
        if input.is_meta or self.place.type == "meta":
            return torch.empty(*input.shape, self.k, dtype=self.dtype, device="meta")
        if torch.compiler.is_compiling() and input.device.type == "cpu":
            return torch.ops.qexport.rows(input, self._number, self.k, self.dtype)
        return self.looked_up(input)

    def looked_up(self, input: Tensor) -> Tensor:  # noqa: A002
        """What `forward` gives for ids that are there, also for the operator that stands for it in graphs."""
        kept = self._kept is not None or (not self._visiting and self._affordable)
        table, ids = (self._decoded_in(self.dtype), input) if kept else self._rows(input)
        standin = copy.copy(self.own)
        vars(standin).update(weight=table, padding_idx=None)  # which matters to training, and need not be in this table
        found: Tensor = type(self.own).forward(standin, ids)
        return found

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The embedding that this stands for with the decoded table; this one is of no use any more."""
        table = self.decoded(dtype)
        own = self.own
        own.weight = nn.Parameter(table, requires_grad=False)
        return own.train(self.training)

    @property
    def _affordable(self) -> bool:
        return self.n * self.k * self.dtype.itemsize <= self.budget.left

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A table of the distinct rows that are asked for, and the ids in it."""
        if ids.numel() == 1:  # each token of a model that generates: to sort and to count takes longer than to decode
            return self._row(int(ids)), torch.zeros_like(ids)
        tokens, inside = ids.unique(return_inverse=True)  # sorted
        self._check(*((int(tokens[0]), int(tokens[-1])) if tokens.numel() else (0, 0)))
        table = torch.empty(tokens.numel(), self.k, dtype=self.dtype, device=self.place)
        done = 0
        for start, stop, count in self._runs(tokens):
            part = decoded_rows(self.spec, self.packed, self.n, self.k, (start, stop))
            table[done : done + count] = part[tokens[done : done + count] - start]
            done += count
        return table, inside

    def _row(self, token: int) -> Tensor:
        """A table of one row."""
        self._check(token, token)
        step = self.spec.weight.shard_multiple["n"] or self.n
        start = token // step * step
        part = decoded_rows(self.spec, self.packed, self.n, self.k, (start, min(start + step, self.n)))
        return part[token - start : token - start + 1].to(self.dtype)

    def _check(self, least: int, most: int) -> None:
        if least < 0 or most >= self.n:
            raise IndexError(f"expected ids from 0 to {self.n - 1}, found {least} to {most}")

    def _runs(self, tokens: Tensor) -> Iterator[tuple[int, int, int]]:
        """Ranges of rows to decode at a time, and how many of the tokens, sorted, lie in each.

        A format can be cut at some rows only. Neighbours are taken together as long as that is cheaper than a call.
        """
        step = self.spec.weight.shard_multiple["n"] or self.n
        blocks, counts = torch.unique_consecutive(tokens // step, return_counts=True)
        first = last = count = -1
        for block, some in zip(blocks.tolist(), counts.tolist(), strict=True):
            gap, whole = (block - last - 1) * step, (block - first + 1) * step
            if count >= 0 and gap * self.k <= _JOINED and whole * self.k <= _AT_ONCE:
                last, count = block, count + some
                continue
            if count >= 0:
                yield first * step, min((last + 1) * step, self.n), count
            first, last, count = block, block, some
        if count >= 0:
            yield first * step, min((last + 1) * step, self.n), count


def _without_table(embedding: nn.Embedding) -> nn.Embedding:
    """A copy that has only the shape of a table, for code that reaches for it while a model is loaded."""
    own = copy.copy(embedding)
    vars(own).update(_parameters={}, _buffers=dict(embedding._buffers), weight=embedding.weight.detach().to("meta"))
    return own
