"""Perplexity at stored bits, measured from packed files, beside the figures of reference code.

    python benchmarks/quality.py MODEL --text FILE --calibration FILE [--protocol P D] [--only TEXT] [--work DIR]

Protocol P takes the model as it is, protocol D the same model moved off its 4-bit grid (benchmarks/degrid.py). Both:
windows of 2048 tokens, stride 2048, the first 4, float32; calibration 32 sequences of 512 tokens, sequence i from
token i * floor(T / 32) of the calibration file. The reference figures are those of qllm-infer (commit a5bca21) for
SmolLM2-135M on WikiText-2 (test for the text, validation for calibration); they are shown when the unquantized
perplexity measured here agrees with the reference's.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.degrid import degrid
from benchmarks.record import model_folder, record
from qexport.calibration import Calibration
from qexport.evaluate.run import evaluate
from qexport.models import anatomy, open_source
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import load_recipe, with_options, with_parts, with_transforms

REFERENCE_FP32 = 24.145


@dataclass(frozen=True)
class Case:
    """One quantization; `reference` is the reference code's perplexity and `bound` the most that ours may be of it."""

    protocol: str
    name: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    transforms: tuple[str, ...] = ()
    input: str | None = None
    reference: float | None = None
    bound: float | None = None


def _grid(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, **more}


_PLAIN = {"weighted": False, "feedback": False, "evenly": False}  # BCQ without what is ours, but the constant

_TUNED = {"tune.steps": 64}

_ENDS = {"lm_head": 8, "embeddings": 8}

_FOLDED = {"transform.rotation.fold": True}

_TOKENS = {"format.bits": 8, "format.symmetric": True, "format.group_size": -1, "input.bits": 8}


_ALPHAS = ("0.35", "0.4", "0.45", "0.5", "0.55", "0.6", "0.65", "0.7", "0.75", "0.8", "0.85", "0.9", "auto")


def _alphas(bits: int) -> "tuple[Case, ...]":
    """SmoothQuant at all strengths."""
    recipe, name = f"smoothquant-w{bits}a{bits}", f"SmoothQuant W{bits}A{bits}, alpha"
    return tuple(Case("D", f"{name} {a}", recipe, {"transform.smoothquant.alpha": a}) for a in _ALPHAS)


