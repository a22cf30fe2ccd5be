"""Random packed keys and values for kernels, and what their attention is held against: the coder's own `decode`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qexport import plugins
from qexport.kernels.kv.base import Past, Turn

TOLERANCE = 1e-5  # largest error over largest value, float32


@dataclass(frozen=True)
class Case:
    """One attention to try.

    Attributes:
        tokens: packed ones of keys and of values; what there is more of one stays in full precision in the other.
        skip: packed tokens that are not seen, of keys and of values.
        turned: rotated channels of keys that are still to be rotated; 0: none.
        room: groups more than are in use.
        broken: what is left out on purpose, for a gate to catch.
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
    broken: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kv": asdict(self)}

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
            made = (spread + 2) * (-1 if name.endswith("lower") else 1)
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


def answer(request: dict[str, Any], device: str) -> dict[str, Any]:
    """Run the Triton kernel on a case in this process, for `worker`."""
    from qexport.kernels.kv import _decode as decode
    from tests.kernels import worker

    case = Case(**{**request, "tokens": tuple(request["tokens"])})
    q, pasts, expected = build(case)
    q, pasts = q.to(device), tuple(_moved(past, device) for past in pasts)
    made: list[Tensor] = []
    new_empty = Tensor.new_empty

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        made.append(worker._poison(new_empty)(*args, **kwargs))
        return made[-1]

    Tensor.new_empty = keep  # type: ignore[method-assign]
    try:
        launches, y = decode.launches(q, *pasts, scaling=0.3)
    finally:
        Tensor.new_empty = new_empty  # type: ignore[method-assign]
    out: dict[str, Any] = {"stored_bits": stored_bits(pasts), "tolerance": _ROUNDING[case.dtype]}
    if device == "cpu":
        stored = [t for past in pasts for t in past.packed.values()]
        # What a token has once is read by the programs of all heads; what holds for all tokens by all programs.
        once = [i for i, t in enumerate(stored) if t.ndim == 3 or t.shape[-1] < case.heads or t.dtype == torch.int16]
        watch = worker.Watch(stored, [*_tensors(launches), *made], once)
        for watch.launch, launch in enumerate(launches[: -1 if case.broken == "no join" else None]):
            worker._watched(launch.run, watch)
        numbers = sum(past.stop - past.first for past in pasts) * case.batch * case.heads * case.dim
        out |= {"outside": watch.outside, "read_bits": 8 * watch.weight_bytes() / max(numbers, 1)}
    else:
        for launch in launches:
            launch.run()
    again = decode.attend(q, *pasts, scaling=0.3)
    error = error_of(y, expected)
    return out | {
        "error": error if error != float("inf") else None,
        "nan": int((~torch.isfinite(y)).sum()),
        "same": bool(torch.equal(again, y)),
    }


_ROUNDING = {"float32": TOLERANCE, "float16": 2e-3, "bfloat16": 1.6e-2}  # products are in the queries' type


def stored_bits(pasts: tuple[Past, ...]) -> float:
    """Bits of a number, of what is seen of both sides."""
    total = sum(8 * t[:, :1].nbytes / past.coder.group / t.shape[0] for past in pasts for t in past.packed.values())
    return total / (2 * pasts[0].before.shape[1] * pasts[0].before.shape[3])


def _tensors(launches: list[Any]) -> list[Tensor]:
    """What launches are given, each tensor once."""
    given = [t for launch in launches for arg in launch.args for t in (arg if isinstance(arg, tuple) else (arg,))]
    return list({id(t): t for t in given if isinstance(t, Tensor)}.values())


def _moved(past: Past, device: str) -> Past:
    """The same on a device."""
    moved = {name: t.to(device) for name, t in past.packed.items()}
    static = {name: t.to(device) for name, t in past.static.items()}
    turn = past.turn and replace(past.turn, cos=past.turn.cos.to(device), sin=past.turn.sin.to(device))
    dense = {"before": past.before.to(device), "after": past.after.to(device)}
    return replace(past, packed=moved, static=static, turn=turn, **dense)


@dataclass(frozen=True)
class Shape:
    """A decode step to compile."""

    format: str
    options: tuple[tuple[str, Any], ...] = ()
    dim: int = 128
    tokens: int = 32768
    heads: int = 8
    queries: int = 4
    dtype: str = "float16"  # of queries
    kind: str = "kv"

    def __str__(self) -> str:
        options = "-".join(f"{key}{value}" for key, value in self.options)
        dtype = "" if self.dtype == "float16" else f"-{self.dtype}"
        return f"kv-{self.format}-{options}-h{self.heads}x{self.queries}-d{self.dim}-t{self.tokens}{dtype}"


def launches_of(shape: Shape) -> tuple[list[Any], tuple[Past, Past]]:
    """Launches of a step on meta tensors, and the sides."""
    from qexport.kernels.kv import _decode as decode

    fmt = plugins.get("formats.kv", shape.format)(**dict(shape.options))
    empty = lambda *size, dtype=torch.float16: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
    static = {name: empty(*f.shape, dtype=f.dtype) for name, f in fmt.static(shape.heads, shape.dim).items()}
    pasts = []
    for coder in (fmt.keys, fmt.values):
        layout = coder.layout(shape.heads, shape.dim)
        packed = {name: empty(1, shape.tokens // coder.group, *f.shape, dtype=f.dtype) for name, f in layout.items()}
        angles = empty(shape.tokens, shape.dim // 2, dtype=torch.float32)
        turn = Turn(angles, angles, False) if fmt.pre_rope and not pasts else None
        counts, dtype = (fmt.sink_tokens, fmt.residual_window), getattr(torch, shape.dtype)
        before, after = (empty(1, shape.heads, count, shape.dim, dtype=dtype) for count in counts)
        pasts.append(Past(shape.format, coder, static, packed, 0, shape.tokens, before, after, turn))
    q = empty(1, shape.heads * shape.queries, shape.dim, dtype=getattr(torch, shape.dtype))
    assert decode.supports(shape.format, shape.dim) is None
    return decode.launches(q, *pasts, scaling=0.1)[0], (pasts[0], pasts[1])


def traffic(shape: Shape) -> dict[str, float]:
    """Bits per stored number that one step moves: what is stored, read once, and all else that the launches touch."""
    launches, pasts = launches_of(shape)
    numbers = 2 * shape.tokens * shape.heads * shape.dim
    tensors = _tensors(launches[:-1])
    size = lambda given: sum(t.nbytes for t in given) * 8 / numbers  # noqa: E731
    own = {id(t) for past in pasts for t in past.packed.values()}
    turns = size([] if pasts[0].turn is None else [pasts[0].turn.cos, pasts[0].turn.sin])
    weights = size([t for t in tensors if id(t) in own])
    other = size([t for t in tensors if id(t) not in own]) + size(_tensors(launches[-1:]))
    return {
        "stored": round(stored_bits(pasts), 4),
        "weights": round(weights, 4),
        "other": round(other - turns, 4),
        "rotations": round(turns, 4),
    }
