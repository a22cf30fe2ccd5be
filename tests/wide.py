"""A tiny random Llama whose widths are multiples of 32, for exports to formats that take no others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as t

from qexport.calibration import Calibration
from qexport.models import anatomy, open_source
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import Change, load_recipe, with_options, with_parts, with_transforms
from tests import tiny

VOCAB = 288  # ids of the tokenizer and some that no text has


def save(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model with its tokenizer; returns the folder."""
    config = t.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tiny.CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, param in model.named_parameters():
                if param.ndim == 1:
                    param.add_(torch.randn_like(param) * 0.1)
                else:
                    param.normal_(std=0.3 if "embed" in key else param.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def packed(folder: Path, *, transforms: Sequence[str] = (), changes: Sequence[Change] = (), **options: Any) -> Path:
    """The model rounded into `folder / "packed"`; `format`, `ignore` and `dtype` may be among the options."""
    fmt, ignore, dtype = options.pop("format", None), options.pop("ignore", ()), options.pop("dtype", torch.float32)
    own = with_transforms(with_parts(load_recipe("rtn"), format=fmt), list(transforms))
    own = with_options(own, list(options.items()))
    own = type(own)(**{**vars(own), "changes": tuple(changes), "ignore": tuple(ignore)})
    source = open_source(str(save(folder / "model", dtype)))
    plan = make_plan(source, anatomy(source), own, calibration=Calibration("builtin", samples=1, seqlen=16))
    quantize(plan, source, folder / "packed")
    return folder / "packed"
