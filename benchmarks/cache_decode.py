"""Time of one more token with a long past: packed caches against transformers' own, both in one run.

    python benchmarks/cache_decode.py [--model demo|FOLDER] [--tokens 2048,8192] [--caches kivi-4bit] [--steps 12]
                                      [--threads 1] [--device cuda|cpu] [--dtype float16] [--json]

Each cache is filled layer by layer with the same normal keys and values, of which only their number matters for time.
Then single tokens go through the whole model, one with each cache in turn, so that all meet what else the machine does.
Model and `DynamicCache` (`none`) are float32 on a CPU and float16 on a GPU. Figures are medians; `ratio` is the time
with `DynamicCache` over that with the cache: above 1 the cache is faster. `path` says how attention got its result;
before times count, the logits of a fused path are held against those of the decoded one, and a difference beyond 1e-3
of the largest logit (halves: 2e-2) is reported instead of a time, with exit code 1. Times are of whole calls, on a GPU
until it is done. Lines go to `results/cache_decode.jsonl`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.record import model_folder, record
from qexport import plugins
from qexport.formats.kv.base import PRESETS, make_kv
from qexport.runtime.cache import QuantCache, cache_of

# Of the largest logit: through all layers, on inputs without meaning.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
WARM = 2  # steps before times count


def statics_of(fmt: Any, heads: int, dim: int) -> dict[str, Tensor]:
    """What calibration might find for normal keys and values."""
    out = {}
    for name, f in fmt.static(heads, dim).items():
        flat = {"lower": -2.5, "upper": 2.5, "importance": 1.0}.get(name.partition("_")[2])
        made = torch.linspace(-1, 1, f.shape[0]) if flat is None else torch.full(f.shape, flat)
        out[name] = (torch.tensor([1.0, 0.0]) if name.endswith("qnorm") else made).to(f.dtype)
    return out


def finish(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def empty_cache(name: str, model: Any) -> Any:
    """A cache by its name; `none` is transformers' own."""
    config = model.config.get_text_config(decoder=True)
    fmt = make_kv(name)
    if fmt is None:
        return DynamicCache(config=config)
    heads, dim = config.num_key_value_heads, head_dim(config)
    statics = {name: t.to(model.device) for name, t in statics_of(fmt, heads, dim).items()}
    return cache_of(model, fmt, dict.fromkeys(range(config.num_hidden_layers), statics))


def head_dim(config: Any) -> int:
    """Channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def fill(cache: Any, model: Any, tokens: int) -> None:
    """Normal keys and values of so many tokens for every layer, the same ones for every cache."""
    config = model.config.get_text_config(decoder=True)
    rng, like = torch.Generator().manual_seed(0), {"device": model.device, "dtype": model.dtype}
    position = torch.arange(tokens, device=model.device).unsqueeze(0)
    quantized = isinstance(cache, QuantCache)
    rope = model.get_decoder().rotary_emb(torch.zeros(1, **like), position) if quantized else None
    for index, layer in enumerate(cache.layers):
        shape = (1, config.num_key_value_heads, tokens, head_dim(config))
        k, v = (torch.randn(shape, generator=rng).to(**like) for _ in range(2))
        if rope is not None:
            layer.rope_now = rope
        cache.update(k, v, index)


def step(model: Any, cache: Any, token: int) -> tuple[Tensor, float]:
    """Logits of one more token, and milliseconds."""
    ids = torch.tensor([[token]], device=model.device)
    finish(model.device)
    start = time.perf_counter()
    out = model(ids, past_key_values=cache)
    finish(model.device)
    return out.logits, (time.perf_counter() - start) * 1e3


def error_of(model: Any, name: str, tokens: int) -> float:
    """Largest difference of the logits by the fused path from those by the decoded one, over the largest logit."""
    config, found = model.config.get_text_config(decoder=True), []
    for implementation in (config._attn_implementation, "sdpa"):
        before, cache = config._attn_implementation, empty_cache(name, model)
        fill(cache, model, tokens)
        config._attn_implementation = implementation
        found.append(step(model, cache, 100)[0])
        config._attn_implementation = before
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def measure(model: Any, names: list[str], tokens: int, steps: int) -> list[dict[str, Any]]:
    """Facts of all caches at so many tokens."""
    caches = {name: empty_cache(name, model) for name in names}
    errors = {name: error_of(model, name, tokens - 1) for name in names if name != "none"}
    for cache in caches.values():
        fill(cache, model, tokens - 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(WARM + steps):
        for name, cache in caches.items():
            ms = step(model, cache, 100 + i)[1]
            if i >= WARM:
                times[name].append(ms)
    median = {name: statistics.median(own) for name, own in times.items()}
    out = []
    for name, cache in caches.items():
        quantized = isinstance(cache, QuantCache)
        nbytes = (
            cache.nbytes if quantized else sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        )
        out.append(
            {
                "cache": name, "tokens": tokens, "ms": median[name], "least_ms": min(times[name]), "steps": steps,
                "ratio": median["none"] / median[name], "path": cache.path if quantized else "sdpa",
                "cache_bytes": nbytes, "error": errors.get(name, 0.0),
            }
        )  # fmt: skip
    return out


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    mib = line["cache_bytes"] / 2**20
    return (
        f"{line['cache']:14s} {line['tokens']:6d} {line['ms']:8.1f} {line['least_ms']:8.1f} {line['ratio']:6.2f} "
        f"{mib:8.1f}  {line['path']}"
    )


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    known = [name for name, (fmt, _) in PRESETS.items() if fmt in plugins.names("formats.kv")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo`, a folder, a .gguf file or a Hub id")
    parser.add_argument("--tokens", default="2048,8192", help="lengths, commas between")
    parser.add_argument("--caches", default=",".join(known), help="commas between")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: see above")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line."""
    options = options_of()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    model = AutoModelForCausalLM.from_pretrained(model_folder(options.model), dtype=dtype).eval().to(device)
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    names = ["none", *options.caches.split(",")]
    if not options.json:
        sys.stdout.write("cache          tokens       ms    least  ratio      MiB  path\n")
    failed = 0
    with torch.inference_mode():
        for tokens in map(int, options.tokens.split(",")):
            for facts in measure(model, names, tokens, options.steps):
                if not facts["error"] <= TOLERANCE[dtype]:
                    failed += 1
                    sys.stderr.write(f"FAILED {facts['cache']} {tokens}: error {facts['error']:.1e}, not reported\n")
                    continue
                name = str(dtype).removeprefix("torch.")
                line = record("cache_decode", model=Path(options.model).name, dtype=name, **gpu, **facts)
                sys.stdout.write((json.dumps(line) if options.json else row(line)) + "\n")
                sys.stdout.flush()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
