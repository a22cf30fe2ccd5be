"""Tasks through lm-eval: question answering and the like, named as in lm-eval or in the user's own YAML files."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qexport.errors import SourceError, UsageError
from qexport.evaluate.through import Through
from qexport.events import Advanced, Note, Observer, Started, ignore

PHASE = "tasks"


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to run.

    Attributes:
        names: of tasks, groups and tags, patterns resolved.
        manager: lm-eval's, that knows them.
        loaded: its tasks and groups.
    """

    names: tuple[str, ...]
    manager: Any
    loaded: Sequence[Any]


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Look tasks up and load their data; needs no model, so that it can be done before anything is measured.

    Args:
        tasks: names of tasks, groups or tags; glob patterns are taken too.
        include_path: folder with task YAML files, searched before lm-eval's own.

    Raises:
        UsageError: a task or the folder does not exist, with the closest names.
        SourceError: the data of a task can't be had.
    """
    with _silenced():
        manager, names = _find(tasks, include_path)
        return Tasks(tuple(names), manager, _load(manager, names))


def run_tasks(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Tasks,
    limit: int | None = None,
    bos: str = "auto",
    batch_size: int = 4,
    through: Through | None = None,
    observer: Observer = ignore,
) -> dict[str, dict[str, float | None]]:
    """Evaluate tasks.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        tasks: of `find_tasks`.
        limit: at most so many documents a task.
        bos: `auto`, `always` or `never`: whether lm-eval puts BOS before each request.
        batch_size: requests at a time.
        through: the model with a quantized cache, to read through that; then requests come one at a time, because
            lm-eval fills shorter ones up at their end.
        observer: told which tasks run.

    Returns:
        Per task `{metric: value, metric_stderr: standard error}`; metrics of a named filter are `metric/filter`. A
        standard error is None where lm-eval has none.

    Raises:
        SourceError: lm-eval failed; names the tasks and the model's context, which a document may not fit.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    observer(Started(PHASE, len(tasks.names), "task"))
    if limit is not None:
        observer(Note(f"tasks: only the first {limit} documents of each are used", "warning"))
    with _silenced():
        add_bos = {"always": True, "never": False}.get(bos)
        size = batch_size if through is None else 1
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, add_bos_token=add_bos)
        if through is not None:
            harness._model_call = lambda ids, *_, **__: through.logits(ids, ids.shape[1])
        try:
            found = lm_eval.simple_evaluate(
                model=harness, tasks=list(tasks.loaded), task_manager=tasks.manager, limit=limit, bootstrap_iters=100,
                log_samples=False,
            )  # fmt: skip
        except Exception as error:  # lm-eval, a metric, or the task's own code
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            reason = " ".join(str(error).split())[:300] or "no message"
            raise SourceError(
                f"tasks {', '.join(tasks.names)}: lm-eval failed ({type(error).__name__}: {reason}). Every document "
                f"has to fit the model's context of {context or 'unknown many'} tokens. Try the tasks one by one, or "
                "with --limit, to find the one that fails."
            ) from error
    observer(Advanced(PHASE, len(tasks.names), ", ".join(tasks.names)))
    return {name: flatten(metrics) for name, metrics in sorted(found["results"].items())}


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


def _load(manager: Any, names: Sequence[str]) -> list[Any]:
    """Tasks and groups with their data; a task that a group holds is not taken twice."""
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
    loaded: list[Any] = []
    taken: set[str] = set()
    for name, entry in sorted(entries.items(), key=lambda item: -len(item[1]["tasks"])):
        if not taken.issuperset(entry["tasks"]):
            taken |= entry["tasks"].keys()
            loaded += [entry["groups"][name]] if name in entry["groups"] else entry["tasks"].values()
    return loaded


def flatten(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """One task's row of lm-eval's results: `acc,none` becomes `acc`, `exact_match,strict` `exact_match/strict`."""
    row: dict[str, float | None] = {}
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma:
            continue  # alias, sample_len
        name = metric if filtered == "none" else f"{metric}/{filtered}"
        row[name] = float(value) if isinstance(value, int | float) else None
    return row
