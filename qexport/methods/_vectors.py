"""Columns of vectors: coding one, feeding its error back, descending on the true error, refitting the entries.

Everything is held transposed here and in visiting order: [k, m] with m = V v rows of W, the last row repeated to fill
the last vector, and outlier columns in the last places. Steps number columns in that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.methods._columns import BLOCK
from qexport.methods._kmeans import centres, improve, largest, room

Books = tuple[Tensor, ...]
"""Entries float32 [groups, entries, v] of the main codebooks, and of the residual ones if there are any."""


@dataclass(frozen=True)
class Coding:
    """What has been chosen for a matrix so far; its tensors are changed in place.

    Attributes:
        scales: float32 [k].
        offsets: float32 [k].
        codes: int64 [books, k, V].
        values: float32 [k, m], what the matrix decodes to.
        groups: the codebook of each step.
        kept: how many of the last steps are outliers, kept as they are.
        dtype: what stored numbers are rounded to.
        normalize: scales and offsets are stored, so they may change.
    """

    scales: Tensor
    offsets: Tensor
    codes: Tensor
    values: Tensor
    groups: tuple[int, ...]
    kept: int
    dtype: torch.dtype
    normalize: bool

    @property
    def coded(self) -> int:
        """How many steps code a column; the others keep one."""
        return len(self.groups) - self.kept

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest storable numbers."""
        return x.to(self.dtype).float()


