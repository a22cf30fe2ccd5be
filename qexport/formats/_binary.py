"""Sums of signed numbers: fitting w ~ offset + sum over i of alpha_i b_i, with every b_i -1 or +1.

A code holds the signs: bit i is 1 where b_i is +1. The 2^bits values that a row can take are its *levels*, in the
order of the codes. For given codes the best alpha and offset are a least-squares problem of bits + 1 unknowns, and all
that it needs to know of the weights is how much mass, and how much moment, fell on each code: the normal equations are
made of Walsh functions of these two histograms, so two fast Walsh-Hadamard transforms give them.

Every function works on rows independently of each other, so that a matrix may be fitted in parts.
"""

import torch
from torch import Tensor

_RIDGE = 1e-5  # of the total weight; keeps planes that coincide from blowing up


def levels_of(alpha: Tensor, offset: Tensor | None) -> Tensor:
    """The value of every code: alpha float32 [..., bits], offset float32 [...] or None -> float32 [..., 2^bits].

    Planes are added in their order, which is what the format's decoding does too.
    """
    bits = alpha.shape[-1]
    codes = torch.arange(1 << bits, device=alpha.device)
    start = torch.zeros_like(alpha[..., 0]) if offset is None else offset
    out = start.unsqueeze(-1).expand(*alpha.shape[:-1], 1 << bits)
    for i in range(bits):
        out = out + alpha[..., i : i + 1] * ((codes >> i & 1) * 2 - 1).to(alpha.dtype)
    return out


def sorted_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Where one code gives way to the next, float32 [n, L - 1], and the code of each interval, uint8 [n, L].

    Of codes with equal values only the one that comes first is ever given.
    """
    ordered, codes = torch.sort(levels, dim=-1, stable=True)
    first = torch.searchsorted(ordered, ordered).clamp_(max=ordered.shape[-1] - 1)  # NaN sorts behind all
    bounds = ordered[:, :-1] + (ordered[:, 1:] - ordered[:, :-1]) / 2
    return bounds.contiguous(), codes.gather(-1, first).to(torch.uint8)


def nearest_code(w: Tensor, bounds: Tensor, codes: Tensor) -> Tensor:
    """Codes of the nearest levels, uint8 [n, c], for w [n, c] and what `sorted_levels` returned."""
    return codes.gather(1, torch.searchsorted(bounds, w.contiguous()))


def walsh(histogram: Tensor) -> Tensor:
    """Walsh-Hadamard transform along the last axis: entry m is the sum over c of histogram[c] (-1)^popcount(c & m).

    A plane is -1 where its bit is 0, so that products of an odd number of planes come out with the other sign.
    """
    bits = histogram.shape[-1].bit_length() - 1
    out = histogram
    for i in range(bits):
        pairs = out.unflatten(-1, (-1, 2, 1 << i))
        low, high = pairs.select(-2, 0), pairs.select(-2, 1)
        out = torch.stack((low + high, low - high), -2).flatten(-3)
    return out


def solve(codes: Tensor, masses: Tensor, moments: Tensor, bits: int, offset: bool) -> tuple[Tensor, Tensor | None]:
    """Least-squares alpha [n, bits] and offset [n] (None without one) for given codes.

    Args:
        codes: int64 [n, g].
        masses: float32 [n, g], weights of the squared errors.
        moments: float32 [n, g], what is to be fitted times its weight.
        bits: planes.
        offset: whether a constant is fitted too.
    """
    n = masses.shape[0]
    mass, moment = masses.new_zeros(n, 1 << bits), masses.new_zeros(n, 1 << bits)
    mass.scatter_add_(1, codes, masses)
    moment.scatter_add_(1, codes, moments)
    mass, moment = walsh(mass), walsh(moment)
    masks = [1 << i for i in range(bits)] + [0] * offset
    signs = [-1.0] * bits + [1.0] * offset
    matrix = [
        [s * t * mass[:, a ^ b] for b, t in zip(masks, signs, strict=True)] for a, s in zip(masks, signs, strict=True)
    ]
    right = [s * moment[:, a] for a, s in zip(masks, signs, strict=True)]
    for i in range(len(masks)):
        matrix[i][i] = matrix[i][i] + _RIDGE * mass[:, 0]
    found = _eliminate(matrix, right)
    alpha = torch.stack(found[:bits], -1).abs().sort(-1, descending=True).values
    return alpha, found[bits] if offset else None


def _eliminate(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Solve small positive definite systems, one in each row of the entries; no pivoting is needed."""
    size = len(right)
    for i in range(size):
        pivot = matrix[i][i].reciprocal()
        for j in range(i + 1, size):
            factor = matrix[j][i] * pivot
            for m in range(i + 1, size):
                matrix[j][m] = matrix[j][m] - factor * matrix[i][m]
            right[j] = right[j] - factor * right[i]
    for i in reversed(range(size)):
        for m in range(i + 1, size):
            right[i] = right[i] - matrix[i][m] * right[m]
        right[i] = right[i] / matrix[i][i]
    return right


