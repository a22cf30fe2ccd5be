"""Tasks through lm-eval: question answering and the like, named as in lm-eval or in the user's own YAML files."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

from qexport.errors import SourceError, UsageError
from qexport.evaluate.presets import expand
from qexport.evaluate.through import Through
from qexport.events import Advanced, Note, Observer, Started, ignore

Row = dict[str, float | None]
Documents = dict[str, str | list[float]]


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to run.

    Attributes:
        manager: lm-eval's, that knows them.
        loaded: its tasks and groups by name; patterns, presets and tags are resolved.
    """

    manager: Any
    loaded: Mapping[str, Any]

    def hashes(self, name: str, limit: int | None) -> dict[str, str]:
        """SHA-256 of what is asked and how: the `documents` of a task or group, and the `config` of its prompts."""
        documents, config = hashlib.sha256(), hashlib.sha256()
        for task in _leaves(self.loaded[name]):
            own = {key: value for key, value in task.dump_config().items() if not key.startswith("dataset_")}
            own["metadata"] = (own.get("metadata") or {}).get("version")  # the rest is where the file lies
            config.update(json.dumps(own, sort_keys=True, default=str).encode())
            for _, document in zip(range(limit or sys.maxsize), task.eval_docs, strict=False):
                documents.update(json.dumps(document, sort_keys=True, default=str).encode())
        return {"documents": documents.hexdigest(), "config": config.hexdigest()}


@dataclass(frozen=True)
class Score:
    """What lm-eval found on a task or group.

    Attributes:
        name: of the task or group.
        metrics: `{metric: value, metric_stderr: standard error}` of it and, in a group, of its tasks; metrics of a
            named filter are `metric/filter`. A standard error is None where lm-eval has none.
        metric: the one that stands for it: `acc_norm` if there is one, else `acc`, else the first; None without any.
        documents: for each task, what that metric gave each document: digits where all are 0 or 1, else numbers.
    """

    name: str
    metrics: Mapping[str, Row]
    metric: str | None
    documents: Documents

    @property
    def value(self) -> float | None:
        """Of the metric that stands for it."""
        return None if self.metric is None else self.metrics[self.name][self.metric]

    @property
    def se(self) -> float | None:
        """Standard error of `value`."""
        base, slash, filtered = (self.metric or "").partition("/")
        return self.metrics[self.name].get(f"{base}_stderr{slash}{filtered}")


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Look tasks up and load their data; needs no model, so that it can be done before anything is measured.

    Args:
        tasks: names of presets, tasks, groups or tags; glob patterns are taken too.
        include_path: folder with task YAML files, searched before lm-eval's own.

    Raises:
        UsageError: a task or the folder does not exist, with the closest names.
        SourceError: the data of a task can't be had.
    """
    with _silenced():
        manager, names = _find(expand(tasks), include_path)
        return Tasks(manager, _load(manager, names))


def run_tasks(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Tasks,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    bos: str = "auto",
    batch: int = 4,
    through: Through | None = None,
    observer: Observer = ignore,
) -> Iterator[Score]:
    """Evaluate tasks one by one, so that those that are finished can be kept.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        tasks: of `find_tasks`.
        names: those to run; by default all.
        limit: at most so many documents a task.
        fewshot: examples before each question; by default as many as the task says.
        bos: `auto`, `always` or `never`: whether lm-eval puts BOS before each request.
        batch: requests at a time.
        through: the model with a quantized cache, to read through that; then requests come one at a time, because
            lm-eval fills shorter ones up at their end.
        observer: told of each request.

    Raises:
        SourceError: lm-eval failed; names the task and the model's context, which a document may not fit.
    """
    from lm_eval.models.huggingface import HFLM

    if limit is not None:
        observer(Note(f"tasks: only the first {limit} documents of each are used", "warning"))
    wanted = list(tasks.loaded) if names is None else names
    for number, name in enumerate(wanted, 1):
        with _silenced():
            add_bos = {"always": True, "never": False}.get(bos)
            size = batch if through is None else 1
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, add_bos_token=add_bos)
            if through is not None:
                harness._model_call = lambda ids, *_, **__: through.logits(ids, ids.shape[1])
            _count_requests(harness, f"{name} ({number}/{len(wanted)})", observer)
            score = _run(harness, tasks, name, {"limit": limit, "num_fewshot": fewshot})
        yield score


def _run(harness: Any, tasks: Tasks, name: str, options: Mapping[str, Any]) -> Score:
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model=harness, tasks=[tasks.loaded[name]], task_manager=tasks.manager, bootstrap_iters=100, **options
        )
    except Exception as error:  # lm-eval, a metric, or the task's own code
        context = getattr(harness.model.config.get_text_config(), "max_position_embeddings", None)
        reason = " ".join(str(error).split())[:300] or "no message"
        raise SourceError(
            f"task {name}: lm-eval failed ({type(error).__name__}: {reason}). Every document has to fit the model's "
            f"context of {context or 'unknown many'} tokens. Finished tasks are kept; --limit helps to find the "
            "document that fails."
        ) from error
    metrics = {task: flatten(row) for task, row in sorted(found["results"].items())}
    metric = _main(metrics.get(name, {}))
    return Score(name, metrics, metric, _documents(found["samples"], metric))


def _main(row: Row) -> str | None:
    known = [key for key, value in row.items() if "_stderr" not in key and value is not None]
    return next((key for key in ("acc_norm", "acc") if key in known), known[0] if known else None)


def _documents(samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str | None) -> Documents:
    base, _, filtered = (metric or "").partition("/")
    out: Documents = {}
    for task, rows in samples.items():
        values = [row.get(base) for row in rows if row["filter"] == (filtered or "none")]
        if values and all(isinstance(value, bool | int | float) for value in values):
            numbers = [round(float(value), 6) for value in values if value is not None]
            whole = all(number in (0, 1) for number in numbers)
            out[task] = "".join(str(int(number)) for number in numbers) if whole else numbers
    return out


def _count_requests(harness: Any, phase: str, observer: Observer) -> None:
    """Let the observer know of each request that lm-eval finishes."""
    steps = count(1)

    class Hook:
        """In place of lm-eval's own, which keeps answers and is called for each of them."""

        def add_partial(self, *_: Any) -> None:
            observer(Advanced(phase, next(steps)))

    harness.cache_hook = Hook()
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(harness, name, _announced(getattr(harness, name), phase, observer))


