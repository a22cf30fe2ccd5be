"""Loads an exported folder with other libraries alone, and saves its logits. Run as a script, in a fresh process.

python -P _foreign.py FOLDER TOKENS.safetensors RESULT.safetensors '{"dtype": "float32"}'

The options are arguments of `from_pretrained`, but for three. `dtype` is a name. With `gptq_backend` GPTQModel loads
the folder, with that kernel. With `int8_threshold` bitsandbytes rounds no input feature that has a larger value.

Tokens are int64 [L] by name, the result has logits float32 [L, vocab] under the same names.

A tensor `probe`, float32 [widest k, c], among the tokens asks for products: for each linear whose weight the library
can decode, `weight:NAME` float32 [n, c] is that weight times the first k rows.
"""

import json
import os
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, result: str, options: str) -> None:
    """Write the logits of every sequence, and products of weights if they are asked for."""
    model = load(folder, json.loads(options)).eval()
    given = load_file(tokens)
    probe = given.pop("probe", None)
    out = {}
    with torch.inference_mode():
        for name, module in model.named_modules() if probe is not None else ():
            weight = decoded(module)  # before the model runs: bitsandbytes moves its tensors then
            if weight is not None:
                out[f"weight:{name}"] = weight.float() @ probe[: weight.shape[1]]
        for name, ids in given.items():
            out[name] = model(input_ids=ids.unsqueeze(0)).logits[0].float().contiguous()
    assert "qexport" not in sys.modules
    save_file(out, result)


def load(folder: str, options: dict[str, Any]) -> Any:
    """The model, loaded as the options say."""
    dtype, backend = getattr(torch, options.pop("dtype")), options.pop("gptq_backend", None)
    threshold = options.pop("int8_threshold", None)
    if backend is not None:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by itself it takes half of all cores
        from gptqmodel import GPTQModel

        # It loads in 16 bits only, but its kernel works in the dtype that it finds.
        return GPTQModel.load(folder, backend=backend, device="cpu", dtype=torch.float16, **options).model.to(dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    if threshold is not None:
        for module in model.modules():
            if type(module).__name__ == "Linear8bitLt":
                module.state.threshold = threshold
    return model


def decoded(module: Any) -> torch.Tensor | None:
    """A linear's weight [n, k] as the library decodes it; None of a module that the library leaves alone."""
    if type(module).__name__ == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        out: torch.Tensor = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        return out
    if hasattr(module, "qweight") and hasattr(module, "dequantize_weight"):
        turned: torch.Tensor = module.dequantize_weight().T
        return turned
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
