"""Move a model's weights off the grid that an earlier quantization left, without changing what the model computes.

    python benchmarks/degrid.py SOURCE TARGET [--seed 0]

A model that was published in 4 bits has weights on a 4-bit grid: quantizing them again with the same groups looks
lossless and says nothing about a method. Here every input channel of every linear is multiplied by a random factor
exp(0.2877 u), u uniform in (-1, 1), so from 0.75 to 1.33, and whatever produces that channel is divided by it: the gain
of the norm before q, k, v and before gate and up, the rows of v for o (shared by the query heads of a group), the rows
of up for down. For models built like Llama, Qwen or Gemma.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.record import model_folder

SPREAD = 0.2877


def degrid(source: str | Path, target: str | Path, seed: int = 0) -> float:
    """Write the rescaled model to a folder; returns the largest change of a logit over the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.arange(64).unsqueeze(0) * 7 % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        before = model(ids).logits
    with torch.no_grad():
        rescale(model, torch.Generator().manual_seed(seed))
        after = model(ids).logits
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return float((after - before).abs().max() / before.abs().max())


def rescale(model: PreTrainedModel, rng: torch.Generator) -> None:
    """Rescale every layer in place: input norm, norm before the MLP, v with o, up with down, in this order."""
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    unit = 1.0 if config.model_type.startswith("gemma") else 0.0  # Gemma's norms multiply by 1 + weight
    for layer in model.get_decoder().layers:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = layer.pre_feedforward_layernorm if unit else layer.post_attention_layernorm
        _through_norm(layer.input_layernorm, unit, [attention.q_proj, attention.k_proj, attention.v_proj], rng)
        _through_norm(before_mlp, unit, [mlp.gate_proj, mlp.up_proj], rng)
        factors = _factors(groups * size, rng)
        _divide_rows(attention.v_proj, factors)
        attention.o_proj.weight *= factors.view(groups, 1, size).expand(groups, heads // groups, size).reshape(-1)
        factors = _factors(config.intermediate_size, rng)
        _divide_rows(mlp.up_proj, factors)
        mlp.down_proj.weight *= factors


def _factors(count: int, rng: torch.Generator) -> Tensor:
    return torch.exp(SPREAD * (2 * torch.rand(count, generator=rng) - 1))


def _through_norm(norm: nn.Module, unit: float, users: list[nn.Linear], rng: torch.Generator) -> None:
    weight = norm.get_parameter("weight")
    factors = _factors(weight.numel(), rng)
    weight.copy_((weight + unit) / factors - unit)
    for user in users:
        user.weight *= factors


def _divide_rows(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight /= factors[:, None]
    if linear.bias is not None:
        linear.bias /= factors


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Move a model's weights off an earlier quantization's grid.")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    change = degrid(model_folder(options.source), options.target, options.seed)
    sys.stdout.write(f"{options.target}: largest logit change {change:.2e} of the largest logit\n")


if __name__ == "__main__":
    main()
