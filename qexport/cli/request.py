"""What the options of `quantize` and `plan` ask for, in the words of the package, and the doing of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.cli import tables
from qexport.cli.called import called
from qexport.cli.screen import Screen
from qexport.devices import device_of
from qexport.errors import UsageError
from qexport.recipe import SHORT, Change, Recipe, chosen, kv_settings, split_kv

if TYPE_CHECKING:
    from qexport.calibration import Calibration
    from qexport.finish import Outcome
    from qexport.models import Source
    from qexport.plan import Plan

_NAMELESS = "the model's name is empty. Name a Hub id, a folder or a .gguf file, or leave it out for the demo."
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """Options as typed; `None` leaves a choice to the recipe or to the library."""

    model: str | None
    method: str | None
    recipe: Path | None
    format: str | None
    input: str | None
    transforms: Sequence[str]
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    lm_head: int | None
    embeddings: int | None
    ignore: Sequence[str]
    overrides: Sequence[str]
    settings: Sequence[str]
    calibration: str | None
    samples: int
    seqlen: int
    bos: str
    seed: int
    device: str
    dtype: str
    revision: str | None
    token: str | None
    kv: str | None


def recipe_of(request: Request) -> Recipe:
    """The recipe with the changes of the command line; raises `UsageError` for what does not exist."""
    if (not request.method) == (request.recipe is None):
        raise UsageError("say which recipe: --method NAME (see `qexport methods`) or --recipe FILE, one of them.")
    path = request.recipe
    if path is not None and path.suffix != ".toml":
        raise UsageError(f"--recipe {path}: expected a .toml file.")
    short = {f"format.{key}": getattr(request, key) for key in SHORT}
    outer = {"recipe.lm_head": request.lm_head, "recipe.embeddings": request.embeddings}
    options: list[tuple[str, Any]] = [(key, value) for key, value in (short | outer).items() if value is not None]
    recipe = chosen(
        request.method or str(path), format=request.format, input=request.input, transforms=request.transforms,
        kv=request.kv, options=options + [_pair(text, "-s") for text in request.settings],
    )  # fmt: skip
    changes = tuple(_change(text) for text in request.overrides)
    return replace(recipe, changes=recipe.changes + changes, ignore=recipe.ignore + tuple(request.ignore))


def pairs_of(settings: Sequence[str]) -> dict[str, Any]:
    """Options of `-s KEY=VALUE`, values as they were typed; raises `UsageError`."""
    return dict(_pair(text, "-s") for text in settings)


def kv_pairs_of(settings: Sequence[str]) -> dict[str, Any]:
    """Options of `-s kv.KEY=VALUE`, by bare name, values as they were typed; raises `UsageError` for others."""
    found: dict[str, Any] = {}
    for key, value in pairs_of(settings).items():
        prefix, _, name = key.rpartition(".")
        if prefix != "kv":
            raise UsageError(f"-s {key}: expected an option of the cache, kv.{name}.")
        found[name] = value
    return found


def _pair(text: str, option: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key.strip() and sign):
        raise UsageError(f"{option} {text!r}: expected KEY=VALUE.")
    return key.strip(), value.strip()


def _change(text: str) -> Change:
    pattern, sign, setting = text.partition(":")
    if not (pattern and sign):
        raise UsageError(f"--set {text!r}: expected PATTERN:KEY=VALUE, for example '*.down_proj:bits=4'.")
    return Change(pattern, *_pair(setting, f"--set {pattern}:"))


def model_of(name: str | None, screen: Screen) -> str:
    """What to open: the model's name, or the demo model if there is none or it is called `demo`.

    Raises:
        UsageError: the name is an empty string, as from a shell variable that is not set.
    """
    if name is not None and not name.strip():
        raise UsageError(_NAMELESS)
    if name is None or (name == "demo" and not Path(name).exists()):
        from qexport.models import demo_model

        return demo_model(screen.observe)
    return name


def check_dtype(name: str) -> None:
    """Raise `UsageError` unless the job can compute in this dtype."""
    if name not in _DTYPES:
        raise UsageError(f"--dtype {name!r}: expected {', '.join(_DTYPES)}.")


def folder_of(name: str) -> Path:
    """A folder's path; raises `UsageError` when its name is empty, as from a shell variable that is not set."""
    if not name.strip():
        raise UsageError("the folder's name is empty.")
    return Path(name)


