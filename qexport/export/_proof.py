"""The proof of an export: another library loads it in a fresh process, and its logits are compared with ours."""

import importlib.util
import json
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
from qexport.export.base import Target
from qexport.load import load

_SCRIPT = Path(__file__).with_name("_foreign.py")
_LENGTHS = (48, 17, 1)  # tokens of the sequences


def require(target: Target, name: str) -> None:
    """Raise `BackendError` unless the packages that the proof needs are installed."""
    missing = [package for package in target.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendError(
            f"--to {name}: to prove the result {', '.join(missing)} must be installed, and it is not. "
            "pip install 'qexport[export]', or leave the proof out with --no-check."
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
        logit, and the share of tokens whose first choice is the same.

    Raises:
        CheckpointError: it can't be loaded, or its logits differ by more than the tolerance.
    """
    tokens = sequences(vocab)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tokens, Path(folder) / "tokens.safetensors")
        theirs = _foreign(exported, Path(folder), {**target.loading, **more})
    model = load(packed, backend="reference", dtype=torch.float32)
    with torch.inference_mode():
        ours = {name: model(input_ids=ids.unsqueeze(0)).logits[0].float() for name, ids in tokens.items()}
    return compare(ours, theirs, target)


def sequences(vocab: int) -> dict[str, Tensor]:
    """The same tokens in every run: int64 [L] each."""
    rng = torch.Generator().manual_seed(0)
    return {f"sequence_{n}": torch.randint(0, vocab, (n,), generator=rng) for n in _LENGTHS}


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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(f"the exported model can't be loaded: {lines[-1][:300] if lines else 'no message'}.")
    found: dict[str, Tensor] = load_file(work / "logits.safetensors")
    return found