def _announced(work: Callable[..., Any], phase: str, observer: Observer) -> Callable[..., Any]:
    def announced(requests: Sequence[Any], *args: Any, **options: Any) -> Any:
        observer(Started(phase, len(requests), "request"))
        return work(requests, *args, **{**options, "disable_tqdm": True})

    return announced


def _leaves(item: Any) -> list[Any]:
    return list(item.get_all_tasks()) if hasattr(item, "get_all_tasks") else [item]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep lm-eval's tables off stdout, which belongs to the caller's result, and its bars out of files and pipes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():
            # The bars are drawn whatever tqdm's environment says; what matters besides them is raised or logged.
            sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(sink))
        yield


def _find(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """The manager that knows all tasks, and their names with patterns resolved."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        manager = TaskManager()
    elif Path(include_path).is_dir():
        # Reading lm-eval's own thousands of task files takes a while, and who brings their tasks along needs none.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        known = all(own.match_tasks([task]) for task in tasks)
        manager = own if known else TaskManager(include_path=str(include_path))
    else:
        raise UsageError(f"--include-path {include_path}: expected a folder with task files (.yaml); there is none.")
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(_no_such_task(unknown, manager.all_tasks))
    return manager, sorted({name for task in tasks for name in manager.match_tasks([task])})


def _no_such_task(unknown: Sequence[str], known: Sequence[str]) -> str:
    close = get_close_matches(unknown[0], known, 5, 0.5)
    return (
        f"--tasks: there is no task {', '.join(map(repr, unknown))} among the {len(known)} known."
        f"{' Closest: ' + ', '.join(close) + '.' if close else ''}"
        " `lm-eval ls tasks` lists them; --include-path DIR adds your own."
    )


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Tasks, and groups with a score of their own, with their data; a task that a group holds is not taken twice."""
    entries = {}
    for name in names:
        try:
            entries[name] = manager.load([name])
        except Exception as error:  # the network, the cache, a missing file, or the task's own code
            reason = " ".join(str(error).split())[:300]
            raise SourceError(
                f"task {name!r}: its data can't be loaded ({type(error).__name__}: {reason}). Without a connection use "
                "--include-path DIR with tasks whose data_files are local; relative paths start at the current folder."
            ) from error
    loaded: dict[str, Any] = {}
    taken: set[str] = set()
    for name, entry in sorted(entries.items(), key=lambda item: -len(item[1]["tasks"])):
        if not taken.issuperset(entry["tasks"]):
            taken |= entry["tasks"].keys()
            group = entry["groups"].get(name)
            loaded |= {name: group} if group is not None and group.has_aggregation else entry["tasks"]
    return {name: loaded[name] for name in sorted(loaded)}


def flatten(metrics: Mapping[str, Any]) -> Row:
    """One task's row of lm-eval's results: `acc,none` becomes `acc`, `exact_match,strict` `exact_match/strict`."""
    row: Row = {}
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma:
            continue  # alias, sample_len
        name = metric if filtered == "none" else f"{metric}/{filtered}"
        row[name] = float(value) if isinstance(value, int | float) else None
    return row