def normalised(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows w [n, g] divided by a power of two near their largest value, and these powers, float32 [n, 1].

    Squares of the quotients can't leave float32's range, and nothing is rounded.
    """
    exponent = torch.frexp(w.abs().amax(1, keepdim=True)).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(w[:, :1]), exponent)
    return w / unit, unit


def better(
    w: Tensor, weight: Tensor | None, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Of two fits, for each row the one with the lower error."""
    wins = error_of(w, weight, *other) < error_of(w, weight, *one)
    alpha = torch.where(wins.unsqueeze(1), other[0], one[0])
    if one[1] is None or other[1] is None:
        return alpha, None
    return alpha, torch.where(wins, other[1], one[1])


def greedy(w: Tensor, weight: Tensor | None, bits: int, offset: bool) -> tuple[Tensor, Tensor | None]:
    """Start: the weighted mean, then plane by plane the sign and the mean magnitude of what is left."""
    masses = torch.ones_like(w[:1]) if weight is None else weight[None]
    total = masses.sum(1, keepdim=True)
    centre = (w * masses).sum(1, keepdim=True) / total if offset else torch.zeros_like(w[:, :1])
    rest, alphas = w - centre, []
    for _ in range(bits):
        alpha = (rest.abs() * masses).sum(1, keepdim=True) / total
        rest = rest - torch.where(rest >= 0, alpha, -alpha)
        alphas.append(alpha)
    return torch.cat(alphas, 1), centre.squeeze(1) if offset else None


def spread(w: Tensor, bits: int, offset: bool, part: float) -> tuple[Tensor, Tensor | None]:
    """Start: levels evenly spaced over a part of the range, around its middle."""
    lo, hi = w.amin(1), w.amax(1)
    middle, half = (lo + hi) / 2, part * ((hi - lo) / 2 if offset else torch.maximum(hi, -lo))
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, dtype=w.dtype, device=w.device)
    alpha = half.unsqueeze(1) * powers / max(2**bits - 1, 1)
    return alpha, middle if offset else None


def error_of(w: Tensor, weight: Tensor | None, alpha: Tensor, offset: Tensor | None) -> Tensor:
    """Weighted squared error of each row, [n]."""
    levels = levels_of(alpha, offset)
    codes = nearest_code(w, *sorted_levels(levels)).long()
    e = (w - levels.gather(1, codes)).square()
    return (e if weight is None else e * weight).sum(1)


def alternate(
    w: Tensor, weight: Tensor | None, alpha: Tensor, offset: Tensor | None, rounds: int
) -> tuple[Tensor, Tensor | None]:
    """Codes for the levels, levels for the codes, and so on; each step lowers the weighted squared error."""
    bits, w = alpha.shape[1], w.contiguous()
    masses = torch.ones_like(w) if weight is None else weight.expand_as(w)
    moments = w * masses
    for _ in range(rounds):
        codes = nearest_code(w, *sorted_levels(levels_of(alpha, offset))).long()
        alpha, offset = solve(codes, masses, moments, bits, offset is not None)
    return alpha, offset