CASES = (
    Case("P", "RTN 4-bit per channel", "rtn", {"group_size": -1}, reference=42.778, bound=1.01),
    Case("P", "RTN 4-bit g128", "rtn", {"group_size": 128}, reference=33.615, bound=1.01),
    Case("P", "RTN 4-bit g64", "rtn", {"group_size": 64}, reference=31.753, bound=1.01),
    Case("P", "GPTQ 4-bit per channel", "gptq", _grid(4, -1), reference=33.147, bound=1.005),
    Case("P", "GPTQ 4-bit g128", "gptq", _grid(4, 128), reference=30.063, bound=1.005),
    Case("P", "SpQR 3/3/3 16/16", "spqr", reference=28.628, bound=1.0),
    Case("D", "RTN 4-bit g64", "rtn", {"group_size": 64}, reference=32.837, bound=1.01),
    Case("D", "RTN 3-bit g64", "rtn", {"group_size": 64, "bits": 3}, reference=131.658, bound=1.01),
    Case("D", "GPTQ 4-bit g64", "gptq", _grid(4, 64, order="act"), reference=28.734, bound=1.005),
    Case("D", "GPTQ 3-bit g64", "gptq", _grid(3, 64), reference=50.672, bound=1.005),
    Case("D", "SpQR 3/3/3 16/16", "spqr", reference=29.232, bound=1.0),
    # Every weight-only format and method at about 4, 3 and 2 stored bits; pairs to compare have equal bits within 3 %.
    Case("D", "BCQ 4-bit g288", "bcq", _grid(4, 288)),
    Case("D", "RTN 4-bit per channel", "rtn", {"group_size": -1}),
    Case("D", "SDR 4-bit g16", "qrazor-w4a16"),
    Case("D", "SDR 4-bit g32", "qrazor-w4a16", {"group_size": 32}),
    Case("D", "GPTQ + SDR 4-bit g16", "gptq", format="sdr"),
    Case("D", "RTN 4-bit g128", "rtn", {"group_size": 128}),
    Case("D", "NF4, two scales, g128", "afpq"),
    Case("D", "NF4, one scale, g112", "afpq", {"two_scales": False, "group_size": 112}),
    Case("D", "AWQ 4-bit g128", "awq"),
    Case("D", "RTN 4-bit g128, rotation", "rtn", {"group_size": 128}, transforms=("rotation",)),
    Case("D", "GPTQ 4-bit g128, rotation", "gptq", _grid(4, 128), transforms=("rotation",)),
    Case("D", "GPTQ 4-bit, rotation, 8-bit ends", "gptq", {**_grid(4, 128), **_ENDS}, transforms=("rotation",)),
    Case("D", "GPTQ 4-bit g128, AWQ", "gptq", _grid(4, 128), transforms=("awq",)),
    Case("D", "BCQ 4-bit g288, tuned", "bcq", {**_grid(4, 288), **_TUNED}),
    Case("D", "RTN 3-bit g128", "rtn", _grid(3, 128)),
    Case("D", "AWQ 3-bit g128", "awq", _grid(3, 128)),
    Case("D", "RTN 3-bit g128, rotation", "rtn", _grid(3, 128), transforms=("rotation",)),
    Case("D", "GPTQ 3-bit g128, rotation", "gptq", _grid(3, 128), transforms=("rotation",)),
    Case("D", "RTN 3-bit g128, rotation folded", "rtn", _grid(3, 128, **_FOLDED), transforms=("rotation",)),
    Case("D", "GPTQ 3-bit g128, rotation folded", "gptq", _grid(3, 128, **_FOLDED), transforms=("rotation",)),
    Case("D", "SpQR 3-bit g128, rotation", "spqr", _grid(3, 128, outlier_rate=0.0005), transforms=("rotation",)),
    Case("D", "GPTQ 3-bit g128, rotation, tuned", "gptq", _grid(3, 128, **_TUNED), transforms=("rotation",)),
    Case("D", "BCQ 3-bit g192, rotation", "bcq", _grid(3, 192), transforms=("rotation",)),
    Case("D", "BCQ 3-bit g192", "bcq", _grid(3, 192)),
    Case("D", "BCQ 3-bit g192, as published", "bcq", {**_grid(3, 192), **_PLAIN}),
    Case("D", "BCQ 3-bit g192, tuned", "bcq", {**_grid(3, 192), **_TUNED}),
    Case("D", "VPTQ 3-bit", "vptq", {"bits": 3}),
    Case("D", "RTN 2-bit g48", "rtn", _grid(2, 48)),
    Case("D", "RTN 2-bit g16", "rtn", _grid(2, 16)),  # where rounding alone leaves a model that still speaks
    Case("D", "BCQ 2-bit g48, as published", "bcq", {**_grid(2, 48), **_PLAIN}),
    Case("D", "RTN 2-bit g48, rotation", "rtn", _grid(2, 48), transforms=("rotation",)),
    Case("D", "VPTQ 2-bit", "vptq"),
    Case("D", "GPTQ 2-bit g48", "gptq", _grid(2, 48)),
    Case("D", "BCQ 2-bit g144", "bcq", _grid(2, 144)),
    Case("D", "BCQ 2-bit g144, as published", "bcq", {**_grid(2, 144), **_PLAIN}),
    Case("D", "BCQ 2-bit g144, tuned", "bcq", {**_grid(2, 144), **_TUNED}),
    Case("D", "GPTQ 2-bit g48, rotation", "gptq", _grid(2, 48), transforms=("rotation",)),
    Case("D", "VPTQ v4 9-bit", "vptq", {"vector_length": 4, "index_bits": 9}),
    Case("D", "BCQ 2-bit g144, rotation", "bcq", _grid(2, 144), transforms=("rotation",)),
    Case("D", "VPTQ v4 9-bit, rotation", "vptq", {"vector_length": 4, "index_bits": 9}, transforms=("rotation",)),
    Case("D", "VPTQ v4 9-bit, tuned", "vptq", {"vector_length": 4, "index_bits": 9, **_TUNED}),
    Case(
        "D", "VPTQ v4 9-bit, rotation, tuned", "vptq",
        {"vector_length": 4, "index_bits": 9, **_TUNED}, transforms=("rotation",),
    ),
    # SpQR against GPTQ at equal stored bits, about 4 and about 3.
    Case("D", "equal bits: GPTQ 4-bit g128", "gptq", _grid(4, 128)),
    Case("D", "equal bits: SpQR 3-bit", "spqr", {"outlier_rate": 0.0148}),
    Case("D", "equal bits: GPTQ 3-bit g128", "gptq", _grid(3, 128)),
    Case("D", "equal bits: SpQR 3-bit g128", "spqr", _grid(3, 128, outlier_rate=0.0005)),
    # Inputs as integers too.
    Case("D", "RTN W8A8", "rtn", _TOKENS, input="token"),
    *_alphas(8),
    Case("D", "LLM.int8()", "llm-int8"),
    Case("D", "LLM.int8(), static", "llm-int8", {"static": True}),
    Case("D", "RTN W6A6", "rtn", {**_TOKENS, "format.bits": 6, "input.bits": 6}, input="token"),
    *_alphas(6),
    Case("D", "ZeroQuant W8A8", "zeroquant-w8a8"),
    Case("D", "ZeroQuant W4/8A16 without LKD", "zeroquant-w4w8a16", {"lkd": False}),
    Case("D", "ZeroQuant W4/8A16 with LKD", "zeroquant-w4w8a16"),
    Case("D", "ZeroQuant W4/8A8 without LKD", "zeroquant-w4w8a8", {"lkd": False}),
    Case("D", "ZeroQuant W4/8A8 with LKD", "zeroquant-w4w8a8"),
    Case("D", "QRazor W4A8 g16", "qrazor-w4a8"),
    Case("D", "GPTQ + QRazor W4A8 g16", "gptq", {"input.bits": 8}, format="sdr", input="sdr"),
    *(
        Case("D", f"QRazor W4A4 g{g}", "qrazor-w4a4", {"format.group_size": g, "input.group_size": g})
        for g in (8, 16, 32)
    ),
    Case("D", "GPTQ + QRazor W4A4 g16", "gptq", {"input.bits": 4}, format="sdr", input="sdr"),
    Case("D", "QRazor W4, inputs RTN int4 per token", "qrazor-w4a16", {"input.bits": 4}, input="token"),
    Case("D", "RTN W4A4", "rtn", {**_TOKENS, "format.bits": 4, "input.bits": 4}, input="token"),
)  # fmt: skip


