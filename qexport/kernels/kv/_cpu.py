"""Attention over packed keys and values on a CPU; needs numba.

Scores of all tokens come first, then their softmax, then the sums of values: a code is read once for all queries of
its head. Tokens are cut into parts of a fixed length, so the result is the same whatever the number of threads.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.kernels._threads import many
from qexport.kernels.kv import _loops
from qexport.kernels.kv._stored import Arrays, Shape
from qexport.kernels.kv.base import Numbers, Past, reader, span_of, table_of

SPLIT = 512  # tokens of a part
_SMALL = 1 << 16  # numbers that one thread works off before others would have started


def attend(q: Tensor, keys: Past, values: Past, *, scaling: float) -> Tensor:
    """Softmax of products with keys, times values.

    Args:
        q: [b, heads of queries, dim]; the queries of a head of keys lie next to each other.
        keys: what they see.
        values: of the same tokens.
        scaling: factor of the products.

    Returns:
        float32 [b, heads of queries, dim of values].
    """
    heads = keys.before.shape[1]
    own = (q.to(torch.float32) * scaling).unflatten(1, (heads, -1)).contiguous()
    scores = own.new_empty(*own.shape[:3], keys.tokens)
    columns = scores.shape[3]
    for rows, at in ((keys.before, 0), (keys.after, columns - keys.after.shape[2])):
        if rows.shape[2]:
            scores[..., at : at + rows.shape[2]] = own @ rows.to(torch.float32).transpose(2, 3)
    if keys.stop > keys.first:
        _packed_scores(own, keys, scores)
    p = torch.softmax(scores, -1)
    out = _packed_sums(p, values) if values.stop > values.first else None
    for rows, at in ((values.before, 0), (values.after, columns - values.after.shape[2])):
        if rows.shape[2]:
            more = p[..., at : at + rows.shape[2]] @ rows.to(torch.float32)
            out = more if out is None else out.add_(more)
    assert out is not None, "a query sees at least itself"
    return out.flatten(1, 2)


def _packed_scores(q: Tensor, past: Past, scores: Tensor) -> None:
    """Fill the columns of packed tokens."""
    a, s = _arrays(past, scores.shape[3])
    splits = -(-(s.stop - s.first) // s.split)
    run = _loops.keys_by_all if _many(q.shape[0] * splits, s, q.shape[1] * q.shape[3]) else _loops.keys
    if s.unit:
        q = q[..., torch.from_numpy(a.order)].contiguous()
    run(q.numpy(), a, s, splits, scores.view(-1).numpy())


def _packed_sums(p: Tensor, past: Past) -> Tensor:
    """Sums of the packed tokens, float32 [b, heads, queries, dim]."""
    a, s = _arrays(past, p.shape[3])
    splits = -(-(s.stop - s.first) // s.split)
    out = p.new_empty(p.shape[0], p.shape[1], splits, p.shape[2], past.before.shape[3])
    run = _loops.values_by_all if _many(p.shape[0] * splits, s, p.shape[1] * out.shape[4]) else _loops.values
    run(p.view(-1).numpy(), a, s, out.numpy())
    total = out.sum(2)
    return total[..., torch.from_numpy(_place(a.order.size, s.unit))] if s.unit else total


def _arrays(past: Past, total: int) -> tuple[Any, Any]:
    """What the loops read."""
    heads, dim = past.before.shape[1], past.before.shape[3]
    n: Numbers = reader(past.format).numbers(past, heads, dim)
    codes, span, unit = past.packed["codes"], _span(n.bits, dim), _unit(n, past, dim)
    a = Arrays(
        codes=codes.view(torch.uint8).view(-1).numpy(),
        table=_EMPTY if unit else _table(n, span),
        scales=_flat(n.scales),
        offsets=_flat(n.offsets),
        flags=_BYTES if n.flags is None else n.flags.view(-1).numpy(),
        slot_values=_HALVES if n.slots is None else _flat(n.slots[0]),
        slot_channels=_HALVES if n.slots is None else n.slots[1].reshape(-1).numpy().view(np.uint16),
        cos=_EMPTY if past.turn is None else past.turn.cos.reshape(-1).numpy(),
        sin=_EMPTY if past.turn is None else past.turn.sin.reshape(-1).numpy(),
        order=_order(dim, unit),
    )
    s = Shape(
        bits=n.bits,
        span=span,
        unit=unit,
        flip=max(n.flip, 0),
        row=codes.shape[-1] * 4,
        room=codes.shape[1] * codes.shape[2],
        first=past.first,
        stop=past.stop,
        split=SPLIT,
        total=total,
        lead=past.before.shape[2],
        by_channel=n.by_channel,
        group=n.group,
        flag=n.flag_bits,
        flag_row=0 if n.flags is None else n.flags.shape[-1],
        rows=0 if n.shared else n.scales.shape[1],
        pitch=n.scales[0, 0].numel(),
        per_head=n.per_head,
        slots=0 if n.slots is None else n.slots[0].shape[-1],
        rope=0 if past.turn is None else past.turn.cos.shape[-1],
        neighbours=past.turn is not None and past.turn.neighbours,
    )
    return a, s


def _flat(numbers: Tensor) -> Any:
    """Numbers in a row, float32, or the bits of float16 as uint16."""
    found = numbers.reshape(-1).numpy()
    return found.view(np.uint16) if found.dtype == np.float16 else found


def _span(bits: int, dim: int) -> int:
    """Codes that are looked up together."""
    wide = _loops.WIDE
    return wide if wide and dim % wide == 0 and 2 <= bits <= 4 else span_of(bits, dim)


def _table(n: Numbers, span: int) -> Any:
    """What codes are looked up in, float32."""
    if span != _loops.WIDE:
        return table_of(n.values, n.bits, span).numpy()
    return np.resize(n.values.numpy(), span)


def _unit(n: Numbers, past: Past, dim: int) -> int:
    """Codes of a byte if rows can come in planes, else 0."""
    unit = 8 // n.bits
    width = dim if n.by_channel else n.group
    plain = n.flip >= 0 and n.bits in (2, 4) and n.slots is None and past.turn is None
    return unit if plain and dim % (4 * unit) == 0 and width % (4 * unit) == 0 else 0


@cache
def _order(dim: int, unit: int) -> Any:
    """Channel at each place of a row, int64 [dim]."""
    return np.arange(dim).reshape(-1, max(unit, 1)).T.reshape(-1).copy()


@cache
def _place(dim: int, unit: int) -> Any:
    """Place of each channel in a row, int64 [dim]."""
    return np.argsort(_order(dim, unit))


_EMPTY, _HALVES, _BYTES = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.uint8)


def _many(items: int, s: Any, dim: int) -> bool:
    """Whether parts are dealt out over threads."""
    return many(items * min(s.split, s.stop - s.first) * dim, _SMALL, items)