def _resolve(request: Request, screen: Screen, *, weights: bool) -> tuple["Source", "Plan"]:
    """Open the model and resolve the plan; whatever is wrong with the options alone is said before anything is read."""
    recipe = recipe_of(request)
    check_dtype(request.dtype)
    device_of(request.device)
    if request.model is not None and not request.model.strip():
        raise UsageError(_NAMELESS)

    from qexport.models import anatomy, open_source
    from qexport.plan import make_plan

    calibration = _calibration(request)
    name = model_of(request.model, screen)
    source = open_source(name, revision=request.revision, token=request.token, weights=weights, observer=screen.observe)
    return source, make_plan(
        source, anatomy(source), recipe, calibration=calibration, seed=request.seed, dtype=request.dtype
    )


def _calibration(request: Request) -> "Calibration":
    from qexport.calibration import Calibration

    return Calibration(request.calibration or "self", request.samples, request.seqlen, request.bos, request.seed)


def run_plan(request: Request, screen: Screen, reader: str | None = None) -> dict[str, Any]:
    """The resolved plan and its prediction, as `plan --json` prints them; `reader` is whom it may be exported for."""
    from qexport.export import outlook, reader_of

    if reader is not None:
        reader_of(reader)  # a name that nobody has is an error before the model is looked at
    _, plan = _resolve(request, screen, weights=False)
    found = _described(plan)
    return found if reader is None else {**found, "export": outlook(plan, reader)}


def _described(plan: "Plan") -> dict[str, Any]:
    from qexport.inputs.base import described
    from qexport.predict import predict, predict_cache

    predicted = predict(plan)
    modules = {
        name: {
            "n": m.view.n,
            "k": m.view.k,
            "method": m.method_name,
            "format": m.spec.weight.name,
            "input": described(m.spec.input.quant),
            "bytes": m.nbytes,
            "bits_per_weight": 8 * m.nbytes / (m.view.n * m.view.k),
        }
        for name, m in plan.modules.items()
    }
    return {
        "model": plan.model,
        "recipe": plan.recipe.name,
        "transforms": list(plan.transforms),
        "bits_per_weight": predicted.bits_per_weight,
        "bits_per_parameter": predicted.bits_per_parameter,
        "bytes": predicted.nbytes,
        "peak_rss_bytes": predicted.peak_rss_bytes,
        "seconds": predicted.seconds,
        "modules": modules,
        "kv": predict_cache(plan),
        "dense": list(plan.dense),
        "towers": list(plan.anatomy.towers),
        "unseen": list(plan.anatomy.unseen),
        "calibration": plan.as_json()["calibration"],
        "notes": _notes(plan),
    }


def _notes(plan: "Plan") -> list[str]:
    """What a plan costs beyond its table."""
    notes = []
    gathers = sum(m.spec.input.permute for m in plan.modules.values())
    if gathers:
        notes.append(
            f"{gathers} linears store their columns in another order and gather their input at run time; "
            "-s order=group avoids it."
        )
    if plan.stream is not None:
        inside = sum(name in plan.modules for name in plan.stream.readers)
        notes.append(f"hidden states rotated in the weights: {inside} of the linears that read them are quantized.")
    rotated = sum(m.spec.input.hadamard for m in plan.modules.values())
    if rotated:
        notes.append(f"inputs rotated at run time: {rotated} linears; two or three small products each.")
    scaled = sum(m.spec.input.scale for m in plan.modules.values())
    if scaled:
        notes.append(f"inputs scaled at run time: {scaled} linears; nothing before them can take the scale up.")
    notes += _rounded(plan)
    if plan.anatomy.unseen:
        sizes = {name: math.prod(plan.anatomy.parameters[name][1]) for name in plan.anatomy.unseen}
        packed = sum(m.view.n * m.view.k for m in plan.modules.values())
        share = sum(sizes.values()) / (sum(sizes.values()) + packed)
        largest = ", ".join(sorted(sizes, key=lambda name: (-sizes[name], name))[:3])
        notes.append(
            f"{len(sizes)} matrices of the layers are no linears and stay dense, {share:.1%} of the weights there: "
            f"{largest}{' ...' if len(sizes) > 3 else ''}."
        )
    if plan.unties:
        notes.append(_untied(plan))
    if plan.calibration is not None and plan.calibration.source == "self":
        needed = plan.calibration.predicted_bytes(plan.anatomy) / 1e9
        notes.append(
            f"while the model writes its calibration text all of it is in memory, {needed:.2f} GB beside the rest."
        )
    return notes


def _rounded(plan: "Plan") -> list[str]:
    """What happens to inputs, a line for each way of rounding them."""
    from qexport.inputs.base import described

    ways: dict[str, int] = {}
    for module in plan.modules.values():
        if module.spec.input.quant is not None:
            text = described(module.spec.input.quant)
            ways[text] = ways.get(text, 0) + 1
    return [f"inputs multiplied as integers: {count} linears, {text}." for text, count in ways.items()]


