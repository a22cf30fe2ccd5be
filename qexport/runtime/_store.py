"""What a cache holds of sequences that started together: first tokens, packed groups, and a window not packed yet.

Everything counts a sequence's own tokens from 0; pads never come here. Memory is allocated ahead and grows by a
quarter, so that a new token costs what it stores and not what is there already.
"""

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from qexport.formats.kv.base import Coder, KVFormat, packed_after
from qexport.schema import Tensors

_GROWTH = 1.25


class Rows:
    """Tensors that grow together along axis 1: [batch, rows, ...] each."""

    def __init__(self) -> None:
        self.count = 0
        self.buffers: dict[str, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return next(iter(self.buffers.values())).shape[1] if self.buffers else 0

    def append(self, new: Tensors) -> None:
        """Add rows."""
        total = self.count + next(iter(new.values())).shape[1]
        if total > self.capacity:
            self._move(max(total, ceil(self.capacity * _GROWTH)), new)
        for name, tensor in new.items():
            self.buffers[name][:, self.count : total] = tensor
        self.count = total

    def _move(self, capacity: int, like: Tensors) -> None:
        for name, tensor in like.items():
            room = tensor.new_empty(tensor.shape[0], capacity, *tensor.shape[2:])
            if self.count:
                room[:, : self.count] = self.buffers[name][:, : self.count]
            self.buffers[name] = room

    def view(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows as they lie there."""
        stop = self.count if stop is None else stop
        return {name: tensor[:, start:stop] for name, tensor in self.buffers.items()}

    def drop(self, first: int) -> None:
        """Forget rows at the front, and move the others there."""
        kept = {name: tensor.clone() for name, tensor in self.view(first).items()}
        self.count, self.buffers = 0, {}
        if next(iter(kept.values())).shape[1]:
            self.append(kept)

    def select(self, batch: Tensor) -> None:
        """Other sequences of the batch in place of those that are there; indices, int64."""
        self.buffers = {name: tensor.index_select(0, batch.to(tensor.device)) for name, tensor in self.buffers.items()}

    @property
    def nbytes(self) -> int:
        """Of the rows."""
        return sum(t[:, :1].nbytes * self.count for t in self.buffers.values())

    @property
    def capacity_bytes(self) -> int:
        """Of the memory that is held."""
        return sum(t.nbytes for t in self.buffers.values())


class Rope:
    """Rotations by position, one for each own token of some sequences: what their model rotated the keys by.

    Both orders of channels that models use are known: pairs (i, i + r / 2), and neighbours (2 i, 2 i + 1).
    """

    def __init__(self, *, neighbours: bool) -> None:
        self.neighbours = neighbours
        self.rows = Rows()

    @classmethod
    def of(cls, cos: Tensor) -> "Rope | None":
        """For cosines [t, r] as a model hands them to its attention; None where their order is another."""
        half = cos.shape[-1] // 2
        if cos.shape[-1] % 2 == 0 and torch.equal(cos[:, :half], cos[:, half:]):
            return cls(neighbours=False)
        if cos.shape[-1] % 2 == 0 and torch.equal(cos[:, ::2], cos[:, 1::2]):
            return cls(neighbours=True)
        return None

    def extend(self, start: int, cos: Tensor, sin: Tensor) -> None:
        """Note rotations [t, r] of the tokens from `start` on; those that are known already stay as they are."""
        known = self.rows.count - start
        if known >= cos.shape[0]:
            return
        own = slice(None, None, 2) if self.neighbours else slice(0, cos.shape[-1] // 2)
        new = {"cos": cos[known:, own], "sin": sin[known:, own]}
        self.rows.append({name: t.to(torch.float32).unsqueeze(0) for name, t in new.items()})

    def undo(self, x: Tensor, start: int) -> Tensor:
        """Keys [b, t, h, d], float32, as they were before their rotation, whose scale is undone too."""
        cos, sin = self._of(start, x.shape[1])
        return self._turned(x, cos / (cos**2 + sin**2), -sin / (cos**2 + sin**2))

    def redo(self, x: Tensor, start: int) -> Tensor:
        """Keys [b, t, h, d], float32, rotated as the model would."""
        return self._turned(x, *self._of(start, x.shape[1]))

    def back(self, gradient: Tensor, start: int) -> Tensor:
        """Gradients [b, t, h, d], float32, with respect to rotated keys as those with respect to keys before it."""
        cos, sin = self._of(start, gradient.shape[1])
        return self._turned(gradient, cos, -sin)

    def _of(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        found = self.rows.view(start, start + count)
        return found["cos"].unsqueeze(2), found["sin"].unsqueeze(2)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        out = x.clone()
        first, second = (slice(0, half), slice(half, 2 * half))
        if self.neighbours:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = x[..., first], x[..., second]
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        return out


class Side:
    """Keys or values of sequences of one start.

    Attributes:
        sink: the first tokens, [b, h, t, d] in the model's dtype.
        packed: groups of tokens after them.
        recent: tokens after those, like `sink`.
        gone: tokens at the front that a sliding window has left behind, sink included; their memory is given back.
    """

    def __init__(self, coder: Coder, static: Tensors, fmt: KVFormat, like: Tensor) -> None:
        self.coder, self.static = coder, static
        self.window, self.sinks = fmt.residual_window, fmt.sink_tokens
        self.heads, self.dim = like.shape[1], like.shape[3]
        self.sink = self.recent = like[:, :, :0]
        self.packed = Rows()
        self.gone = 0
        self.memo: dict[str, Tensor] = {}  # of kernels

    @property
    def tokens(self) -> int:
        """Own tokens of each sequence so far."""
        return self.first_recent + self.recent.shape[2]

    @property
    def first_recent(self) -> int:
        """Index of the first token that is not packed and no sink."""
        return self.first_packed + self.packed.count * self.coder.group

    @property
    def first_packed(self) -> int:
        """Index of the first packed token that is still there."""
        return max(self.sink.shape[2], self.gone)

    def append(self, x: Tensor, rope: Rope | None) -> None:
        """Add tokens [b, h, t, d]; what leaves the window is packed."""
        room = self.sinks - self.sink.shape[2]
        if room > 0 and not self.gone:
            self.sink = torch.cat([self.sink, x[:, :, :room]], 2)
            x = x[:, :, room:]
        start, waiting = self.first_recent, self.recent.shape[2]
        goal = packed_after(self.coder, self.tokens + x.shape[2] - self.sink.shape[2], self.window)
        leaving = max(goal - (start - self.sink.shape[2]), 0)
        old, own = self.recent, max(leaving - waiting, 0)
        if leaving:
            self._pack(torch.cat([old, x[:, :, :own]], 2) if own else old[:, :, :leaving], start, rope)
        self.recent = torch.cat([old[:, :, leaving:], x[:, :, own:]], 2)

    @torch.no_grad()
    def _pack(self, x: Tensor, start: int, rope: Rope | None) -> None:
        rows = x.transpose(1, 2).to(torch.float32)
        rows = rows if rope is None else rope.undo(rows, start)
        groups = rows.unflatten(1, (-1, self.coder.group))
        self.packed.append(self.coder.encode(groups.detach().contiguous(), self.static))

    def read(self, start: int, rope: Rope | None) -> Tensor:
        """Tokens from `start` on, [b, h, t, d] in the model's dtype, packed ones decoded."""
        parts = [self.sink[:, :, start:]] if start < self.sink.shape[2] else []
        if start < self.first_recent and self.packed.count:
            parts.append(self._decoded(max(start, self.first_packed), rope))
        parts.append(self.recent[:, :, max(start - self.first_recent, 0) :])
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def _decoded(self, start: int, rope: Rope | None) -> Tensor:
        """Packed tokens from `start` on; no gradient passes through them."""
        group, skipped = divmod(start - self.first_packed, self.coder.group)
        rows = self.coder.decode(self.packed.view(group), self.static, self.heads, self.dim).flatten(1, 2)
        first = start - skipped
        rows = rows if rope is None else rope.redo(rows, first)
        return rows[:, skipped:].transpose(1, 2).to(self.recent.dtype)

    def forget(self, before: int) -> None:
        """Give back the memory of whole groups that lie before a token, once they are a quarter of what is packed."""
        groups = min((before - self.first_packed) // self.coder.group, self.packed.count)
        if groups > 0 and groups >= (_GROWTH - 1) * self.packed.count:
            self.gone = self.first_packed + groups * self.coder.group
            self.packed.drop(groups)

    def truncate(self, tokens: int, rope: Rope | None) -> None:
        """Forget all but the first `tokens` tokens; of a group that is cut, the rest is decoded into the window."""
        if tokens >= self.first_recent:
            self.recent = self.recent[:, :, : tokens - self.first_recent].clone()
            return
        if tokens <= self.sink.shape[2]:
            self.sink, self.recent = self.sink[:, :, :tokens].clone(), self.recent[:, :, :0].clone()
            self.packed = Rows()
            return
        whole = (tokens - self.first_packed) // self.coder.group
        kept = self.first_packed + whole * self.coder.group
        self.recent = self._decoded(kept, rope)[:, :, : tokens - kept].clone()
        self.packed.count = whole

    def select(self, batch: Tensor) -> None:
        """Other sequences in place of those that are there; indices, int64."""
        self.sink = self.sink.index_select(0, batch.to(self.sink.device))
        self.recent = self.recent.index_select(0, batch.to(self.recent.device))
        self.packed.select(batch)

    @property
    def nbytes(self) -> int:
        """Of what is stored."""
        return self.sink.nbytes + self.recent.nbytes + self.packed.nbytes

    @property
    def capacity_bytes(self) -> int:
        """Of the memory that is held for it."""
        return self.sink.nbytes + self.recent.nbytes + self.packed.capacity_bytes


class Cohort:
    """Sequences of a batch with equally many pads: their own tokens have the same numbers.

    Attributes:
        rows: their places in the batch.
        pad: pads before them.
    """

    def __init__(self, rows: list[int], pad: int, fmt: KVFormat, static: Tensors, k: Tensor, v: Tensor) -> None:
        self.rows, self.pad = rows, pad
        self.keys = Side(fmt.keys, static, fmt, k[rows])
        self.values = Side(fmt.values, static, fmt, v[rows])

    @property
    def tokens(self) -> int:
        """Own tokens so far."""
        return self.keys.tokens

    def select(self, wanted: Mapping[int, int]) -> None:
        """Take other places in the batch: new place -> old place, which has to be one of `rows`."""
        batch = torch.tensor([self.rows.index(old) for old in wanted.values()], dtype=torch.int64)
        self.rows = list(wanted)
        for side in (self.keys, self.values):
            side.select(batch)

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def capacity_bytes(self) -> int:
        """Of the memory that is held for them."""
        return self.keys.capacity_bytes + self.values.capacity_bytes
