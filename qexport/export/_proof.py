"""The proof of an export: another library loads it in a fresh process, and its logits are compared with ours."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexport.errors import BackendError, CheckpointError
from qexport.export._rounding import compare_rounding, given, unrounded
from qexport.export.base import Decodes, Packed, Rounds, Target
from qexport.load import load
from qexport.schema import Tensors

_SCRIPT = Path(__file__).with_name("_foreign.py")
_LENGTHS = (48, 17, 1)  # tokens of the sequences
_PROBES = 4  # vectors that each weight is multiplied by


def require(target: Target, name: str) -> None:
    """Raise `BackendError` unless the packages that the proof needs are installed."""
    missing = [package for package in target.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendError(
            f"--to {name}: to prove the result {', '.join(missing)} must be installed, and it is not. "
            f"pip install 'qexport[{getattr(target, 'extra', 'export')}]', or leave the proof out with --no-check."
        )


def prove(
    target: Target, packed: Path, exported: Path, vocab: int, more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Compare the logits of an exported folder with those of the packed one.

    Args:
        target: what it was exported to.
        packed: a folder of `qexport quantize`.
        exported: what was made from it.
        vocab: number of tokens.
        more: arguments for the loader, beside those of the target.

    Returns:
        `{"max_difference", "tolerance", "tokens", "top1"}`: the largest difference of two logits over the largest
        logit, and the share of tokens whose first choice is the same; inputs of linears stay floats for that on both
        sides. With `"weights"` if the target `Decodes`: the largest difference of two products of a weight over the
        largest product. With `"rounding"` if inputs are rounded and the target `Rounds`: see `compare_rounding`.

    Raises:
        CheckpointError: it can't be loaded, or its logits or weights differ by more than the tolerance.
    """
    checkpoint, tokens, loading = Packed(packed), sequences(vocab), {**target.loading, **more}
    extra: dict[str, Any] = {}
    sent: dict[str, Tensor] = {}
    if isinstance(target, Decodes):
        sent["probe"] = probes(max(module.k for module in checkpoint.modules))
    inputs = given(checkpoint) if isinstance(target, Rounds) else {}
    if inputs:
        loading["inputs"] = "both"
    with tempfile.TemporaryDirectory() as folder:
        save_file({**tokens, **sent, **inputs}, Path(folder) / "tokens.safetensors")
        theirs = _foreign(exported, Path(folder), loading)
    if isinstance(target, Decodes):
        extra["weights"] = compare_weights(checkpoint, theirs, sent["probe"], target)
    model = load(packed, backend="reference", dtype=torch.float32)
    with unrounded(model):
        ours = {"unrounded": _logits(model, tokens)}
    figures = compare(ours["unrounded"], theirs, target)
    if isinstance(target, Rounds) and inputs:
        ours["rounded"] = _logits(model, tokens)
        extra["rounding"] = compare_rounding(model, checkpoint, target, inputs, ours, theirs)
    return {**figures, **extra}


def _logits(model: Any, tokens: Tensors) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: model(input_ids=ids.unsqueeze(0)).logits[0].float() for name, ids in tokens.items()}


def sequences(vocab: int) -> dict[str, Tensor]:
    """The same tokens in every run: int64 [L] each."""
    rng = torch.Generator().manual_seed(0)
    return {f"sequence_{n}": torch.randint(0, vocab, (n,), generator=rng) for n in _LENGTHS}


def probes(k: int) -> Tensor:
    """The same vectors in every run: float32 [k, 4]."""
    return torch.randn(k, _PROBES, generator=torch.Generator().manual_seed(1))


def compare_weights(packed: Packed, theirs: Tensors, probe: Tensor, target: Decodes) -> float:
    """The largest difference of two products over the largest product of that linear.

    A product takes in all weights of a row, so that one wrong code shows, and nobody has to keep a decoded model.

    Args:
        packed: the packed checkpoint.
        theirs: `weight:NAME` float32 [n, 4] of every packed module, see `_foreign.py`.
        probe: what weights are multiplied by, float32 [widest k, 4].
        target: says how much they may differ.

    Raises:
        CheckpointError: one differs by more, or the library has not read it as a quantized linear.
    """
    worst = 0.0
    for module in packed.modules:
        found = theirs.get(f"weight:{module.name}")
        own = module.decoded(module.tensors(packed.reader)) @ probe[: module.k]
        if found is None or found.shape != own.shape:
            raise CheckpointError(f"{module.name}: the other library has not read it as a quantized linear.")
        difference = float((found - own).abs().max() / own.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        if not difference <= target.weights:
            raise CheckpointError(
                f"{module.name}: the exported weight differs from ours by {difference:.2e} of the largest product, "
                f"more than the {target.weights:.0e} that is allowed for. Nothing was kept."
            )
        worst = max(worst, difference)
    return worst


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], target: Target) -> dict[str, Any]:
    """Figures of two sets of logits [L, vocab]; raises `CheckpointError` where they differ too much."""
    worst = same = count = 0.0
    for name, own in ours.items():
        found = theirs[name]
        if found.shape != own.shape:
            raise CheckpointError(f"logits: expected {list(own.shape)}, found {list(found.shape)}.")
        difference = (found - own).abs().max() / own.abs().max()
        worst = max(worst, float(difference) if torch.isfinite(difference) else float("inf"))
        same += float((found.argmax(-1) == own.argmax(-1)).sum())
        count += own.shape[0]
    if not worst <= target.tolerance:
        raise CheckpointError(
            f"the exported model's logits differ from ours by {worst:.2e} of the largest, more than the "
            f"{target.tolerance:.0e} that {target.source} allows for. Nothing was kept."
        )
    return {"max_difference": worst, "tolerance": target.tolerance, "tokens": int(count), "top1": same / count}


def _foreign(exported: Path, work: Path, loading: Mapping[str, Any]) -> dict[str, Tensor]:
    command = [sys.executable, "-P", str(_SCRIPT), str(exported), str(work / "tokens.safetensors")]
    command += [str(work / "logits.safetensors"), json.dumps(dict(loading))]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than everything else here
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(f"the exported model can't be loaded: {lines[-1][:300] if lines else 'no message'}.")
    found: dict[str, Tensor] = load_file(work / "logits.safetensors")
    return found
