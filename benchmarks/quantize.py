"""Time of quantization jobs as multiples of one forward pass, and memory of the GPTQ job.

    python benchmarks/quantize.py MODEL --calibration FILE [--samples 32 --seqlen 512] [--runs 1]
                                  [--recipes gptq awq bcq vptq]
    python benchmarks/quantize.py MODEL --calibration FILE --large        memory on a random Llama of 1.3e9 parameters

Time: one float32 forward pass of all decoder layers and a job of each recipe over the same tokens, in turn, in one
process; a job counts from its first calibration batch to its last rename. Medians and their ratio are printed. Memory:
the largest resident set of a fresh `qexport quantize`, beside what `qexport plan` said before.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import model_folder, record
from qexport.calibration import Calibration
from qexport.events import Event, Started
from qexport.models import anatomy, load_dense, open_source
from qexport.plan import make_plan, micro_batch
from qexport.quantize import quantize, read_tokens
from qexport.recipe import load_recipe


def job(options: argparse.Namespace, recipe: str, out: Path) -> tuple[float, float, torch.Tensor, int]:
    """One job; returns wall and CPU seconds from the first calibration batch, the tokens, and the micro-batch."""
    source = open_source(options.model)
    calibration = Calibration(str(options.calibration), options.samples, options.seqlen)
    plan = make_plan(source, anatomy(source), load_recipe(recipe), calibration=calibration)
    shutil.rmtree(out, ignore_errors=True)
    began: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started) and event.phase == "embed":
            began.append((time.perf_counter(), time.process_time()))

    quantize(plan, source, out, observer=watch)
    wall, cpu = time.perf_counter() - began[0][0], time.process_time() - began[0][1]
    return wall, cpu, read_tokens(out), micro_batch(plan)


def forward(model: Any, ids: torch.Tensor, batch: int) -> tuple[float, float]:
    """Wall and CPU seconds of one pass of the decoder layers."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for part in ids.split(batch):
            model.get_decoder()(input_ids=part, use_cache=False)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_time(options: argparse.Namespace, work: Path) -> None:
    """Interleaved runs of the forward pass and of a job of each recipe."""
    model = load_dense(open_source(options.model), dtype=torch.float32, device="cpu")
    jobs: dict[str, list[tuple[float, float]]] = {name: [] for name in options.recipes}
    passes: list[tuple[float, float]] = []
    for number in range(options.runs):
        for name in options.recipes:
            wall, cpu, ids, batch = job(options, name, work / "out")
            jobs[name].append((wall, cpu))
            passes.append(forward(model, ids, batch))
            say(f"run {number + 1}: {name} {wall:.1f} s ({cpu:.1f} CPU-s), forward {passes[-1][0]:.1f} s")
    once, once_cpu = (statistics.median(column) for column in zip(*passes, strict=True))
    for name, found in jobs.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        recipe = load_recipe(name)
        record(
            "quantize", measurement="time", model=options.name, recipe=name, method=recipe.method, format=recipe.format,
            samples=options.samples, seqlen=options.seqlen, runs=options.runs, job_seconds=wall, job_cpu_seconds=cpu,
            forward_seconds=once, forward_cpu_seconds=once_cpu, ratio=wall / once,
        )  # fmt: skip
        say(f"median: {name} {wall:.1f} s ({cpu:.1f} CPU-s), forward {once:.1f} s: {wall / once:.2f} passes")


def measure_memory(model: str, name: str, arguments: list[str], work: Path) -> None:
    """Peak resident memory of a fresh process beside its prediction."""
    command = [sys.executable, "-m", "qexport"]
    predicted = json.loads(
        subprocess.run(
            [*command, "plan", model, *arguments, "--json"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ).stdout
    )["peak_rss_bytes"]
    out = work / "memory"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [*command, "quantize", model, *arguments, "-o", str(out), "--json"], check=True, stdout=subprocess.PIPE
    )
    outcome = json.loads(done.stdout)
    peak = outcome["peak_rss_bytes"]
    method = arguments[arguments.index("--method") + 1]
    record(
        "quantize", measurement="memory", model=name, method=method, format="uniform", peak_rss_bytes=peak,
        predicted_bytes=predicted, arguments=[a for a in arguments if "/" not in a], seconds=outcome["seconds"],
    )  # fmt: skip
    say(f"{name}, {method}: peak {peak / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB ({peak / predicted - 1:+.1%})")


def large_model(folder: Path, tokenizer: Path) -> None:
    """A random bf16 Llama of 1.3e9 parameters with 32 heads, 4 KV heads and an untied vocabulary of 49,152."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=26, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=49152, tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")
    for path in open_source(str(tokenizer)).companions():
        shutil.copyfile(path, folder / path.name)


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id, or demo; with --large, just its tokenizer is used")
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=["gptq", "awq", "bcq", "vptq"])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--name", help="what to call the model in the results")
    parser.add_argument("--work", type=Path, help="where intermediate folders go; the large model takes 2.5 GB")
    options = parser.parse_args()
    options.name = options.name or Path(options.model).name
    options.model = str(model_folder(options.model))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        text = ["--calibration", str(options.calibration), "--device", "cpu"]
        if options.large:
            large_model(work / "large", Path(options.model))
            for arguments in (["--method", "rtn"], ["--method", "gptq", "--samples", "8", "--seqlen", "256"]):
                measure_memory(str(work / "large"), "random Llama, 1.3e9 parameters, bf16", [*arguments, *text], work)
            return
        amounts = ["--samples", str(options.samples), "--seqlen", str(options.seqlen)]
        measure_memory(options.model, options.name, ["--method", "gptq", *amounts, *text], work)
        measure_time(options, work)


if __name__ == "__main__":
    main()
