"""Milliseconds a token, one sequence: packed models by both loops, the dense model in its dtypes, and llama.cpp.

    python -m benchmarks.decode PACKED... [--dense FOLDER] [--gguf FILE] [--tokens 48] [--past 32] [--prefill 512]
                                [--threads 2] [--compile-dense] [--json]

Protocol: a prompt of `--past` tokens is read, then `--tokens` single tokens are written greedily; each way writes one
token in turn, so that all meet what else the machine does, and the medians of single tokens count, the first four left
out. `eager` is `model(ids, past_key_values=DynamicCache)`, one call a token, without what `generate` adds; `compiled`
is `qexport.runtime.loop`. `ratio` is the time of eager dense float16 over that of the line: above 1 it is faster.
`outside` is the part of a token's time that block linears don't take, as hooks around them see it in eager mode;
`MiB` is of parameters and buffers; kernels hold their own layout of packed weights beside, about as much again. `prefill` is one call with so many tokens and
an empty cache, `prefill ratio` dense float32's time over it. Before times count, both loops of a model have to
write the same tokens; otherwise nothing is reported, with exit code 1. llama.cpp runs where `llama_cpp` can be imported and a file is
given; its evaluation of single tokens comes last, for its threads wait in a loop. Lines go to `results/decode.jsonl`.
"""  # noqa: E501

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qexport
from benchmarks.record import record
from qexport.models.linears import is_linear
from qexport.runtime.linear import QuantLinear
from qexport.runtime.loop import Loop

WARM = 4  # tokens before times count


class Way:
    """One way to write tokens: a name, and times of single tokens in milliseconds."""

    def __init__(self, name: str, loop: Any, past: int, prefill: int, **facts: Any) -> None:
        self.name, self.loop, self.facts, self.times, self.found = name, loop, facts, [], []
        self.prompt = torch.arange(100, 100 + past).unsqueeze(0)
        if prefill:
            whole = torch.arange(100, 100 + prefill).unsqueeze(0)
            self.facts["prefill_ms"] = min(self.timed(lambda: self.loop.prefill(whole)) for _ in range(2))

    def timed(self, call: Any) -> float:
        """Milliseconds of a call with an empty cache."""
        self.loop.reset()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def begin(self) -> None:
        """Read the prompt."""
        self.loop.reset()
        self.found = [self.loop.prefill(self.prompt).argmax(-1, keepdim=True)]
        self.times = []

    def token(self) -> None:
        """Write one token."""
        start = time.perf_counter()
        following = self.loop.step(self.found[-1]).argmax(-1, keepdim=True)
        self.found.append(following)
        int(following)
        self.times.append((time.perf_counter() - start) * 1e3)

    @property
    def written(self) -> list[int]:
        """Tokens so far."""
        return torch.cat(self.found, 1)[0].tolist()


class Llama:
    """llama.cpp as a loop; its logits stay with it, only the likeliest token comes out."""

    def __init__(self, file: Path, length: int, threads: int) -> None:
        from llama_cpp import Llama as Model

        sizes = {"n_ctx": length, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}
        self.model, self.path = Model(str(file), **sizes, logits_all=False, verbose=False), "llama.cpp"

    def reset(self) -> None:
        """Forget all tokens."""
        self.model.reset()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Read ids; the logits of the last one, where llama.cpp has them: good until it reads more."""
        import llama_cpp

        self.model.eval(ids[0].tolist())
        found = llama_cpp.llama_get_logits(self.model.ctx)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self.model.n_vocab(),))).unsqueeze(0)

    step = prefill

    def close(self) -> None:
        """Free the model, which can't be done when Python ends."""
        self.model.close()


def outside(model: nn.Module, way: Way) -> float:
    """Part of an eager token's time that is not spent in linears of blocks."""
    spent, starts, handles = [0.0], [0.0], []
    for name, module in model.named_modules():
        if (is_linear(module) or isinstance(module, QuantLinear)) and "layers." in name:
            handles.append(module.register_forward_pre_hook(lambda *_: starts.__setitem__(0, time.perf_counter())))
            handles.append(
                module.register_forward_hook(
                    lambda *_: spent.__setitem__(0, spent[0] + (time.perf_counter() - starts[0]) * 1e3)
                )
            )
    way.begin()
    spent[0] = 0.0
    for _ in range(WARM + 8):
        way.token()
    for handle in handles:
        handle.remove()
    return 1 - spent[0] / sum(way.times)