def normalisation(w: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Offset and scale of each column: its mean as stored, and the root mean square of what is left.

    Without a dtype to store them in they are 0 and 1.
    """
    if dtype is None:
        return w.new_zeros(w.shape[1]), w.new_ones(w.shape[1])
    offsets = w.mean(0).to(dtype).float()
    largest = (w - offsets).abs().amax().clamp(min=1e-38)
    scales = ((w - offsets) / largest).square().mean(0).sqrt() * largest
    scales = torch.where(scales > 0, scales.clamp(min=torch.finfo(dtype).smallest_normal), 1.0)
    return offsets, scales.to(dtype).float()


Coder = Callable[[int, Tensor], Tensor]
"""(step, what its column should be [m]) -> what it becomes [m]."""


def coder(coding: Coding, books: Books, *, tries: int, again: bool, seen: Tensor | None = None) -> Coder:
    """A function that codes one column with the nearest entries.

    Args:
        coding: where the choice is written to.
        books: entries.
        tries: how many of the nearest main entries are tried with their nearest residual entry.
        again: the column has codes already: its scale and offset are first fitted to the new target with these.
        seen: float32 [k, m], takes the targets.
    """
    v = books[0].shape[2]
    lookups = [
        [_Lookup(b[g], b[g].T.contiguous(), b[g].square().sum(1).div_(-2)) for b in books] for g in _count(books)
    ]
    scores = room(books[0], coding.codes.shape[2], books[0].shape[1])

    def code(step: int, target: Tensor) -> Tensor:
        if seen is not None:
            seen[step] = target
        if step >= coding.coded:
            value = coding.rounded(target)
        else:
            lookup = lookups[coding.groups[step]]
            if again and coding.normalize:
                found = sum(at.entries[c] for at, c in zip(lookup, coding.codes[:, step], strict=False))
                assert isinstance(found, Tensor)
                _fit_line(coding, step, target, found.view(-1))
            scale, offset = coding.scales[step], coding.offsets[step]
            codes, vectors = _choose(((target - offset) / scale).view(-1, v), lookup, tries, scores)
            coding.codes[: len(books), step] = codes
            value = vectors.view(-1) * scale + offset
        coding.values[step] = value
        return value

    return code


@dataclass(frozen=True)
class _Lookup:
    entries: Tensor
    turned: Tensor
    half: Tensor

    @classmethod
    def of(cls, entries: Tensor) -> "_Lookup":
        """Entries [c, v] with what a search needs of them."""
        return cls(entries, entries.T.contiguous(), entries.square().sum(1).div_(-2))


def _count(books: Books) -> range:
    return range(books[0].shape[0])


def _choose(x: Tensor, lookup: Sequence[_Lookup], tries: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [books, V] of the nearest entries to x [V, v], and these [V, v]; `scores` [V, entries] is overwritten."""
    main = lookup[0]
    torch.addmm(main.half, x, main.turned, out=scores)
    if len(lookup) == 1:
        at = largest(scores)
        return at.unsqueeze(0), main.entries[at]
    second = lookup[1]
    near = scores.topk(min(tries, scores.shape[1]), 1).indices
    rest = x.unsqueeze(1) - main.entries[near]
    best = torch.addmm(second.half, rest.flatten(0, 1), second.turned).max(1)
    error = rest.square().sum(2) - 2 * best.values.view(near.shape)
    pick = error.argmin(1, keepdim=True)
    first, then = near.gather(1, pick).squeeze(1), best.indices.view(near.shape).gather(1, pick).squeeze(1)
    return torch.stack([first, then]), main.entries[first] + second.entries[then]


def _fit_line(coding: Coding, step: int, target: Tensor, found: Tensor) -> None:
    """Scale and offset of a column by least squares; the scale at most halves or doubles, so that it stays sane."""
    mean, middle = target.mean(), found.mean()
    centred = found - middle
    old = coding.scales[step]
    slope = (centred @ (target - mean)) / (centred @ centred).clamp(min=1e-30)
    slope = coding.rounded(slope.clamp(min=torch.finfo(coding.dtype).smallest_normal).clamp(old / 2, old * 2))
    coding.scales[step] = slope
    coding.offsets[step] = coding.rounded(mean - slope * middle)


def descend(w: Tensor, hessian: Tensor, coding: Coding, code: Coder) -> None:
    """Code each column anew with all others as they are: no step raises tr(D H D^T).

    The best value of column j is q_j + (H D)_j / H_jj, and since H_jj is the same for all of the column's vectors, the
    nearest entry to it is the best one.

    Args:
        w: float32 [k, m].
        hessian: float32 [k, k] in visiting order, damped.
        coding: where it starts, and what `code` writes to.
        code: made by `coder`.

    Cost: O(m k^2) time; k m floats beside the inputs.
    """
    pull = hessian @ (w - coding.values)
    diagonal = hessian.diagonal()
    for start in range(0, w.shape[0], BLOCK):
        stop = min(start + BLOCK, w.shape[0])
        moves = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            old = coding.values[j].clone()
            new = code(j, torch.addcdiv(old, pull[j], diagonal[j]))
            move = torch.sub(new, old, out=moves[j - start])
            pull[j + 1 : stop].addr_(hessian[j, j + 1 : stop], move, alpha=-1)
        pull[stop:].addmm_(hessian[start:stop, stop:].T, moves, alpha=-1)


def _flat(coding: Coding, books: Books) -> Tensor:
    """Rows of all entries below each other: int64 [books, coded, V]."""
    groups = torch.tensor(coding.groups[: coding.coded], device=coding.codes.device).unsqueeze(1)
    out, base = [], 0
    for b, codes in zip(books, coding.codes, strict=True):
        out.append(codes[: coding.coded] + groups * b.shape[1] + base)
        base += b.shape[0] * b.shape[1]
    return torch.stack(out)


def decoded(coding: Coding, books: Books) -> Tensor:
    """What the codes stand for, float32 [coded, m]."""
    vectors = torch.cat([b.flatten(0, 1) for b in books])[_flat(coding, books)].sum(0)
    scales, offsets = (t[: coding.coded].unsqueeze(1) for t in (coding.scales, coding.offsets))
    return vectors.flatten(1) * scales + offsets


def refit(w: Tensor, hessian: Tensor, coding: Coding, books: Books, *, rows: int, steps: int) -> Books:
    """Entries that lower tr(D H D^T) with all codes fixed: conjugate gradients, preconditioned by the diagonal.

    Args:
        w: float32 [k, m].
        hessian: float32 [k, k] in visiting order, damped.
        coding: codes, scales and offsets; its values are renewed.
        books: entries so far.
        rows: of the matrix; those from here on are repetitions and don't count.
        steps: of conjugate gradients.

    Cost: O(m k^2) time for each step; 4 k m floats beside the inputs.
    """
    at, count, v = _flat(coding, books), coding.coded, books[0].shape[2]
    entries = torch.cat([b.flatten(0, 1) for b in books])
    scales = coding.scales[:count].unsqueeze(1)

    def spread(x: Tensor) -> Tensor:
        return x[at].sum(0).flatten(1) * scales

    def gather(matrix: Tensor) -> Tensor:
        matrix[:, rows:] = 0
        vectors = matrix.mul_(scales).view(-1, v)
        out = torch.zeros_like(entries)
        for one in at:
            out.index_add_(0, one.flatten(), vectors)
        return out

    part = hessian[:count, :count]
    mass = (part.diagonal() * coding.scales[:count].square()).unsqueeze(1).expand(at.shape[1:]).flatten()
    inverse = entries.new_zeros(entries.shape[0])
    for one in at:
        inverse.index_add_(0, one.flatten(), mass)
    inverse = inverse.clamp(min=1e-30).reciprocal().unsqueeze(1)
    rest = gather(hessian[:count] @ (w - coding.values))
    ahead = rest * inverse
    direction, slope = ahead, (rest * ahead).sum()
    for _ in range(steps):
        turned = gather(part @ spread(direction))
        length = slope / (direction * turned).sum().clamp(min=1e-30)
        entries = entries + length * direction
        rest = rest - length * turned
        ahead = rest * inverse
        before, slope = slope, (rest * ahead).sum()
        direction = ahead + slope / before.clamp(min=1e-30) * direction
    parts = coding.rounded(entries).split([b.shape[0] * b.shape[1] for b in books])
    renewed = tuple(p.view(b.shape) for p, b in zip(parts, books, strict=True))
    coding.values[:count] = decoded(coding, renewed)
    return renewed


def recentre(seen: Tensor, cost: Tensor, coding: Coding, books: Books, steps: int) -> Books:
    """Entries moved to the means of the vectors that the loop gave them, as these were when they were coded.

    Args:
        seen: float32 [k, m], what each column was when it was coded.
        cost: float32 [k, V], what a squared error in a vector costs in the loop, in the codebook's units.
        coding: the loop's choices.
        books: entries so far.
        steps: of Lloyd's that follow, without a residual codebook.
    """
    v = books[0].shape[2]
    x = ((seen - coding.offsets.unsqueeze(1)) / coding.scales.unsqueeze(1)).view(seen.shape[0], -1, v)
    out = [b.clone() for b in books]
    for g in _count(books):
        mine = [j for j in range(coding.coded) if coding.groups[j] == g]
        if not mine:
            continue
        points, weight = x[mine].flatten(0, 1), cost[mine].flatten()
        codes = coding.codes[: len(books), mine].flatten(1)
        for b, own in enumerate(out):
            others = [o[g][c] for i, (o, c) in enumerate(zip(out, codes, strict=True)) if i != b]
            own[g] = centres(points - others[0] if others else points, weight, codes[b], own[g])
        if len(books) == 1:
            out[0][g] = improve(points, weight, out[0][g], steps)
    return tuple(coding.rounded(o) for o in out)
