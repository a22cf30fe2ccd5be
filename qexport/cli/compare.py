"""`qexport compare`: its arguments and its tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from qexport.cli import options as o
from qexport.cli.request import model_of
from qexport.cli.screen import Screen, run
from qexport.devices import device_of
from qexport.errors import UsageError
from qexport.events import Note

Rows = list[tuple[str, ...]]
_NOT_EVALUATED = "{} says how to evaluate: it goes with --eval."


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B...", help="Packed folders, dense models, Hub ids."),
    ],
    sort: Annotated[
        str,
        typer.Option(
            help="bits, size, perplexity, kl, top1, tasks, speed or a column.", autocompletion=o.complete_sort
        ),
    ] = "perplexity",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    evaluate: Annotated[bool, typer.Option("--eval", help="Measure what is not recorded yet.")] = False,
    text: o.Texts = None,
    seqlen: Annotated[int | None, typer.Option(help="With --eval: tokens of a window.", min=2)] = None,
    windows: Annotated[int | None, typer.Option(help="With --eval: at most this many windows.", min=1)] = None,
    bos: Annotated[
        str | None, typer.Option(help="With --eval: auto, always, never, once.", autocompletion=o.complete_bos)
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --eval: the original, for KL and top-1.")
    ] = None,
    tasks: o.Tasks = None,
    limit: Annotated[int | None, typer.Option(help="With --eval: documents of each task.", min=1)] = None,
    device: o.EvalDevice = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Put what was measured of several models side by side, and say which differences are more than noise."""
    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    how = {
        "--text": text, "--seqlen": seqlen, "--windows": windows, "--bos": bos, "--against": against, "--tasks": tasks,
        "--limit": limit, "--device": device, "--dtype": dtype,
    }  # fmt: skip

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.evaluate.compare import compare as table

        given = [option for option, value in how.items() if value]
        if given and not evaluate:
            raise UsageError(_NOT_EVALUATED.format(given[0]))
        if evaluate:
            original = None if against is None else model_of(against, screen)
            options = {
                "texts": text or (), "seqlen": seqlen, "windows": windows, "bos": bos or "auto", "tasks": names,
                "limit": limit, "device": device_of(device), "dtype": dtype,
            }  # fmt: skip
            _evaluate(models, original, options, screen)
        return table([model_of(model, screen) for model in models], sort=sort, observer=screen.observe)

    run(work, _markdown if markdown else drawn, as_json=as_json, debug=debug)


def _evaluate(models: Sequence[str], original: str | None, options: Mapping[str, Any], screen: Screen) -> None:
    from qexport.evaluate.loading import is_same_model
    from qexport.evaluate.run import evaluate

    for number, model in enumerate((model_of(model, screen) for model in models), 1):
        screen.observe(Note(f"{model} ({number} of {len(models)})"))
        against = None if original is None or is_same_model(model, original) else original
        texts = options["texts"] or (("builtin",) if original is not None or not options["tasks"] else ())
        evaluate(model, **{**options, "texts": texts}, against=against, reuse=True, observer=screen.observe)


# ---- tables ------------------------------------------------------------------------------------


def drawn(result: Mapping[str, Any]) -> Iterable[Table | str]:
    """The tables of a comparison, and what has to be said of them."""
    for title, heads, rows in _sheets(result):
        table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False)
        for head in heads:
            table.add_column(head, justify="left" if head == heads[0] else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        yield table
    yield from _notes(result)


def _markdown(result: Mapping[str, Any]) -> Iterable[Table | str]:
    for _, heads, rows in _sheets(result):
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        yield "\n".join([lines[0], "|---" + "|---:" * (len(heads) - 1) + "|", *lines[1:], ""])
    yield from _notes(result)


def _sheets(result: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, ...], Rows]]:
    """The figures, and what lies between them."""
    labels = [column["label"] for column in result["columns"]]
    figures: Rows = [
        (
            row["name"] + (" (original)" if row["original"] else ""), _number(row["bits_per_weight"], ".3f"),
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f} MB",
            *(_figure(row["figures"].get(label)) for label in labels),
        )
        for row in result["rows"]
    ]  # fmt: skip
    yield "models", ("model", "bits per weight", "size", *labels), figures
    pairs: Rows = [
        (row["name"], label, _pair(found["to_original"]), "the best" if found["is_best"] else _pair(found["to_best"]))
        for label in labels
        for row in result["rows"]
        if (found := row["figures"].get(label)) and (found.get("to_original") or found.get("to_best"))
    ]
    if pairs:
        yield "paired differences, 95 %", ("model", "figure", "to the original", "to the best"), pairs


def _figure(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "" if found is None else "not comparable"
    mark = " *" if found["is_best"] else ""
    if found["to_best"] and found["to_best"]["verdict"] == "not distinguishable":
        mark = " ~"
    bounds = "" if found["interval"] is None else " [{}, {}]".format(*(_number(x) for x in found["interval"]))
    return f"{_number(found['value'])}{bounds}{mark}"


def _pair(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    sign = "x " if found["kind"] == "ratio" else ""
    form = ".4f" if found["kind"] == "ratio" else "+.4f"
    low, high = (_number(x, form) for x in found["interval"])
    return f"{sign}{_number(found['value'], form)} [{low}, {high}] {found['verdict']}"


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _notes(result: Mapping[str, Any]) -> Iterable[str]:
    if not result["columns"]:
        yield "Nothing is recorded of these models. `qexport eval` measures one, --eval all of them."
        return
    yield (
        "In brackets: 95 % intervals, by a bootstrap over windows or documents. * the best, ~ not distinguishable from "
        "it; the original does not take part."
    )
    for row in result["rows"]:
        for label, found in row["figures"].items():
            if found.get("reason"):
                yield f"{row['name']}, {label}: {found['reason']}"