def measure(case: Case, model: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantize and evaluate one case; returns its line."""
    source = open_source(str(model))
    recipe = with_parts(load_recipe(case.recipe), format=case.format, input=case.input)
    recipe = with_transforms(recipe, case.transforms)
    recipe = with_options(recipe, list(case.options.items()))
    calibration = Calibration(str(options.calibration), options.samples, options.seqlen, options.bos)
    plan = make_plan(source, anatomy(source), recipe, calibration=calibration)
    out = work / "packed"
    shutil.rmtree(out, ignore_errors=True)
    outcome = quantize(plan, source, out)
    found = evaluate(
        out, texts=[options.text], seqlen=options.window, windows=options.windows, bos=options.bos,
        backend="auto" if recipe.input else "reference", cache_gb=64, dtype="float32",
    )  # fmt: skip
    perplexity = found["perplexity"][Path(options.text).name]["value"]
    return {
        "protocol": case.protocol,
        "case": case.name,
        "method": recipe.method,
        "method_options": dict(recipe.method_options),
        "transforms": [{"name": name, **options} for name, options in recipe.transforms],
        "format": recipe.format,
        "format_options": dict(recipe.format_options),
        "input": {"name": recipe.input, **recipe.input_options} if recipe.input else None,
        "block": recipe.block,
        "tune": dict(recipe.block_options),
        "perplexity": perplexity,
        "bits_per_weight": found["bits_per_weight"],
        "bits_per_parameter": found["bits_per_parameter"],
        "bytes": found["bytes"],
        "seconds": outcome.seconds,
    }


def run(options: argparse.Namespace, work: Path) -> bool:
    """Measure all cases and print the table; returns whether every bound was met."""
    known, good = False, True
    print_row("protocol", "case", "bits", "perplexity", "reference", "ratio", "bound", "seconds", "how")
    original = model_folder(options.model)
    for protocol in options.protocol:
        model = original
        if protocol == "D":
            model = work / "degridded"
            if not (model / "config.json").exists():
                degrid(original, model)
        dense = evaluate(
            model,
            texts=[options.text],
            seqlen=options.window,
            windows=options.windows,
            bos=options.bos,
            dtype="float32",
        )
        fp32 = dense["perplexity"][Path(options.text).name]["value"]
        known = abs(fp32 / REFERENCE_FP32 - 1) < 1e-3
        print_row(protocol, "fp32", "32", f"{fp32:.3f}", f"{REFERENCE_FP32:.3f}" if known else "-", "", "", "", "")
        for case in CASES:
            if case.protocol != protocol or (options.only and options.only.lower() not in case.name.lower()):
                continue
            started = time.perf_counter()
            line = measure(case, model, options, work)
            ratio = line["perplexity"] / case.reference if known and case.reference else None
            good &= ratio is None or case.bound is None or ratio <= case.bound
            reference = case.reference if known else None
            record("quality", model=options.name or Path(options.model).name, fp32=fp32, reference=reference, **line)
            print_row(
                protocol, case.name, f"{line['bits_per_weight']:.4f}", f"{line['perplexity']:.3f}",
                f"{reference:.3f}" if reference else "-", f"{ratio:.4f}" if ratio else "-",
                f"{case.bound:.3f}" if case.bound and known else "-", f"{time.perf_counter() - started:.0f}",
                how(line),
            )  # fmt: skip
    return good


def how(line: dict[str, Any]) -> str:
    """Transforms, the method's options and tuning of a line."""
    words = [f"after {t['name']}{' (folded)' if t.get('fold') else ''}" for t in line["transforms"]]
    words += [f"alpha={t['alpha']}" for t in line["transforms"] if "alpha" in t]
    words += [f"{key}={value}" for key, value in line["method_options"].items()]
    words += [f"input.{key}={value}" for key, value in (line["input"] or {}).items()]
    return " ".join(words + [f"{line['block']}.{key}={value}" for key, value in line["tune"].items()])


def print_row(*cells: str) -> None:
    """One line of the table, at once."""
    widths = (-8, -28, 7, 10, 10, 7, 6, 7, -1)  # negative: text, at the left
    line = "  ".join(c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(cells, widths, strict=True))
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id of a Llama, Qwen or Gemma, or demo")
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--protocol", nargs="+", choices=("P", "D"), default=["P", "D"])
    parser.add_argument("--only", help="just the cases whose name contains this")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, help="tokens of a window; default: 2048, or the model's context")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--bos", choices=("auto", "always", "never"), default="never", help="the protocols use none")
    parser.add_argument("--work", type=Path, help="keep intermediate folders here")
    parser.add_argument("--name", help="what to call the model in the results")
    return parser.parse_args()


def main() -> None:
    """Command line; ends with 1 if a bound was missed."""
    options = parse()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        sys.exit(not run(options, options.work))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not run(options, Path(folder)))


if __name__ == "__main__":
    main()
