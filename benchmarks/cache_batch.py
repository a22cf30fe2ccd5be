"""Does a padded batch store and say what its sequences store and say alone?

    python benchmarks/cache_batch.py MODEL [--text FILE] [--kv NAME ...] [--tokens 256]

Four prompts of different lengths, padded at the left, are continued greedily through a quantized cache, together and
one by one: float32, reference path. Printed for each sequence: whether all tokens are equal, or the first step that
differs with the difference of the two best logits there (below 1e-2 the choice is a toss-up); and how many numbers of
the first 64 tokens are stored otherwise. Ends with 1 if a step differs whose logits don't tie.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import model_folder, record
from qexport.calibration import encode
from qexport.evaluate.windows import read_text
from qexport.formats.kv.base import PRESETS, make_kv
from qexport.integrations.transformers import load_model
from qexport.models.auto import read_tokenizer
from qexport.runtime.cache import QuantCache, kept, kv_cache

LENGTHS = (97, 40, 128, 75)
TIE = 1e-2
FIRST = 64


def run(model: Any, ids: Tensor, mask: Tensor, name: str, tokens: int) -> tuple[Tensor, Tensor, QuantCache]:
    """New tokens [b, tokens], the difference of the two best logits at each [b, tokens], and the cache."""
    cache = kv_cache(model, name)
    found = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    best = torch.stack([step.topk(2).values for step in found.logits], 1)
    return found.sequences[:, ids.shape[1] :], best[..., 0] - best[..., 1], cache


def codes(cache: QuantCache, row: int) -> list[Tensor]:
    """Decoded codes of a sequence's first tokens: what is packed of them, layer by layer, keys and values."""
    out = []
    for layer in cache.quantized:
        cohort = next(cohort for cohort in layer.cohorts if row in cohort.rows)
        for side in (cohort.keys, cohort.values):
            groups = min(-(-FIRST // side.coder.group), side.packed.count)
            if not groups:
                continue
            view = {name: t[cohort.rows.index(row)][None] for name, t in side.packed.view(0, groups).items()}
            out.append(side.coder.decode(view, side.static, side.heads, side.dim).flatten(1, 2)[0, :FIRST])
    return out


def compare(model: Any, hay: Tensor, name: str, tokens: int) -> dict[str, Any]:
    """All prompts together and each alone."""
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, longest - length :] = hay[1000 * row : 1000 * row + length]
        mask[row, longest - length :] = 1
    together, _, cache = run(model, ids, mask, name, tokens)
    rows, changed, total = [], 0, 0
    for row, length in enumerate(LENGTHS):
        alone, gaps, own = run(
            model, ids[row : row + 1, longest - length :], mask[row : row + 1, -length:], name, tokens
        )
        differs = (alone[0] != together[row]).nonzero().flatten().tolist()
        gap = gaps[0, differs[0]].item() if differs else None
        rows.append({"length": length, "step": differs[0] if differs else None, "gap": gap})
        for a, b in zip(codes(cache, row), codes(own, 0), strict=True):
            changed += int((~torch.isclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))).sum())
            total += a.numel()
    good = all(r["gap"] is None or r["gap"] < TIE for r in rows)
    return {"kv": name, "tokens": tokens, "sequences": rows, "numbers": total, "other_codes": changed, "good": good}


def main() -> None:
    """Command line; ends with 1 if a sequence parts from itself without a tie."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id, or demo")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--kv", nargs="+", help="default: that of the checkpoint, or all that need no calibration")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    folder = model_folder(options.model)
    model = load_model(str(folder), backend="reference", dtype=torch.float32)
    hay = encode(read_tokenizer(folder, name=str(folder), advice=""), read_text(options.text).content)
    names = options.kv or ([None] if kept(model) else [n for n in PRESETS if not make_kv(n).static(1, 32)])
    good = True
    for name in names:
        line = record("cache_batch", model=folder.name, **compare(model, hay, name, options.tokens))
        good &= line["good"]
        for row in line["sequences"]:
            end = (
                "all tokens equal"
                if row["step"] is None
                else f"parts at {row['step']}, best logits {row['gap']:.1e} apart"
            )
            sys.stdout.write(f"{name or 'its own'}: prompt of {row['length']}: {end}\n")
        sys.stdout.write(f"{name or 'its own'}: {line['other_codes']} of {line['numbers']} first numbers differ\n")
        sys.stdout.flush()
    sys.exit(not good)


if __name__ == "__main__":
    main()
