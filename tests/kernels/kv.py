"""Random packed keys and values for kernels, and what their attention is held against: the coder's own `decode`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qexport import plugins
from qexport.kernels.kv.read import Past, Turn

TOLERANCE = 1e-5  # largest error over largest value, float32


@dataclass(frozen=True)
class Case:
    """One attention to try.

    Attributes:
        tokens: packed ones of keys and of values; what there is more of one stays in full precision in the other.
        skip: packed tokens that are not seen, of keys and of values.
        turned: rotated channels of keys that are still to be rotated; 0: none.
        room: groups more than are in use.
    """

    format: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    heads: int = 2
    queries: int = 3
    dim: int = 64
    tokens: tuple[int, int] = (64, 64)
    sinks: int = 0
    recent: int = 5
    skip: int = 0
    turned: int = 0
    neighbours: bool = False
    room: int = 0
    dtype: str = "float32"

    def __str__(self) -> str:
        options = "-".join(f"{key}{value}" for key, value in self.options.items())
        size = f"b{self.batch}h{self.heads}x{self.queries}d{self.dim}t{self.tokens[0]}+{self.sinks}+{self.recent}"
        return f"{self.format}-{options}-{size}-skip{self.skip}-turn{self.turned}{self.neighbours}-{self.dtype}"


def static_of(fmt: Any, heads: int, dim: int, rng: torch.Generator) -> dict[str, Tensor]:
    """What calibration might find."""
    out = {}
    for name, f in fmt.static(heads, dim).items():
        spread = torch.rand(f.shape, generator=rng)
        if name.endswith("lut"):
            made = (spread * 2 - 1).sort().values
        elif name.endswith("qnorm"):
            made = torch.tensor([1.1, 0.05])
        else:
            made = (spread + 2) * (1 if name.endswith("upper") else -1)
        out[name] = made.to(f.dtype)
    return out


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """Rows [b, t, h, d] rotated by the positions of their tokens."""
    half = turn.cos.shape[1]
    one, two = slice(0, half), slice(half, 2 * half)
    if turn.neighbours:
        one, two = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    cos, sin, out = turn.cos.double().unsqueeze(1), turn.sin.double().unsqueeze(1), x.clone()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def build(case: Case) -> tuple[Tensor, tuple[Past, Past], Tensor]:
    """Queries [b, heads, dim], keys and values, and the attention that is expected, float64 [b, heads, dim]."""
    rng = torch.Generator().manual_seed(0)
    fmt = plugins.get("formats.kv", case.format)(**case.options)
    static = static_of(fmt, case.heads, case.dim, rng)
    dtype = getattr(torch, case.dtype)
    normal = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    pasts, whole = [], []
    total = case.sinks + max(case.tokens) + case.recent
    for coder, tokens, keys in ((fmt.keys, case.tokens[0], True), (fmt.values, case.tokens[1], False)):
        x = normal(case.batch, tokens // coder.group, coder.group, case.heads, case.dim)
        x[..., :: max(case.dim // 3, 1)] *= 3
        packed = coder.encode(x, static)
        decoded = coder.decode(packed, static, case.heads, case.dim).flatten(1, 2).double()
        turn = None
        if case.turned and keys:
            angles = torch.rand(tokens, case.turned // 2, generator=rng) * 6
            turn = Turn(angles.cos() * 1.2, angles.sin() * 1.2, case.neighbours)
            decoded = _turned(decoded, turn)
        before = normal(case.batch, case.heads, 0 if case.skip else case.sinks, case.dim).to(dtype)
        after = normal(case.batch, case.heads, total - case.sinks - tokens, case.dim).to(dtype)
        wide = {name: torch.cat([t, t[:, :1].expand(-1, case.room, *t.shape[2:])], 1) for name, t in packed.items()}
        pasts.append(Past(case.format, coder, static, wide, case.skip, tokens, before, after, turn))
        rows = decoded.transpose(1, 2)[:, :, case.skip :]
        whole.append(torch.cat([before.double(), rows, after.double()], 2))
    q = normal(case.batch, case.heads * case.queries, case.dim).to(dtype)
    scores = q.double().unflatten(1, (case.heads, -1)) @ whole[0].transpose(2, 3) * 0.3
    return q, (pasts[0], pasts[1]), (torch.softmax(scores, -1) @ whole[1]).flatten(1, 2)


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest error over largest value; infinite if anything is not finite."""
    error = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
    return error if torch.isfinite(found).all() else float("inf")


def existing(cases: list[Case]) -> list[Case]:
    """Those whose format there is."""
    return [case for case in cases if case.format in plugins.names("formats.kv")]
