"""Weighted k-means on many short vectors: seeds drawn by squared distance, Lloyd's steps, no empty clusters."""

import math

import torch
from torch import Tensor

from qexport.methods.base import Effort

_CHUNK = 1 << 18  # scores held at a time: they should stay in a processor's cache
_NARROW = 64  # numbers that a processor reduces together without loss
_DRAWS = 16  # rounds in which seeds are drawn; one by one would take as many rounds as there are seeds


def nearest(x: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest of `entries` [c, v] for each vector of x [p, v]: int64 [p].

    The largest x . c - |c|^2 / 2 is the smallest distance, so that one matrix product does nearly all.
    """
    turned, half = entries.T.contiguous(), entries.square().sum(1).div_(-2)
    step = max(_CHUNK // entries.shape[0], 16)
    scores = room(x, min(step, x.shape[0]), entries.shape[0])
    return torch.cat([largest(torch.addmm(half, p, turned, out=scores[: p.shape[0]])) for p in x.split(step)])


def room(like: Tensor, rows: int, width: int) -> Tensor:
    """Memory for scores [rows, width], to be used over and over: fresh memory would cost as much as the product.

    Rows a power of two apart would share few lines of a cache, at twice the time.
    """
    return like.new_empty(rows, width + 16)[:, :width]


def largest(scores: Tensor) -> Tensor:
    """Index of the largest number of each row, int64 [p].

    A maximum without its index is several times as fast. So wide rows are folded, and the index is sought in one
    column of the fold.
    """
    rows, width = scores.shape
    tall = min(width // _NARROW, 32)
    if tall < 2 or width % tall:
        return scores.max(1).indices
    folded = scores.view(rows, tall, -1)
    column = folded.amax(1).max(1).indices
    candidates = folded.gather(2, column.view(-1, 1, 1).expand(-1, tall, 1)).squeeze(2)
    return candidates.max(1).indices * folded.shape[2] + column


def centres(x: Tensor, weight: Tensor, at: Tensor, entries: Tensor) -> Tensor:
    """Weighted mean of the vectors that took each entry; an entry that none took stays as it is.

    Args:
        x: float32 [p, v].
        weight: float32 [p].
        at: int64 [p], the entry of each vector.
        entries: float32 [c, v].
    """
    mass = weight.new_zeros(entries.shape[0]).index_add_(0, at, weight).unsqueeze(1)
    total = torch.zeros_like(entries).index_add_(0, at, x * weight.unsqueeze(1))
    return torch.where(mass > 0, total / mass.clamp(min=1e-30), entries)


def improve(x: Tensor, weight: Tensor, entries: Tensor, steps: int) -> Tensor:
    """`steps` of Lloyd's: each vector takes the nearest entry, each entry the mean of its vectors."""
    for _ in range(steps):
        entries = centres(x, weight, nearest(x, entries), entries)
    return entries


def kmeans(x: Tensor, weight: Tensor, count: int, steps: int, sample: int, rng: torch.Generator) -> Tensor:
    """Entries [count, v] with a low weighted squared distance to x.

    Args:
        x: float32 [p, v].
        weight: float32 [p], not negative.
        count: entries.
        steps: of Lloyd's.
        sample: about so many vectors an entry are looked at, drawn with odds that follow their weight and their part
            of the squares: few rows may hold most of these; 0: all.
        rng: for the sample and the seeds.
    """
    weight = weight / weight.mean().clamp(min=1e-30)
    weight = torch.where(weight.sum() > 0, weight, 1.0)
    if sample and x.shape[0] > sample * count:
        far = weight * x.square().sum(1)
        odds = weight / weight.sum() + far / far.sum().clamp(min=1e-30)
        odds = odds.mul_(sample * count / 2).clamp_(max=1.0)
        drawn = (torch.rand(x.shape[0], generator=rng).to(x.device) < odds).nonzero().squeeze(1)
        x, weight = x[drawn], weight[drawn] / odds[drawn]
    entries = _seeds(x, weight, count, rng)
    for _ in range(steps):
        at = nearest(x, entries)
        entries = centres(x, weight, at, entries)
        empty = (torch.bincount(at, minlength=count) == 0).nonzero().squeeze(1)
        if empty.numel():  # they move to where the error is, which splits the worst clusters
            error = (x - entries[at]).square().sum(1) * weight
            some = _draw(error, empty.numel(), rng)
            entries[empty[: some.numel()]] = x[some]
    return entries


def _seeds(x: Tensor, weight: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Vectors drawn with odds of their weighted squared distance to those drawn before (k-means++), in a few rounds."""
    chosen = x[_draw(weight, 1, rng)]
    error = (x - chosen).square().sum(1)
    while chosen.shape[0] < count:
        wanted = min(-(-count // _DRAWS) if chosen.shape[0] > 1 else 1, count - chosen.shape[0])
        some = x[_draw(error * weight, wanted, rng)]
        chosen = torch.cat([chosen, some, some[:1].expand(max(wanted - some.shape[0], 0), -1)])
        error = torch.minimum(error, (x - some[nearest(x, some)]).square().sum(1))
    return chosen


def _draw(odds: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Distinct indices drawn one after another with the given odds; those without odds only if the others run out.

    The largest odds / Exp(1) are such a draw.
    """
    waits = torch.empty(odds.shape[0]).exponential_(generator=rng).to(odds.device)
    return (odds / waits.clamp(min=1e-30)).topk(min(count, odds.shape[0])).indices


def search_effort(points: float, count: int, calls: int) -> Effort:
    """What it takes to find the nearest of `count` entries for so many vectors, in `calls` parts.

    A product this thin is bound by its result: it takes about as long as one with an inner extent of 60.
    """
    each = 6 if count >= 2 * _NARROW else 2
    return Effort(120 * points * count, points * (1.25 * count + 10), each * calls)


def kmeans_effort(points: float, count: int, steps: int, sample: int) -> Effort:
    """What `kmeans` takes."""
    points = min(points, sample * count) if sample else points
    parts = math.ceil(points * count / _CHUNK)
    few = math.ceil(count / _DRAWS)
    rooms = [min(points, _CHUNK / c) * (c + 16) for c in (count, few)]
    lloyd = search_effort(points, count, parts) + Effort(touched=4 * points + rooms[0], calls=22)
    draw = search_effort(points, few, 2) + Effort(touched=14 * points + rooms[1], calls=14)
    return steps * lloyd + (_DRAWS + 1) * draw
