"""Greedy tokens of llama.cpp from an exported GGUF file, beside those of our decoded model.

    python benchmarks/greedy.py llama FILE.gguf OUT.json [--every-token]    where llama-cpp-python is installed
    python -m benchmarks.greedy ours CHECKPOINT OUT.json                    where qexport is

llama.cpp rounds what flows into Q4_0, Q4_1 and Q8_0 weights to 8 bits, so its tokens part from anyone's who does not. It
multiplies in float32 where a BLAS does it: for 32 tokens or more, with weights not repacked. So `llama` reads the whole
text again for each new token, prompts have 32 tokens or more, and the package has to be built with a BLAS:

    apt install libopenblas-dev pkg-config
    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python

With `--every-token` it generates as users do, one token at a time. `ours` prints for each prompt how many of the 64
tokens are the likeliest of our decoded model too, and ends with 1 if any is not.
"""  # noqa: E501

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    (
        "The capital of France is a city that many travellers want to see at least once in their lives, for its "
        "museums, its river, its food and its long history. Its name is"
    ),
    (
        "# This module holds small mathematical functions that are used in many places of the program.\n\n"
        'def fibonacci(n):\n    """Return the n-th number of the Fibonacci sequence."""\n    '
    ),
    (
        "Once upon a time, in 1984, a café in  Zürich's old town was the place where four friends met every evening to "
        "talk about books and music. One evening the youngest of them said"
    ),
    (
        "Water boils at 100 degrees at the level of the sea, but on a high mountain it boils at a lower temperature. "
        "The reason for this is that"
    ),
)
STEPS = 64
_LEAST = 32  # tokens from which llama.cpp hands a product to the BLAS


def llama(file: Path, *, every_token: bool) -> list[dict[str, Any]]:
    """Token ids of each prompt, those that follow, and the logits of the first of them."""
    import llama_cpp.llama_cpp as raw
    import numpy as np
    from llama_cpp import Llama

    defaults = raw.llama_model_default_params

    def not_repacked() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    raw.llama_model_default_params = not_repacked
    # One thread: those of ggml wait in a loop while the BLAS works.
    threads = {"n_threads": 1, "n_threads_batch": 1}
    sizes = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "type_k": 0, "type_v": 0}  # a cache of float32
    model = Llama(str(file), **sizes, **threads, logits_all=True, flash_attn=False, verbose=False)
    out = []
    for prompt in PROMPTS:
        ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
        assert len(ids) >= _LEAST, f"{len(ids)} tokens are too few"
        found: list[int] = []
        first: list[float] = []
        model.reset()
        model.eval(ids)
        for _ in range(STEPS):
            scores = model.scores[model.n_tokens - 1]
            first = first or scores.tolist()
            found.append(int(np.argmax(scores)))
            if not every_token:
                model.reset()
            model.eval(found[-1:] if every_token else ids + found)
        out.append({"ids": ids, "found": found, "logits": first})
    return out


def ours(checkpoint: Path, theirs: list[dict[str, Any]]) -> bool:
    """Compare; whether all tokens are equal."""
    import torch
    from transformers import AutoTokenizer

    import qexport

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = qexport.load(checkpoint, backend="reference", dtype=torch.float32)
    good = True
    for prompt, found in zip(PROMPTS, theirs, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + found["found"]])).logits[0].float()[len(ids) - 1 : -1]
        same = sum(a == b for a, b in zip(logits.argmax(-1).tolist(), found["found"], strict=True))
        error = float((logits[0] - torch.tensor(found["logits"])).abs().max() / logits[0].abs().max())
        text = f"tokens of the prompt equal: {ids == found['ids']}; first logits differ by {error:.1e}"
        sys.stdout.write(f"{same} of {STEPS} tokens equal; {text}\n")
        good &= same == STEPS and ids == found["ids"]
    return good


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("llama", help="generate with llama.cpp")
    one.add_argument("file", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--every-token", action="store_true", help="as users generate, not the whole text each time")
    two = commands.add_parser("ours", help="compare")
    two.add_argument("checkpoint", type=Path)
    two.add_argument("found", type=Path)
    options = parser.parse_args()
    if options.command == "llama":
        options.out.write_text(json.dumps(llama(options.file, every_token=options.every_token)))
        return
    sys.exit(not ours(options.checkpoint, json.loads(options.found.read_text())))


if __name__ == "__main__":
    main()
