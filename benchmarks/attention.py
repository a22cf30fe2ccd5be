"""Time of one query's attention over packed keys and values, against full precision's, both in one run.

    python benchmarks/attention.py [--device cuda|cpu] [--caches kivi-4bit,sdr-4bit] [--shapes 32x8x128,9x3x64]
                                   [--tokens 2048,8192,32768] [--dtype float16] [--threads 1] [--json]

A shape is heads of queries x heads of keys x channels. Keys and values are normal, and packed as their format does it;
tokens that a cache would keep in full precision are left out. What runs is the kernel that a cache's attention uses;
the other side is torch's `scaled_dot_product_attention` in `--dtype`. Before times count, the result is held against
attention over the decoded keys and values in float64. Times and rotated copies are those of `benchmarks/linear.py`: on
a GPU a CUDA graph's, and launched from Python. `GB/s` are the packed bytes over the time. Lines go to
`results/attention.jsonl`; a case whose result is wrong is not reported, and the exit code is 1.
"""

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cache_decode import statics_of
from benchmarks.linear import copies_for, error_of, times
from benchmarks.record import record
from qexport import plugins
from qexport.formats.kv.base import PRESETS, make_kv
from qexport.kernels.kv.base import Past, Turn

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}  # largest error over largest value
CHUNK = 4096  # tokens that are packed at once
Shape = tuple[int, int, int]


def packed_side(fmt: Any, side: str, shape: Shape, tokens: int, like: Tensor) -> tuple[Past, Tensor]:
    """One side of a cache, and what it stands for, float32 [1, heads, tokens, dim]."""
    _, heads, dim = shape
    coder = getattr(fmt, side)
    static = {name: t.to(like.device) for name, t in statics_of(fmt, heads, dim).items()}
    rng, parts, plain = torch.Generator().manual_seed(len(side)), [], []
    for start in range(0, tokens, CHUNK):
        size = min(CHUNK, tokens - start)
        x = torch.randn(1, size // coder.group, coder.group, heads, dim, generator=rng).to(like.device)
        parts.append(coder.encode(x, static))
        plain.append(coder.decode(parts[-1], static, heads, dim).flatten(1, 2))
    stored = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    turn = None
    if side == "keys" and fmt.pre_rope:
        angles = torch.arange(tokens, device=like.device).unsqueeze(1) * torch.logspace(0, -4, dim // 2).to(like.device)
        turn = Turn(angles.cos(), angles.sin(), neighbours=False)
    empty = like.new_empty(1, heads, 0, dim)
    past = Past(fmt.name, coder, static, stored, 0, tokens, empty, empty, turn)
    return past, turned(torch.cat(plain, 1).transpose(1, 2), turn)


def turned(x: Tensor, turn: Turn | None) -> Tensor:
    """Rows [1, h, t, d] rotated by the positions of their tokens."""
    if turn is None:
        return x
    one, two = x.chunk(2, -1)
    return torch.cat([one * turn.cos - two * turn.sin, two * turn.cos + one * turn.sin], -1)


def kernels(device: str) -> Any:
    """The module whose `attend` a device uses."""
    if device == "cuda":
        from qexport.kernels.kv import _decode as decode

        return decode
    from qexport.kernels.kv import _cpu as cpu

    return cpu


def measure(name: str, shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Check and time one case; `failed` in place of times where the check fails."""
    fmt, (queries, heads, dim) = make_kv(name), shape
    if device == "cuda" and (why := kernels(device).supports(fmt.name, dim)):  # type: ignore[union-attr]
        return {"failed": why}
    q = torch.randn(1, queries, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    (keys, k), (values, v) = (packed_side(fmt, side, shape, tokens, q) for side in ("keys", "values"))
    scaling, attend = dim**-0.5, kernels(device).attend
    scores = q.double().unflatten(1, (heads, -1)) @ k.double().transpose(2, 3) * scaling
    wanted = (torch.softmax(scores, -1) @ v.double()).flatten(1, 2)
    error = error_of(attend(q, keys, values, scaling=scaling), wanted)
    nbytes = sum(t.nbytes for past in (keys, values) for t in past.packed.values())
    facts = {
        "cache": name, "shape": list(shape), "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
        "device": device, "error": error, "bytes": nbytes,
    }  # fmt: skip
    if not error <= TOLERANCE[facts["dtype"]]:
        return facts | {"failed": f"error {error:.1e}"}
    pairs = [(keys, values), *(copied(keys, values) for _ in range(copies_for(nbytes, device) - 1))]
    dense = [(k.to(dtype), v.to(dtype)) for _ in range(copies_for(2 * k.numel() * dtype.itemsize, device))]
    ours = [lambda x, a=a, b=b: attend(x, a, b, scaling=scaling) for a, b in pairs]  # type: ignore[misc]
    theirs = [
        lambda x, a=a, b=b: F.scaled_dot_product_attention(x.unsqueeze(2), a, b, scale=scaling, enable_gqa=True)  # type: ignore[misc]
        for a, b in dense
    ]
    one, two = times(ours, theirs, q)  # type: ignore[arg-type]
    facts |= {f"packed_{key}": us for key, us in one.items()} | {f"dense_{key}": us for key, us in two.items()}
    return facts | {"ratio": two["us"] / one["us"], "gbps": nbytes / one["us"] / 1e3}


def copied(*pasts: Past) -> list[Past]:
    """The same elsewhere in memory."""
    return [
        Past(
            p.format, p.coder, p.static, {n: t.clone() for n, t in p.packed.items()}, p.first, p.stop, p.before,
            p.after, p.turn,
        )
        for p in pasts
    ]  # fmt: skip


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    shape = "x".join(map(str, line["shape"]))
    text = f"{line['cache']:14s} {shape:>10s} {line['tokens']:6d} {line['packed_us']:10.1f} {line['dense_us']:9.1f} "
    text += f"{line['ratio']:6.2f} {line['gbps']:7.1f}"
    return (
        text
        if "packed_eager_us" not in line
        else f"{text} {line['packed_eager_us']:9.1f} {line['dense_eager_us']:9.1f}"
    )


def options_of() -> argparse.Namespace:
    """Command line."""
    cuda = torch.cuda.is_available()
    known = [name for name, (fmt, _) in PRESETS.items() if fmt in plugins.names("formats.kv")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--caches", default=",".join(known), help="commas between")
    parser.add_argument("--shapes", default="32x8x128,9x3x64")
    parser.add_argument("--tokens", default="2048,8192,32768")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options, failed = options_of(), 0
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("float16" if options.device == "cuda" else "float32"))
    gpu = {"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}
    if not options.json:
        eager = "    eager     dense" if gpu else ""
        sys.stdout.write(f"cache               shape tokens  packed us  dense us  ratio    GB/s{eager}\n")
    for shape in options.shapes.split(","):
        heads = tuple(map(int, shape.split("x")))
        for tokens in map(int, options.tokens.split(",")):
            for name in options.caches.split(","):
                with torch.inference_mode():
                    facts = measure(name, heads, tokens, options.device, dtype)  # type: ignore[arg-type]
                if "failed" in facts:
                    failed += "error" in facts
                    sys.stderr.write(f"{name} {shape} {tokens}: {facts['failed']}\n")
                    continue
                line = record("attention", **gpu, **facts)
                sys.stdout.write((json.dumps(line) if options.json else row(line)) + "\n")
                sys.stdout.flush()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
