"""Loads an exported folder with other libraries alone, and saves its logits. Run as a script, in a fresh process.

python -P _foreign.py FOLDER TOKENS.safetensors RESULT.safetensors '{"dtype": "float32"}'

The options are arguments of `from_pretrained`, but for three. `dtype` is a name. With `gptq_backend` GPTQModel loads
the folder, with that kernel. With `inputs` linears don't round what they are given: `"float"`; or the model runs in
both ways: `"both"`.

Tokens are int64 [L] by name, the result has logits float32 [L, vocab] under the same names, and with `"both"` as
`rounded:NAME` those of a model that rounds. `input:NAME` float32 [m, k] is given to that linear alone then, and
`product:NAME` float32 [m, n] is what comes out.

A tensor `probe`, float32 [widest k, c], among the tokens asks for products: for each linear whose weight the library
can decode, `weight:NAME` float32 [n, c] is that weight times the first k rows.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, result: str, options: str) -> None:
    """Write the logits of every sequence, and products of weights if they are asked for."""
    settings = json.loads(options)
    inputs = settings.pop("inputs", None)
    model = load(folder, settings).eval()
    given = load_file(tokens)
    alone = {name.removeprefix("input:"): given.pop(name) for name in list(given) if name.startswith("input:")}
    probe = given.pop("probe", None)
    out = {}
    with torch.inference_mode():
        for name, module in model.named_modules() if probe is not None else ():
            weight = decoded(module)  # before the model runs: bitsandbytes moves its tensors then
            if weight is not None:
                out[f"weight:{name}"] = weight.float() @ probe[: weight.shape[1]]
        with nullcontext() if inputs is None else unrounded(model):
            out |= logits(model, given)
        if inputs == "both":
            out |= {f"rounded:{name}": found for name, found in logits(model, given).items()}
            for name, x in alone.items():  # [1, m, k]: of two axes compressed-tensors takes rows for one token
                out[f"product:{name}"] = model.get_submodule(name)(x.unsqueeze(0))[0].float().contiguous()
    assert "qexport" not in sys.modules
    save_file(out, result)


def logits(model: Any, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each sequence."""
    return {n: model(input_ids=ids.unsqueeze(0)).logits[0].float().contiguous() for n, ids in tokens.items()}


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """For as long as it is open linears leave alone what they are given."""
    eights = [module.state for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    thresholds = [state.threshold for state in eights]
    schemed = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    for state in eights:
        state.threshold = 1e-30  # all features are outliers, which the decoded weight is multiplied by
    for module in schemed:
        module.quantization_enabled = False
    yield
    for state, threshold in zip(eights, thresholds, strict=True):
        state.threshold = threshold
    for module in schemed:
        module.quantization_enabled = True


def load(folder: str, options: dict[str, Any]) -> Any:
    """The model, loaded as the options say."""
    dtype, backend = getattr(torch, options.pop("dtype")), options.pop("gptq_backend", None)
    if backend is not None:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by itself it takes half of all cores
        from gptqmodel import GPTQModel

        # It loads in 16 bits only, but its kernel works in the dtype that it finds.
        return GPTQModel.load(folder, backend=backend, device="cpu", dtype=torch.float16, **options).model.to(dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    for tensor in model.parameters():  # bitsandbytes keeps float16 as it is, whatever dtype it is asked for
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
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