def ways_of(name: str, model: nn.Module, options: argparse.Namespace, *, compiled: bool, **facts: Any) -> list[Way]:
    """The eager way and, if asked for, the compiled one."""
    nbytes = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    most = max(options.past + WARM + options.tokens + 1, options.past + WARM + 9)
    made = [Loop.of(model, max(most, options.prefill), compiled=False)]
    made += [Loop.of(model, most)] if compiled else []
    out = []
    for loop, kind in zip(made, ("eager", "compiled"), strict=False):
        prefill = options.prefill if kind == "eager" else 0
        way = Way(name, loop, options.past, prefill, path=loop.path, bytes=nbytes, **facts)
        out.append(way)
    out[0].facts["outside"] = outside(model, out[0])
    return out


def gather(options: argparse.Namespace) -> list[Way]:
    """All ways, with their models in memory."""
    ways = []
    for dtype in ("float32", "bfloat16", "float16") if options.dense else ():
        model = qexport.load(options.dense, dtype=getattr(torch, dtype))
        ways += ways_of(f"dense {dtype}", model, options, compiled=options.compile_dense, dtype=dtype)
    for folder in options.packed:
        model = qexport.load(folder, dtype=torch.float32)
        ways += ways_of(Path(folder).name, model, options, compiled=True, dtype="float32")
    return ways


def report(ways: list[Way], options: argparse.Namespace) -> None:
    """Lines of all ways."""
    half = next((w for w in ways if w.name == "dense float16" and w.loop.path.startswith("eager")), None)
    full = next((w for w in ways if w.name == "dense float32" and "prefill_ms" in w.facts), None)
    if not options.json:
        sys.stdout.write("                   ms    least tokens/s  ratio outside    MiB prefill  ratio  path\n")
    for way in ways:
        times = way.times[WARM:]
        facts = {"name": way.name, "ms": statistics.median(times), "least_ms": min(times), "tokens": len(times)}
        facts |= {"past": options.past, "prefill_tokens": options.prefill, **way.facts}
        facts["tokens_per_second"] = 1e3 / facts["ms"]
        if half is not None:
            facts["ratio"] = statistics.median(half.times[WARM:]) / facts["ms"]
        if full is not None and "prefill_ms" in facts:
            facts["prefill_ratio"] = full.facts["prefill_ms"] / facts["prefill_ms"]
        line = record("decode", **facts)
        cells = (line.get(key) for key in ("ratio", "outside", "bytes", "prefill_ms", "prefill_ratio"))
        text = "".join(
            f"{'-' if cell is None else f'{cell / scale:.{digits}f}':>8s}"
            for cell, scale, digits in zip(cells, (1, 1, 2**20, 1, 1), (2, 2, 0, 0, 2), strict=True)
        )
        row = f"{way.name:16s} {line['ms']:7.2f} {line['least_ms']:7.2f} {line['tokens_per_second']:7.1f} {text}  "
        sys.stdout.write((json.dumps(line) if options.json else row + str(line["path"])) + "\n")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", nargs="*", help="folders of packed checkpoints")
    parser.add_argument("--dense", help="folder of the dense model")
    parser.add_argument("--gguf", type=Path, help="file for llama.cpp, for example of `qexport export --to gguf`")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--past", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile-dense", action="store_true", help="the compiled loop of dense models too")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line."""
    options = options_of()
    torch.set_num_threads(options.threads)
    ways = gather(options)
    for way in ways:
        way.begin()
    for _ in range(WARM + options.tokens):
        for way in ways:
            way.token()
    for one, two in itertools.pairwise(ways):
        if one.name == two.name and one.written != two.written:
            sys.stderr.write(f"FAILED {one.name}: the compiled loop writes other tokens, nothing is reported\n")
            sys.exit(1)
    if options.gguf is not None:
        try:
            ways.append(Way("llama.cpp", Llama(options.gguf, 1024, options.threads), options.past, options.prefill))
            ways[-1].facts |= {"path": f"llama.cpp {options.gguf.name}", "bytes": options.gguf.stat().st_size}
            ways[-1].begin()
            for _ in range(WARM + options.tokens):
                ways[-1].token()
            ways[-1].loop.close()
        except ImportError:
            sys.stderr.write("llama.cpp: llama_cpp is not installed\n")
    report(ways, options)


if __name__ == "__main__":
    main()
