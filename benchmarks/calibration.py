"""Which calibration text is worth most: perplexity at 3 bits on two texts, for every source.

    python benchmarks/calibration.py MODEL --text FILE --domain FILE [--samples 32 --seqlen 512]

Sources: the model's own text (from random first tokens alone, and where there is a chat template, through it alone and
half of each; at three temperatures), the built-in text, half own and half built-in, a file of the domain that is
evaluated, random tokens, and no data (RTN). The method is GPTQ at 3 bits, groups of 64, everything else equal; the
second text is the built-in evaluation part, which no calibration source reads. Sampling time is shown.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import model_folder, record
from qexport.calibration import Calibration, sample, tokens
from qexport.calibration.sampling import template_of
from qexport.checkpoint import Journal, write_tensors
from qexport.evaluate.run import evaluate
from qexport.models import Source, anatomy, load_dense, open_source
from qexport.plan import Plan, make_plan
from qexport.quantize import CALIBRATION_FILE, quantize
from qexport.recipe import load_recipe, with_options

Maker = Callable[[], Tensor]


def makers(source: Source, options: argparse.Namespace) -> dict[str, Maker]:
    """A function that makes the token ids, [samples, seqlen], for each source."""
    count, length = options.samples, options.seqlen

    def own(number: int = count, **knobs: Any) -> Tensor:
        model = load_dense(source, dtype=torch.float32, device="cpu")
        return sample(model, source.tokenizer(), samples=number, seqlen=length, seed=options.seed, **knobs)

    def text(name: str, number: int = count) -> Tensor:
        return tokens(source, Calibration(name, number, length, "auto")).ids

    vocab = source.config.get_text_config().vocab_size
    chats = {
        "own: half chat, half free": lambda: own(chat=0.5),
        "own: chat only": lambda: own(chat=1.0),
    }
    return {
        **(chats if template_of(source.tokenizer()) else {}),
        "own: free, from random tokens": lambda: own(chat=0.0),
        "own, temperature 0.7": lambda: own(chat=0.5, temperature=0.7),
        "own, temperature 1.3": lambda: own(chat=0.5, temperature=1.3),
        "builtin": lambda: text("builtin"),
        "half own, half builtin": lambda: torch.cat([own(count // 2, chat=0.5), text("builtin", count - count // 2)]),
        "in domain": lambda: text(str(options.domain)),
        "random tokens": lambda: torch.randint(
            vocab, (count, length), generator=torch.Generator().manual_seed(options.seed)
        ),
    }


def plan_of(source: Source, recipe: str, options: argparse.Namespace) -> Plan:
    """A 3-bit plan; its calibration only says how many tokens there are."""
    chosen = with_options(load_recipe(recipe), [("bits", 3), ("group_size", 64)])
    calibration = Calibration(str(options.domain), options.samples, options.seqlen)
    return make_plan(source, anatomy(source), chosen, calibration=calibration)


def job(source: Source, plan: Plan, ids: Tensor | None, out: Path) -> None:
    """Quantize with given ids: the job finds them in its journal, as after an interruption."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if ids is not None:
        origin = {"source": "benchmark"}
        written = write_tensors(out / CALIBRATION_FILE, {"input_ids": ids.int()}, origin)
        Journal(out, plan.digest).add(written, origin=origin)
    quantize(plan, source, out)


def score(out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Perplexity on both texts."""
    found = evaluate(out, texts=[options.text, "builtin"], windows=4, backend="reference", cache_gb=64, dtype="float32")
    return {name: text["value"] for name, text in found["perplexity"].items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path, help="text to evaluate on")
    parser.add_argument("--domain", required=True, type=Path, help="other text of the same domain, to calibrate on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the model's own text and of random tokens")
    parser.add_argument("--only", help="just the sources whose name contains this")
    parser.add_argument("--name", help="what to call the model in the results")
    options = parser.parse_args()
    options.name = options.name or Path(options.model).name
    options.model = str(model_folder(options.model))
    source = open_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for name, make in {**makers(source, options), "no data (RTN)": None}.items():
            if options.only and options.only not in name:
                continue
            began = time.perf_counter()
            ids = None if make is None else make()
            seconds = time.perf_counter() - began
            plan = plan_of(source, "rtn" if ids is None else "gptq", options)
            job(source, plan, ids, out)
            found = score(out, options)
            record(
                "calibration", model=options.name, source=name, bits=3, group_size=64,
                samples=options.samples, seqlen=options.seqlen, seed=options.seed, perplexity=found,
                sampling_seconds=seconds,
            )  # fmt: skip
            cells = "  ".join(f"{text} {value:9.3f}" for text, value in found.items())
            sys.stdout.write(f"{name:34s} {cells}  {seconds:6.1f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
