"""What a method that is blind to the inputs pays for a few columns: perplexity with them left exact.

    python benchmarks/columns.py MODEL --text FILE --calibration FILE [--bits 3 2] [--columns 0 1 4]

In every linear the columns that meet the features of the largest mean square (over 4 calibration sequences of 512
tokens) get their original weights back, the others stay as rounding to nearest and plain alternating BCQ code them.
Weights are decoded in memory and stored nowhere: this is to find a cause, not to rate a checkpoint. Windows as in
`quality.py`. MODEL is the one to look at; for protocol D make it with `degrid.py` first.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import model_folder, record
from qexport.evaluate.perplexity import perplexity
from qexport.evaluate.windows import cut
from qexport.formats.bcq import Bcq
from qexport.formats.uniform import Uniform
from qexport.methods.bcq import Bcq as BcqMethod
from qexport.methods.rtn import Rtn
from qexport.models import anatomy, load_dense, open_source

_GROUPS = {4: (128, 288), 3: (128, 192), 2: (48, 144)}  # of RTN and of BCQ, at about the same bytes
_PLAIN = BcqMethod(weighted=False, feedback=False)


def coded(weights: Mapping[str, Tensor], method: str, bits: int) -> dict[str, Tensor]:
    """Weights as a method that sees nothing else decodes them."""
    rtn, bcq = _GROUPS[bits]
    rng = torch.Generator()
    if method == "rtn":
        uniform = Uniform(bits=bits, group_size=rtn)
        return {name: uniform.decode(Rtn().quantize(w, {}, uniform, rng).fields) for name, w in weights.items()}
    planes = Bcq(bits=bits, group_size=bcq)
    return {name: planes.decode(_PLAIN.quantize(w, {}, planes, rng).fields) for name, w in weights.items()}


def mean_squares(model: torch.nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Sums of squares of each linear's input features over tokens [b, L]."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def see(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]).float().square().sum(0)

        return model.get_submodule(name).register_forward_pre_hook(see)

    handles = [hook(name) for name in names]
    with torch.inference_mode():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id, or demo")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--bits", nargs="+", type=int, choices=sorted(_GROUPS), default=[3, 2])
    parser.add_argument("--columns", nargs="+", type=int, default=[0, 1, 4])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--name", help="what to call the model in the results")
    options = parser.parse_args()
    source = open_source(str(model_folder(options.model)))
    model = load_dense(source, dtype=torch.float32)
    views = {v.name: v for block in anatomy(source).blocks for v in block.views}
    weights = {name: source.view(v) for name, v in views.items()}
    tokenizer = source.tokenizer()
    tokens = torch.tensor(tokenizer(options.text.read_text(), add_special_tokens=False).input_ids)
    text = cut(options.text.name, tokens, seqlen=options.window, limit=options.windows)
    ids = tokenizer(options.calibration.read_text(), add_special_tokens=False).input_ids[: 4 * 512]
    squares = mean_squares(model, list(views), torch.tensor(ids).view(4, -1))
    for bits in options.bits:
        for method in ("rtn", "bcq"):
            decoded = coded(weights, method, bits)
            error = sum(float((d - weights[n]).square().sum() / weights[n].square().sum()) for n, d in decoded.items())
            for count in options.columns:
                for name, view in views.items():
                    w, kept = decoded[name].clone(), squares[name].topk(count).indices
                    w[:, kept] = weights[name][:, kept]
                    model.get_parameter(view.param).data.copy_(w.T if view.transposed else w)
                value = perplexity(model, [text])[0].value
                line = {"bits": bits, "method": method, "exact_columns": count, "perplexity": value}
                relative = error / len(weights)
                record("columns", model=options.name or Path(options.model).name, squared_error=relative, **line)
                sys.stdout.write(f"{bits} bits  {method}  {count} columns exact  error {relative:.4f}  {value:,.1f}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
