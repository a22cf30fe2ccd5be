"""Quantized caches beside full precision: perplexity, KL, bytes, long generation, and what KVQuant's parts are worth.

    python benchmarks/cache.py MODEL --text FILE --calibration FILE [--only NAME ...] [--generate 256]

Windows of 2048 tokens, stride 2048, the first 4, float32, weights as the model has them. Text is fed through the cache
in chunks of at most a group of the format, so that every query reads what decoding would; the column `packed` says
which part of the keys that queries read were packed. KVQuant is calibrated on 32 sequences of 512 tokens, sequence i
from token i * floor(T / 32) of the calibration file. KL is that of full precision against the cache, in nats a token.

Bytes are measured from the tensors of caches that are filled with random states, at 2048 and 8192 tokens, as parts of
float16's; `of formula` is what the format's layout says they should be. Long generation continues four pieces of the
text greedily, as one batch: the tokens that are equal to full precision's before the first that is not, and the mean
loss that full precision gives to the whole of it, beside the loss of its own continuation.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import model_folder, record
from qexport import plugins
from qexport.calibration import encode
from qexport.evaluate.fidelity import compare, summary
from qexport.evaluate.original import Original
from qexport.evaluate.perplexity import perplexity
from qexport.evaluate.through import Through
from qexport.evaluate.windows import Windows, cut, read_text
from qexport.formats.kv.base import KVFormat, make_kv, predicted_nbytes
from qexport.integrations.transformers import load_model
from qexport.models.auto import read_tokenizer
from qexport.runtime.cache import QuantCache, cache_of
from qexport.runtime.record import record as recorded
from qexport.runtime.record import shapes

Statics = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A cache; `bound` is the most that its perplexity may be of full precision's."""

    name: str
    preset: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fmt(self) -> KVFormat:
        found = make_kv(self.preset, self.options)
        assert found is not None
        return found


_BARE = {
    "per_channel": False, "pre_rope": False, "uniform": True, "outlier_rate": 0.0, "sink_tokens": 0,
    "residual_window": 0, "qnorm": False,
}  # fmt: skip
_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("keys per token, uniform", {}),
    ("+ keys per channel", {"per_channel": True}),
    ("+ before rotation", {"pre_rope": True}),
    ("+ codebooks", {"uniform": False}),
    ("+ 1 % outliers", {"outlier_rate": 0.01}),
    ("+ four sinks", {"sink_tokens": 4}),
    ("+ a window of 32", {"residual_window": 32}),
)


def ablation(bits: int) -> tuple[Case, ...]:
    """KVQuant with one part more in each case."""
    options, out = dict(_BARE), []
    for name, more in _STEPS:
        options = {**options, **more}
        out.append(Case(f"{bits} bits: {name}", f"kvquant-{bits}bit", options))
    return tuple(out)


CASES = (
    Case("kivi-4bit", "kivi-4bit"),
    Case("kivi-4bit, no window", "kivi-4bit", {"residual_window": 0}),
    Case("kivi-2bit", "kivi-2bit"),
    Case("kivi-2bit, no window", "kivi-2bit", {"residual_window": 0}),
    Case("sdr-4bit", "sdr-4bit"),
    Case("kvquant-4bit", "kvquant-4bit"),
    Case("kvquant-3bit", "kvquant-3bit"),
    Case("kvquant-2bit", "kvquant-2bit"),
    Case("kvquant-2bit, no window", "kvquant-2bit", {"residual_window": 0}),
    *ablation(3),
)


# ---- calibration -------------------------------------------------------------------------------


def calibrate(model: Any, fmts: Sequence[KVFormat], ids: Tensor) -> list[Statics]:
    """What each format needs, from passes over the same sequences for all of them."""
    method = plugins.get("caches", "kvquant")()
    sizes = shapes(model)
    states = [{i: method.start(fmt, h * d, ids.numel()) for i, (h, d) in sizes.items()} for fmt in fmts]

    def see(name: str, chosen: Sequence[int], layer: int, data: dict[str, Tensor]) -> None:
        for number in chosen:
            states[number][layer] = method.see(fmts[number], name, states[number][layer], data)

    for name, gradients in method.passes.items():
        for before in (True, False):
            chosen = [i for i, fmt in enumerate(fmts) if fmt.pre_rope == before]
            for part in ids.split(1) if chosen else ():
                recorded(model, part, partial(see, name, chosen), gradients=gradients, pre_rope=before)
    return [{i: method.finish(fmt, s) for i, s in own.items()} for fmt, own in zip(fmts, states, strict=True)]


# ---- bytes -------------------------------------------------------------------------------------


def filled(model: Any, fmt: KVFormat, statics: Statics, tokens: int) -> QuantCache:
    """A cache of random states, filled with all but 100 tokens at once and these one by one."""
    cache = cache_of(model, fmt, statics)
    for index, (heads, dim) in shapes(model).items():
        layer = cache.layers[index]
        angles = torch.linspace(0, 3, tokens)[None, :, None].expand(1, tokens, dim)
        states = torch.randn(2, 1, heads, tokens, dim, generator=torch.Generator().manual_seed(index))
        cuts = [tokens - 100] + [1] * 100 if index == 0 else [tokens - 1, 1]
        start = 0
        for size in cuts:
            part = slice(start, start + size)
            layer.rope_now = (angles[:, part].cos(), angles[:, part].sin())
            layer.update(states[0][:, :, part], states[1][:, :, part])
            start += size
    return cache


