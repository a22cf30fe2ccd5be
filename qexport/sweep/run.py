"""A sweep: each setting is packed and measured as `qexport quantize` and `qexport eval` do it, then all are compared.

Nothing is kept but what those leave: finished folders and recorded figures say how far an earlier sweep came.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexport.calibration import bos_id
from qexport.checkpoint import dump_json, write_text
from qexport.errors import QExportError, UsageError
from qexport.evaluate import record
from qexport.evaluate import run as measured
from qexport.evaluate.compare import compare
from qexport.evaluate.harness import find_tasks
from qexport.evaluate.windows import read_text
from qexport.events import Advanced, Note, Observer, Started, ignore
from qexport.facts import renew_card
from qexport.finish import Outcome
from qexport.models import Source, anatomy, open_source
from qexport.plan import Plan, make_plan
from qexport.predict import Prediction, predict
from qexport.quantize import quantize
from qexport.sweep.clock import Clock, spelled
from qexport.sweep.grid import Grid, Setting, within
from qexport.sweep.tokens import Shared

COMPARISON = "comparison.json"


def make_plans(grid: Grid, settings: Sequence[Setting], source: Source) -> dict[str, Plan]:
    """The plan of each setting by its name: whatever can't be done is said before anything is.

    Raises:
        UsageError: an option, pattern or calibration source does not exist; names the file and the setting.
        PlanError: this model, method and format can't do it; likewise.
    """
    described, plans = anatomy(source), {}
    for setting in settings:
        with within(f"grid {grid.file}: setting {setting.number}, {setting.name}"):
            plans[setting.name] = make_plan(
                source, described, setting.recipe, calibration=grid.calibration, seed=grid.calibration.seed,
                dtype=grid.dtype,
            )  # fmt: skip
    return plans


def outlook(grid: Grid, settings: Sequence[Setting], source: Source, *, sort: str = "perplexity") -> dict[str, Any]:
    """What a sweep would make, from headers alone: `{model, output, settings}`, each with bits, bytes and seconds.

    Raises:
        QExportError: whatever `sweep` would refuse.
    """
    _refuse(grid, source, sort)
    plans = make_plans(grid, settings, source)
    predicted = _predictions(plans)
    rows = [
        {
            **_described(setting), "bits_per_weight": found.bits_per_weight, "bytes": found.nbytes,
            "peak_rss_bytes": found.peak_rss_bytes, "seconds": found.seconds,
        }
        for setting in settings
        for found in [predicted[setting.name]]
    ]  # fmt: skip
    return {"model": source.name, "output": str(grid.output), "settings": rows}


def sweep(
    grid: Grid,
    settings: Sequence[Setting],
    source: Source,
    *,
    sort: str = "perplexity",
    device: str = "cpu",
    restart: bool = False,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Make and measure the settings one after another, then compare them.

    What an earlier sweep finished stays; one that was killed goes on where it stopped, to the same figures. A setting
    that fails is told and passed over.

    Args:
        grid: what the settings share.
        settings: those of the grid that are wanted.
        source: the grid's model, opened with its weights.
        sort: of the comparison, see `compare`.
        device: where to compute.
        restart: delete what lies in these settings' folders and begin anew.
        observer: is told of progress.

    Returns:
        `{model, output, settings, comparison}`, also written to `comparison.json`. Of each setting `name`, `number`,
        `options`, `folder`, `failed` (None or the reason), and of those that did not `bits_per_weight`, `bytes`,
        `seconds` and `same_as` (None, or an earlier setting that has the same bytes and stands for it in the
        comparison). `comparison` is what `compare` returns; None if all failed.

    Raises:
        UsageError: something asked for does not exist, or is not measured.
        PlanError: a setting can't be done.
    """
    _refuse(grid, source, sort)
    plans = make_plans(grid, settings, source)
    clock = Clock({name: found.seconds for name, found in _predictions(plans).items()})
    job = _Job(grid, source, device, restart, observer)
    observer(Started("sweep", len(settings), "setting", outer=True))
    rows = []
    for count, setting in enumerate(settings, 1):
        observer(Note(f"{setting.name} ({count} of {len(settings)})"))
        row, told = job.run(setting, plans[setting.name], clock)
        rows.append(row)
        left = clock.left([other.name for other in settings[count:]])
        rest = "" if left is None or count == len(settings) else f"about {spelled(left)} left"
        observer(Advanced("sweep", count, rest))
        observer(Note("; ".join(filter(None, [told, rest])), "info" if row["failed"] is None else "warning"))
    comparison = _compared(rows, sort, observer)
    result = {"model": source.name, "output": str(grid.output), "settings": rows, "comparison": comparison}
    grid.output.mkdir(parents=True, exist_ok=True)
    write_text(grid.output / COMPARISON, dump_json(result, indent=1) + "\n")
    return result


