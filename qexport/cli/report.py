"""`qexport report`: its arguments, and what it prints of a page that it wrote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qexport.cli import options as o
from qexport.cli.called import called
from qexport.cli.request import folder_of, model_of
from qexport.cli.screen import Screen, run
from qexport.devices import device_of


def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders that `qexport quantize` wrote; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE.html", help="Default: report.html in DIR, here if there are several."
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What they were made from, to compare weights and activations with; default: the model that DIR "
            "names, if it is in the Hub's cache.",
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write each picture as FILE-<name>.png too.")] = False,
    text: Annotated[
        str,
        typer.Option(help="What both models read: a file, builtin, wikitext2 or c4.", autocompletion=o.complete_text),
    ] = "builtin",
    samples: Annotated[int, typer.Option(help="Sequences that both models read.", min=1)] = 4,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.", min=2)] = 256,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write one page with figures and tables of a checkpoint, or of several side by side."""

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.reporting import Request, Sample
        from qexport.reporting import report as write

        folders = [folder_of(directory) for directory in directories]
        source = None if original is None else model_of(original, screen)
        sample = Sample(text, samples, seqlen)
        request = Request(folders, out, source, sample, png, device_of(device), called())
        return write(request, observer=screen.observe)

    run(work, _drawn, as_json=as_json, debug=debug)


def _drawn(result: Mapping[str, Any]) -> Iterator[str]:
    for found in result["checkpoints"]:
        how = "compared with the original" if found["measured"] else "not compared with the original"
        yield f"{found['label']}: {found['bits_per_weight']:.3f} bits a weight, {found['bytes'] / 1e6:.1f} MB, {how}"
    yield from (f"picture: {path}" for path in result["pictures"])
    yield f"page: {result['out']}"