def sizes(model: Any, fmt: KVFormat, statics: Statics, tokens: int) -> dict[str, float]:
    """Bytes of a full cache: measured, held, by the formula, and in float16."""
    cache, found = filled(model, fmt, statics, tokens), shapes(model)
    formula = sum(predicted_nbytes(fmt, tokens, heads, dim, 4) for heads, dim in found.values())
    kinds = {layer.kind for layer in cache.quantized}
    formula += len(kinds) * tokens * next(iter(found.values()))[1] * 4 if fmt.pre_rope else 0
    return {
        "bytes": cache.nbytes, "capacity_bytes": cache.capacity_bytes, "formula": formula,
        "fp16_bytes": cache.fp16_bytes,
    }  # fmt: skip


# ---- long generation ---------------------------------------------------------------------------


@torch.inference_mode()
def continued(model: Any, prompts: Tensor, tokens: int, through: Through | None) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, tokens] after prompts [B, n], and the mean loss [B] that full precision gives to them."""
    cache = None if through is None else through.cache()
    found = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    logits = model(input_ids=found, use_cache=False).logits[:, prompts.shape[1] - 1 : -1].float()
    new = found[:, prompts.shape[1] :]
    return new, torch.nn.functional.cross_entropy(logits.mT, new, reduction="none").mean(dim=1)


def generation(
    model: Any, prompts: Tensor, tokens: int, through: Through, own: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Tokens before the first that is not full precision's, and losses; means over the prompts."""
    new, losses = continued(model, prompts, tokens, through)
    equal = (new == own[0]).long().cumprod(dim=1).sum(dim=1)
    return {
        "equal_tokens": equal.double().mean().item(), "loss": losses.mean().item(), "own_loss": own[1].mean().item(),
    }  # fmt: skip


# ---- the table ---------------------------------------------------------------------------------


def measure(
    model: Any, case: Case, statics: Statics, windows: Windows, prompts: Tensor, own: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """One case's line; `own` is what full precision makes of the prompts."""
    through = Through(model, case.fmt, statics)
    began = time.perf_counter()
    pair = compare(model, Original(lambda: model), [windows], through=through)[0]
    kl, kv = summary([pair])["kl"], through.to_json()
    return {
        "case": case.name, "kv": kv, "perplexity": pair.perplexity.value,
        "kl": kl["mean"], "kl_se": kl["se"], "seconds": time.perf_counter() - began,
        "sizes": {str(n): sizes(model, case.fmt, statics, n) for n in (2048, 8192)},
        "generation": None if own is None else generation(model, prompts, own[0].shape[1], through, own),
    }  # fmt: skip


def row_of(line: dict[str, Any], fp32: float) -> list[str]:
    """A line's cells."""
    small, large = (line["sizes"][n] for n in ("2048", "8192"))
    made = line["generation"]
    parts = (f"{s['bytes'] / s['fp16_bytes']:.4f}" for s in (small, large))
    return [
        line["case"], f"{line['perplexity']:.3f}", f"{line['perplexity'] / fp32 - 1:+.1%}", f"{line['kl']:.4f}",
        f"{line['kv']['quantized_read_fraction']:.3f}", *parts,
        f"{large['bytes'] / large['formula']:.4f}", f"{large['capacity_bytes'] / large['formula']:.3f}",
        *([f"{made['equal_tokens']:.0f}", f"{made['loss']:.3f} ({made['own_loss']:.3f})"] if made else ["", ""]),
    ]  # fmt: skip


def show(*cells: str) -> None:
    """One row, at once."""
    widths = (-30, 10, 8, 8, 7, 8, 8, 11, 9, 7, -16)
    line = "  ".join(c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(cells, widths, strict=True))
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id, or demo; dense or packed")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--only", nargs="+", help="just the cases whose names contain one of these")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--bos", action="store_true", help="put BOS before every window and sequence")
    parser.add_argument("--generate", type=int, default=256, metavar="TOKENS", help="0: none")
    parser.add_argument("--name", help="what to call the model in the results")
    options = parser.parse_args()
    folder = model_folder(options.model)
    model = load_model(str(folder), backend="reference", dtype=torch.float32, cache_gb=64)
    tokenizer = read_tokenizer(folder, name=str(folder), advice="")
    bos = tokenizer.bos_token_id if options.bos else None
    text = encode(tokenizer, read_text(options.text).content)
    windows = cut(
        Path(options.text).name, text, seqlen=options.window, stride=options.window, limit=options.windows, bos=bos
    )
    prompts = torch.stack([text[1000 * i : 1000 * i + 64] for i in range(4)])
    show(
        "cache", "perplexity", "change", "KL", "packed", "at 2048", "at 8192", "of formula", "held", "equal",
        "loss (own)",
    )  # fmt: skip
    fp32 = perplexity(model, [windows])[0].value
    show("full precision", f"{fp32:.3f}", *[""] * 9)
    cases = [c for c in CASES if not options.only or any(o.lower() in c.name.lower() for o in options.only)]
    waiting = [c for c in cases if c.fmt.static(1, 32)]
    ids = encode(tokenizer, read_text(options.calibration).content)
    step = len(ids) // options.samples
    ids = torch.stack([ids[i * step : i * step + options.seqlen] for i in range(options.samples)])
    began = time.perf_counter()
    statics = calibrate(model, [c.fmt for c in waiting], ids) if waiting else []
    found = dict(zip((c.name for c in waiting), statics, strict=True))
    if waiting:
        sys.stderr.write(f"calibrated {len(waiting)} formats in {time.perf_counter() - began:.0f} s\n")
    own = continued(model, prompts, options.generate, None) if options.generate else None
    for case in cases:
        line = measure(model, case, found.get(case.name, {}), windows, prompts, own)
        record("cache", model=options.name or Path(options.model).name, fp32=fp32, **line)
        show(*row_of(line, fp32))


if __name__ == "__main__":
    main()