class _Job:
    """What all settings of a sweep are made with."""

    def __init__(self, grid: Grid, source: Source, device: str, restart: bool, observer: Observer) -> None:
        self.grid, self.source, self.device = grid, source, device
        self.restart, self.observer = restart, observer
        self.tokens = Shared(grid.output)

    def run(self, setting: Setting, plan: Plan, clock: Clock) -> tuple[dict[str, Any], str]:
        """One setting, packed and measured: its row, and a line that tells what came of it."""
        folder = self.grid.output / setting.name
        row: dict[str, Any] = {**_described(setting), "folder": str(folder), "failed": None}
        try:
            outcome, found = self.made(plan, folder, setting.name, clock)
        except Exception as error:  # noqa: BLE001  whatever stops one setting is no reason to lose the others
            text = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
            reason = text if isinstance(error, QExportError) else f"{text} (unexpected)"
            return row | {"failed": reason}, f"{setting.name} failed: {reason}"
        finally:
            gc.collect()  # the next setting needs the memory of this one's model
        row["bits_per_weight"], row["bytes"] = outcome.bits_per_weight, outcome.nbytes
        return row | {"seconds": outcome.seconds, "same_as": None}, f"{setting.name}: {_told(outcome, found)}"

    def made(self, plan: Plan, folder: Path, name: str, clock: Clock) -> tuple[Outcome, dict[str, Any]]:
        """Pack and measure a setting, as far as that is not done."""
        start = time.perf_counter()
        outcome = quantize(
            plan, self.source, folder, observer=self.observer, restart=self.restart, device=self.device,
            make_tokens=self.tokens,
        )  # fmt: skip
        packed = time.perf_counter()
        against = self.source.name if self.grid.against is True else self.grid.against
        found = measured.evaluate(
            folder, **self.grid.evaluation, against=against, device=self.device, reuse=True, observer=self.observer
        )
        renew_card(folder)
        clock.took(name, packed - start, time.perf_counter() - packed)
        return outcome, found


def _described(setting: Setting) -> dict[str, Any]:
    return {"name": setting.name, "number": setting.number, "options": dict(setting.options)}


def _predictions(plans: Mapping[str, Plan]) -> dict[str, Prediction]:
    """Of all settings; the model writes calibration text for the first that needs it, the others read a file."""
    found: dict[str, Prediction] = {}
    made = False
    for name, plan in plans.items():
        if plan.calibration is None:
            found[name] = predict(plan)
            continue
        found[name] = predict(replace(plan, calibration=replace(plan.calibration, source="builtin")) if made else plan)
        made = True
    return found


def _told(outcome: Outcome, found: Mapping[str, Any]) -> str:
    """Bits and the figures that are finite."""
    kl = {} if found["fidelity"] is None else {"KL": found["fidelity"]["kl"]["mean"]}
    values = {**{f"perplexity of {text}": own["value"] for text, own in found["perplexity"].items()}, **kl}
    figures = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
    return ", ".join([f"{outcome.bits_per_weight:.3f} bits", *figures])


def _refuse(grid: Grid, source: Source, sort: str) -> None:
    """Say before the work, not after it, what can't be measured or sorted by."""
    own = grid.evaluation
    tasks, texts = own.get("tasks", ()), own.get("texts", ())
    known = ["perplexity", "bits", "size", *(["kl", "top1"] if grid.against else []), *(["tasks"] if tasks else [])]
    if sort not in known:
        raise UsageError(f"--sort {sort!r}: this grid measures no such figure. Known: {', '.join(known)}.")
    if grid.output.exists() and not grid.output.is_dir():
        raise UsageError(f"grid {grid.file}: output: {grid.output} is a file. Name a new folder, or that of a sweep.")
    with within(f"grid {grid.file}: [eval]"):
        measured.Setting(dtype=own.get("dtype"))
        if own.get("bos") != measured.ONCE:
            bos_id(source.tokenizer(), own.get("bos", "auto"))
        context, seqlen = anatomy(source).context, own.get("seqlen", 0)
        if context is not None and seqlen > context:
            raise UsageError(f"seqlen = {seqlen}: the model's context has {context} tokens. Use at most so many.")
        for text in texts:
            read_text(text)
        if tasks:
            find_tasks(tasks, own.get("include_path"))
        if isinstance(grid.against, str) and not record.is_packed(Path(grid.against)):
            open_source(grid.against, weights=False)


def _compared(rows: Sequence[dict[str, Any]], sort: str, observer: Observer) -> dict[str, Any] | None:
    """What is recorded of the finished settings; of those with equal bytes the first stands for all."""
    first: dict[str, str] = {}
    for row in rows:
        if row["failed"] is None:
            weights = record.weights_id(Path(row["folder"]))
            if weights in first:
                row["same_as"] = first[weights]
                observer(Note(f"{row['name']}: the same bytes as {first[weights]}, which stands for it", "warning"))
            first.setdefault(weights, row["name"])
    kept = [row["folder"] for row in rows if row["failed"] is None and row["same_as"] is None]
    return compare(kept, sort=sort, observer=observer) if kept else None
