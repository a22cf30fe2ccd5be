"""The last files of a checkpoint: index, config, tokenizer, manifest and the record of the run."""

import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint import (
    Journal,
    Reader,
    Written,
    copy_companions,
    dump_json,
    read_json,
    sync_folder,
    write_index,
    write_text,
)  # fmt: skip
from qexport.container import FORGOTTEN_IMPORT, SCHEMA, describe
from qexport.formats.specs import LinearSpec, from_json
from qexport.kvfile import figures_in
from qexport.models import Source
from qexport.plan import Plan, linears, stored_parameters
from qexport.schema import Extents

MANIFEST = "qexport.json"
RUN = "run.json"
RESULTS = "results.jsonl"
CARD = "README.md"


@dataclass(frozen=True)
class Outcome:
    """A finished job, as `quantize --json` prints it; time and memory are None where `run.json` was lost.

    Bits per weight are of the quantized modules, bits per parameter of all that is stored; None in older manifests.
    `kv` are the figures of a quantized cache (see `kvfile.figures`), None if there is none.
    """

    out: Path
    bits_per_weight: float
    bits_per_parameter: float | None
    nbytes: int
    seconds: float | None
    peak_rss_bytes: int | None
    resumed_layers: int
    kv: Mapping[str, Any] | None = None


def finish(
    plan: Plan, source: Source, out: Path, journal: Journal, *, seconds: float, resumed: int, command: str | None
) -> Outcome:
    """Write what is not a shard, the manifest last, and close the journal."""
    shards = [name for name in journal.done if name.startswith("model-")]
    modules = {name: facts for shard in shards for name, facts in journal.done[shard].get("specs", {}).items()}
    errors = {name: facts for shard in shards for name, facts in journal.done[shard].get("modules", {}).items()}
    weights = sum(m.view.n * m.view.k for m in plan.modules.values())
    packed = sum(facts["nbytes"] for facts in modules.values())
    for written in (
        write_index(out, shards),
        _config(plan, source, out, modules),
        *copy_companions(source.folder, out),
    ):
        if written.name not in journal.done:
            journal.add(written)
    chosen = next((line["chosen"] for line in journal.done.values() if "chosen" in line), None)
    tensors = Reader(out, sorted(shards))
    whole = 8 * sum(tensors.meta(name).nbytes for name in tensors.names) / stored_parameters(plan)
    manifest = {
        "schema": SCHEMA,
        "writer": version("qexport"),
        "digest": plan.digest,
        "plan": plan.as_json(),
        **({"chosen": chosen} if chosen else {}),
        "calibration": next((line["origin"] for line in journal.done.values() if "origin" in line), None),
        "bits_per_weight": 8 * packed / weights,
        "bits_per_parameter": whole,
        "modules": {name: _module_facts(plan, name, modules[name], errors[name]) for name in plan.modules},
        "embeddings": [] if plan.embedding is None else [plan.embedding.view.name],
        "dense": list(plan.dense),
        "towers": list(plan.anatomy.towers),
        "files": {name: line["sha256"] for name, line in journal.done.items()},
    }
    write_text(out / MANIFEST, dump_json(manifest, indent=1) + "\n")
    nbytes = sum((out / name).stat().st_size for name in shards)
    peak = peak_rss_bytes()
    run = {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "resumed_layers": resumed,
        "command": command,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **environment(),
    }
    write_text(out / RUN, dump_json(run, indent=1) + "\n")
    journal.path.unlink()
    sync_folder(out)
    return Outcome(out, 8 * packed / weights, whole, nbytes, seconds, peak, resumed)


def outcome_of(out: Path) -> Outcome:
    """The outcome of a job that was finished before."""
    manifest = read_json(out / MANIFEST)
    run = read_json(out / RUN) if (out / RUN).exists() else {}
    shards = [name for name in manifest["files"] if name.startswith("model") and name.endswith(".safetensors")]
    nbytes = sum((out / name).stat().st_size for name in shards)
    return Outcome(
        out,
        manifest["bits_per_weight"],
        manifest.get("bits_per_parameter"),
        nbytes,
        run.get("seconds"),
        run.get("peak_rss_bytes"),
        len((manifest.get("plan") or {}).get("modules") or ()),
        figures_in(manifest),
    )


def environment() -> dict[str, Any]:
    """Versions and machine, for records that are outside the promise of equal bytes."""
    return {
        "versions": {
            "qexport": version("qexport"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def peak_rss_bytes() -> int:
    """The largest resident memory that this program has had.

    Linux hands `ru_maxrss` on from whoever started the program, so its own high-water mark is read where there is one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _module_facts(plan: Plan, name: str, stored: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, Any]:
    view = plan.modules[name].view
    bits = 8 * stored["nbytes"] / (view.n * view.k)
    return {"n": view.n, "k": view.k, "nbytes": stored["nbytes"], "bits_per_weight": bits, **found}


def _config(plan: Plan, source: Source, out: Path, modules: Mapping[str, Mapping[str, Any]]) -> Any:
    specs: dict[str, LinearSpec | None] = {name: None for name, _ in source.model.named_modules() if name}
    specs |= {
        view.name: from_json(modules[view.name]["spec"], view.name) if view.name in modules else None
        for view in (*linears(plan.anatomy), *((plan.embedding.view,) if plan.embedding else ()))
    }
    extents = {name: facts["extents"] for name, facts in modules.items()}
    # Once one of them is packed they are two; and some configs tie what the source stores as two tensors.
    untied = plan.unties or not plan.anatomy.tied
    dtype = plan.anatomy.parameters[plan.anatomy.embedding][0]
    return write_config(out, read_json(source.folder / "config.json"), specs, extents, untied=untied, dtype=dtype)


def write_config(
    out: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, LinearSpec | None],
    extents: Mapping[str, Extents],
    *,
    untied: bool,
    dtype: torch.dtype,
) -> Written:
    """Write the `config.json` of a packed model.

    Args:
        out: its folder.
        config: of the model before.
        specs: every module by path, packed or not; see `container.describe`.
        extents: by module.
        untied: head and embedding are two tensors.
        dtype: of the model, should its config not say: transformers would take that of a scale.
    """
    new = dict(config)
    if untied:
        new["tie_word_embeddings"] = False
        if isinstance(new.get("text_config"), dict):
            new["text_config"] = {**new["text_config"], "tie_word_embeddings": False}
    if not (new.get("dtype") or new.get("torch_dtype")):
        new["dtype"] = str(dtype).removeprefix("torch.")
    new["quantization_config"] = describe(specs, extents)
    new["transformers_weights"] = FORGOTTEN_IMPORT
    return write_text(out / "config.json", dump_json(new, indent=1) + "\n")
