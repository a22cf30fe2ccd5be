"""Checkpoints that another library packed, imported, and compared with what that library computes from them.

    python benchmarks/foreign.py make MODEL OUT --with llm-compressor --scheme W4A16     where that library is installed
    python benchmarks/foreign.py make MODEL OUT --with gptqmodel --scheme v2
    python -m benchmarks.foreign compare OUT                                             where qexport is

`make` needs torch, transformers and the other library, not qexport. Beside the checkpoint it leaves the logits that the
library itself computes from it over fixed tokens, in float32. `compare` imports the checkpoint and prints how far ours
are from those, relative to the largest, and ends with 1 above 1e-5. GPTQModel is asked for float16 weights and float32
sums: in its default, bfloat16, it rounds the scales of its own checkpoints.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LOGITS = "logits.of.its.own"
ALLOWED = 1e-5
_LENGTHS = (48, 17)
_SCHEMES = {
    "W4A16": (4, True),
    "W4A16_ASYM": (4, False),
    "W8A16": (8, True),
    "W3A16": (3, True),
    "W3A16_ASYM": (3, False),
}


def tokens(vocab: int) -> list[torch.Tensor]:
    """The same in every run: int64 [1, L] each."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (1, n), generator=rng) for n in _LENGTHS]


def logits(model: Any, vocab: int) -> dict[str, torch.Tensor]:
    """Logits of the fixed tokens, float32 [L, vocab]."""
    with torch.inference_mode():
        found = [model(input_ids=ids).logits[0].float().contiguous() for ids in tokens(vocab)]
    return {f"sequence_{n}": t for n, t in zip(_LENGTHS, found, strict=True)}


def with_llm_compressor(model: str, out: Path, scheme: str) -> Any:
    """Round to nearest, pack and load again."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    bits, symmetric = _SCHEMES[scheme]
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=64)
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    oneshot(model=loaded, recipe=QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"]))
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **how).eval()


def with_gptqmodel(model: str, out: Path, scheme: str) -> Any:
    """GPTQ on a few sentences, saved and loaded again."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=4,
        group_size=64,
        sym=scheme == "v1",
        desc_act=scheme == "act",
        format="gptq" if scheme == "v1" else "gptq_v2",
    )
    made = GPTQModel.load(model, config)
    made.quantize(
        [f"Sentence {i}: {i * i} bottles stand on {i} shelves in the cellar." for i in range(32)], batch_size=1
    )
    made.save(str(out))
    # In float16, so that scales stay what they are, and computing in float32.
    back = GPTQModel.load(str(out), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    return back.model.float().eval()


def make(options: argparse.Namespace) -> None:
    """Write a checkpoint with another library, and the logits that it computes from it."""
    maker = with_llm_compressor if options.library == "llm-compressor" else with_gptqmodel
    model = maker(options.model, options.out, options.scheme)
    save_file(logits(model, model.config.vocab_size), options.out / LOGITS)
    assert "qexport" not in sys.modules


def compare(folder: Path) -> bool:
    """Import a checkpoint and compare; returns whether ours are close enough."""
    from benchmarks.record import record
    from qexport import load
    from qexport.checkpoint import read_json
    from qexport.export import adopt

    theirs = load_file(folder / LOGITS)
    method = read_json(folder / "config.json")["quantization_config"]["quant_method"]
    with tempfile.TemporaryDirectory() as work:
        adopt(folder, Path(work) / "ours")
        model = load(Path(work) / "ours", backend="reference", dtype=torch.float32)
        ours = logits(model, model.config.vocab_size)
    worst = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
    record("foreign", checkpoint=folder.name, quant_method=method, max_difference=worst, allowed=ALLOWED)
    sys.stdout.write(f"{folder.name}: {method}, differs {worst:.1e} (allowed {ALLOWED:.0e})\n")
    return worst <= ALLOWED


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("model")
    making.add_argument("out", type=Path)
    making.add_argument("--with", dest="library", choices=("llm-compressor", "gptqmodel"), required=True)
    making.add_argument("--scheme", default="W4A16", help=f"{', '.join(_SCHEMES)}; for gptqmodel v1, v2 or act")
    comparing = commands.add_parser("compare")
    comparing.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        make(options)
    else:
        sys.exit(not compare(options.folder))


if __name__ == "__main__":
    main()
