"""The part of a proof that is about inputs: does the other library round them as the packed checkpoint asks?

What rounds twice in different ways can't agree to the last digits: one code that falls on the other side of a tie
changes what the next linear is given. So differences are measured in units of what the rounding itself changes, which
is the root mean square of our results with it less those without it. Ours and theirs must differ by less than a limit,
and theirs must be away from the unrounded ones too: a library that rounds nothing fails.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.export.base import Module, Packed, Rounds
from qexport.inputs.base import InputQuant
from qexport.runtime.packed import quantized
from qexport.schema import Tensors

_LEAST = 0.5  # of what rounding changes here must be changed there
_ROWS = 8  # of inputs for each linear
_APART = 16  # features from one that reaches a threshold to the next


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """For as long as it is open, linears of a loaded packed model leave their inputs alone."""
    specs = {module: module.spec for module in quantized(model).values() if module.spec.input.quant is not None}
    for module, spec in specs.items():
        module.spec = replace(spec, input=replace(spec.input, quant=None))
    try:
        yield
    finally:
        for module, spec in specs.items():
            module.spec = spec


def rounding(modules: Sequence[Module]) -> list[Module]:
    """Those whose input is rounded."""
    return [module for module in modules if module.spec.input.quant is not None]


def given(packed: Packed) -> dict[str, Tensor]:
    """The same inputs for each linear in every run, float32 [8, k], that make use of all its levels.

    Rows whose scale is found when they come have different ones. Where features are left out from a threshold on, some
    reach it in all rows, and others in none.
    """
    rng = torch.Generator().manual_seed(2)
    out = {}
    for module in rounding(packed.modules):
        quant = module.spec.input.quant
        assert quant is not None
        stored = {field: packed.reader.read(f"{module.name}.{field}") for field in quant.layout(module.k)}
        least = getattr(quant, "threshold", 8.0)
        scale = stored.get("input_quant_scale", torch.tensor(least / 128))
        codes = 254 * torch.rand(_ROWS, module.k, generator=rng) - 127
        x = (codes - stored.get("input_quant_zero", torch.tensor(0))) * scale * _sizes(quant)
        if hasattr(quant, "threshold"):
            x[:, ::_APART] = x[:, ::_APART].sign() * 2 * least
        out[f"input:{module.name}"] = x
    return out


def _sizes(quant: InputQuant) -> Tensor:
    """How large rows are, float32 [8, 1]: rounding changes them in proportion, where the scale is that of the row."""
    return torch.ones(_ROWS, 1) if "input_quant_scale" in quant.layout(1) else 0.5 ** (torch.arange(_ROWS)[:, None] % 4)


def compare_rounding(
    model: Any,
    packed: Packed,
    target: Rounds,
    inputs: Tensors,
    ours: Mapping[str, Mapping[str, Tensor]],
    theirs: Tensors,
) -> dict[str, float]:
    """Figures of a library that rounds inputs.

    Args:
        model: the packed model, loaded.
        packed: its folder.
        target: says how much products may differ.
        inputs: see `given`.
        ours: logits by sequence, `"unrounded"` and `"rounded"`.
        theirs: `product:NAME` for each of `inputs`, and logits as `rounded:NAME`.

    Returns:
        `{"logits", "products", "allowed"}`: how far logits are from ours, how far the worst linear's products are, and
        how far logits may be.

    Raises:
        CheckpointError: they differ by more than is allowed.
    """
    worst = 0.0
    for module in rounding(packed.modules):
        name, quant = module.name, module.spec.input.quant
        assert quant is not None
        linear, x, sizes = model.get_submodule(name), inputs[f"input:{name}"], _sizes(quant)
        with torch.inference_mode():
            rounded = linear(x)
            with unrounded(linear):
                plain = linear(x)
        there, here = (theirs[f"product:{name}"] - plain) / sizes, (rounded - plain) / sizes
        worst = max(worst, _agree(there, here, target.rounding(module), name))
    names = list(ours["rounded"])
    found = torch.cat([theirs[f"rounded:{name}"] for name in names])
    plain, rounded = (torch.cat([ours[kind][name] for name in names]) for kind in ("unrounded", "rounded"))
    return {
        "logits": _agree(found - plain, rounded - plain, target.carried, "logits"),
        "products": worst,
        "allowed": target.carried,
    }


def _agree(there: Tensor, here: Tensor, limit: float, where: str) -> float:
    """How far apart two changes by rounding are, in units of ours; raises `CheckpointError` where that is too much."""
    cost = _rms(here).clamp(min=torch.finfo(torch.float32).tiny)
    difference, theirs = float(_rms(there - here) / cost), float(_rms(there) / cost)
    if not difference <= limit:
        raise CheckpointError(
            f"{where}: with rounded inputs they differ by {difference:.2f} of what the rounding changes, more than "
            f"the {limit:g} that is allowed for. Nothing was kept."
        )
    if not theirs >= _LEAST:
        raise CheckpointError(
            f"{where}: rounding inputs changes {theirs:.2f} times as much there as here, less than the {_LEAST:g} that "
            "is expected at least. Nothing was kept."
        )
    return difference


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()