def _untied(plan: "Plan") -> str:
    """That head and embedding, one tensor in the model, are stored as two, and what each takes."""
    head = plan.anatomy.head
    assert head is not None
    dtype, shape = plan.anatomy.parameters[head.param]
    whole = math.prod(shape) * dtype.itemsize
    embedding = plan.anatomy.embedding.removesuffix(".weight")
    sizes = [
        f"{name} {'dense' if planned is None else 'packed'}, {(whole if planned is None else planned.nbytes):,} bytes"
        for name, planned in ((embedding, plan.embedding), (head.name, plan.head))
    ]
    return (
        f"{head.name} shares its weight with {embedding}, {whole:,} bytes; they are stored apart: {'; '.join(sizes)}."
    )


def run_quantize(request: Request, screen: Screen, *, out: str | None, restart: bool) -> dict[str, Any]:
    """Do the whole job; the plan is shown first. Returns what `quantize --json` prints."""
    if out is not None and not out.strip():
        raise UsageError("-o: expected the name of a folder, found none. Leave it out for ./<model>-<recipe>-<bits>b.")
    if request.kv is not None and not request.method and request.recipe is None and request.model is not None:
        return _run_kv(request, screen, out=out, restart=restart)
    source, plan = _resolve(request, screen, weights=True)
    screen.show(tables.plan(_described(plan)))

    from qexport.quantize import quantize

    outcome = quantize(
        plan,
        source,
        Path(out) if out else default_folder(plan),
        observer=screen.observe,
        restart=restart,
        device=device_of(request.device),
        command=called(),
    )
    return _outcome(outcome)


def _outcome(outcome: "Outcome") -> dict[str, Any]:
    """What `quantize --json` prints; the model card in the folder, if it is one of ours, says so too."""
    from qexport.facts import renew_card

    renew_card(outcome.out)
    found = {
        "out": str(outcome.out),
        "bits_per_weight": outcome.bits_per_weight,
        "bits_per_parameter": outcome.bits_per_parameter,
        "bytes": outcome.nbytes,
        "seconds": outcome.seconds,
        "peak_rss_bytes": outcome.peak_rss_bytes,
    }
    return found if outcome.kv is None else {**found, "kv": outcome.kv}


def _run_kv(request: Request, screen: Screen, *, out: str | None, restart: bool) -> dict[str, Any]:
    """Change the cache of a packed folder in place; returns what `quantize --json` prints."""
    assert request.model is not None
    assert request.kv is not None
    folder, (cache, others) = folder_of(request.model), split_kv([_pair(text, "-s") for text in request.settings])
    options = kv_settings(request.kv, cache)
    _refuse_for_kv(request, out, [key for key, _ in others])
    check_dtype(request.dtype)

    from qexport.formats.kv.base import make_kv
    from qexport.kv import Job, change

    job = Job(_calibration(request), request.calibration is None, device_of(request.device), request.dtype, restart)
    return _outcome(change(folder, make_kv(request.kv, options), job, observer=screen.observe))


def _refuse_for_kv(request: Request, out: str | None, settings: Sequence[str]) -> None:
    """Raise `UsageError` for options that say how weights are packed: --kv without --method leaves them alone."""
    given = {
        "-o": out, "--format": request.format, "--input": request.input, "-t": request.transforms,
        "--bits": request.bits, "--group-size": request.group_size, "--sym/--asym": request.symmetric,
        "--lm-head": request.lm_head, "--embeddings": request.embeddings, "--ignore": request.ignore,
        "--set": request.overrides, **{f"-s {key}": True for key in settings},
    }  # fmt: skip
    for option, value in given.items():
        if value is not None and value != ():
            raise UsageError(
                f"{option}: --kv without --method changes the cache of {request.model} in place and nothing else. "
                "Leave it out, or name a recipe, --method NAME, to pack a model."
            )


def default_folder(plan: "Plan") -> Path:
    """`./<model>-<recipe>-<bits>b`, for example `SmolLM2-135M-Instruct-spqr-3b`."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(plan.model.rstrip("/")).name.removesuffix(".gguf")) or "model"
    widths = {str(getattr(m.spec.weight, "bits", "")) for m in plan.modules.values()} - {""}
    bits = f"-{'-'.join(sorted(widths))}b" if widths else ""
    return Path(f"{model}-{plan.recipe.name}{bits}")
