"""Loads an exported folder with other libraries alone, and saves its logits. Run as a script, in a fresh process.

python -P _foreign.py FOLDER TOKENS.safetensors LOGITS.safetensors '{"dtype": "float32"}'
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, logits: str, options: str) -> None:
    """Logits of every sequence, float32 [L, vocab] each under its own name."""
    given = json.loads(options)
    dtype = getattr(torch, given.pop("dtype"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **given).eval()
    out = {}
    with torch.inference_mode():
        for name, ids in load_file(tokens).items():
            out[name] = model(input_ids=ids.unsqueeze(0)).logits[0].float().contiguous()
    assert "qexport" not in sys.modules
    save_file(out, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
