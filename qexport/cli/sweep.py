"""`qexport sweep`: its arguments, its tables, and the page that ends it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qexport.cli import compare
from qexport.cli import options as o
from qexport.cli.called import called
from qexport.cli.request import model_of
from qexport.cli.screen import Screen, run
from qexport.devices import device_of
from qexport.errors import QExportError
from qexport.events import Note


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="Methods, bits and options: docs/sweep.md.")],
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only the settings with such names: 'gptq*-4b-*'.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made: bits, size, time.")] = False,
    sort: Annotated[
        str, typer.Option(help="bits, size, perplexity, kl, top1 or tasks.", autocompletion=o.complete_sort)
    ] = "perplexity",
    device: o.Device = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier sweep made of these settings and begin anew.")
    ] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Quantize and measure a grid of settings one after another, and compare them. A killed sweep goes on."""
    failed: list[str] = []

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.models import open_source
        from qexport.sweep import outlook, read_grid, selected
        from qexport.sweep import sweep as make

        found = read_grid(grid)
        settings, place = selected(found, only), device_of(device)
        model = model_of(found.model, screen)
        source = open_source(model, weights=not dry_run, observer=screen.observe)
        if dry_run:
            return outlook(found, settings, source, sort=sort)
        result = make(found, settings, source, sort=sort, device=place, restart=restart, observer=screen.observe)
        failed.extend(row["name"] for row in result["settings"] if row["failed"] is not None)
        return {**result, "report": _report(result, model, place, screen)}

    kept = "the same command goes on where this one stopped"
    run(work, _outlook if dry_run else _drawn, as_json=as_json, debug=debug, interrupted=kept)
    if failed:
        raise typer.Exit(1)


def _report(result: Mapping[str, Any], model: str, device: str, screen: Screen) -> str | None:
    """Write the page of `qexport report` beside the comparison; its name, or None with a note why there is none."""
    folders = [Path(row["folder"]) for row in result["settings"] if row["failed"] is None]
    if not folders:
        return None
    from qexport.reporting import Request, report

    request = Request(folders, Path(result["output"]) / "report.html", model, device=device, command=called())
    try:
        return str(report(request, observer=screen.observe)["out"])
    except QExportError as error:
        screen.observe(Note(f"report.html was not written: {error}", "warning"))
        return None


# ---- tables ------------------------------------------------------------------------------------


def _outlook(result: Mapping[str, Any]) -> Iterable[Table | str]:
    from qexport.sweep.clock import spelled

    table = Table(title=f"{result['model']} to {result['output']}", title_justify="left", show_edge=False)
    for head in ("setting", "bits per weight", "size", "memory", "time"):
        table.add_column(head, justify="left" if head == "setting" else "right", overflow="fold")
    for row in result["settings"]:
        table.add_row(
            row["name"], f"{row['bits_per_weight']:.3f}", f"{row['bytes'] / 1e6:,.1f} MB",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB", spelled(row["seconds"]),
        )  # fmt: skip
    yield table
    whole = spelled(sum(row["seconds"] for row in result["settings"]))
    yield f"{len(result['settings'])} settings, {whole}, as predicted; measuring them comes on top."


def _drawn(result: Mapping[str, Any]) -> Iterable[Table | str]:
    if result["comparison"] is not None:
        yield from compare.drawn(result["comparison"])
        for column in result["comparison"]["columns"]:
            yield f"{column['label']}: no other beats {', '.join(column['front'])} in both bytes and this figure."
    for row in result["settings"]:
        if row["failed"] is not None:
            yield f"{row['name']} failed: {row['failed']}"
        elif row["same_as"] is not None:
            yield f"{row['name']}: the same bytes as {row['same_as']}, which stands for it."
    yield f"results: {Path(result['output']) / 'comparison.json'}"
    if result["report"] is not None:
        yield f"page: {result['report']}"
