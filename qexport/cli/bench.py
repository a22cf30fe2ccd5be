"""`qexport bench`: its arguments, and which of its two modes they mean."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qexport.cli import options as o
from qexport.cli import tables
from qexport.cli.request import folder_of, kv_pairs_of, model_of, pairs_of
from qexport.cli.screen import Screen, run
from qexport.devices import device_of
from qexport.errors import UsageError
from qexport.recipe import format_settings

if TYPE_CHECKING:
    from qexport.formats.base import Format


def bench(
    directory: Annotated[
        str | None, typer.Argument(metavar="DIR", help="A folder that `qexport quantize` wrote.", show_default=False)
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens that are read first; default: 512, or what the context holds.", min=1)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that are then generated; default: 32.", min=1)] = None,
    dense: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another dense model than the decoded weights.")
    ] = None,
    kv: o.Kv = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.png", help="Draw the roofline of the linears.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NxK", help="Instead of DIR: one random linear, n outputs of k inputs.")
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="Of the random linear; default: uniform.", autocompletion=o.complete_format),
    ] = None,
    bits: o.Bits = None,
    rows: Annotated[
        int | None, typer.Option("-m", help="Rows of input of the random linear; default: 1.", min=1)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", help="An option: of DIR's cache, kv.KEY=VALUE, or of --format.", metavar="KEY=VALUE"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: as many as torch takes.", min=1)] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="Try the loop of one compiled graph a token too (a minute).")
    ] = True,
    backend: o.Backend = "auto",
    device: o.EvalDevice = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Time a checkpoint, or one linear (--shape), against dense float32, bfloat16 and float16 in one run."""
    model = {"--prompt": prompt, "--tokens": tokens, "--dense": dense, "--kv": kv, "-o": out}
    linear = {"--format": format_name, "--bits": bits, "-m": rows}

    def work(screen: Screen) -> dict[str, Any]:
        if (directory is None) == (shape is None):
            raise UsageError("say what to time: DIR, a folder of `qexport quantize`, or --shape NxK, one of them.")
        for option, value in (linear if shape is None else model).items():
            if value is not None:
                raise UsageError(f"{option} goes with {'--shape' if shape is None else 'DIR'}.")
        place = device_of(device)
        if shape is not None:
            from qexport.evaluate.kernel import bench_kernel

            fmt = _format(format_name or "uniform", bits, settings or ())
            size = _size(shape)
            return bench_kernel(fmt, size, m=rows or 1, threads=threads, device=place, dtype=dtype, backend=backend)
        from qexport.evaluate import bench as b

        assert directory is not None
        setting = b.Setting(
            prompt, tokens or b.TOKENS, place, dtype, backend, kv, kv_pairs_of(settings or ()),
            None if dense is None else model_of(dense, screen), compiled=compiled,
        )  # fmt: skip
        return b.bench(folder_of(directory), setting, threads=threads, picture=out, observer=screen.observe)

    run(work, tables.bench if shape is None else tables.kernel, as_json=as_json, debug=debug)


def _size(text: str) -> tuple[int, int]:
    """The n and k of `--shape`; raises `UsageError`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if found is None:
        raise UsageError(f"--shape {text!r}: expected NxK, outputs and inputs, for example 4096x14336.")
    return int(found[1]), int(found[2])


def _format(name: str, bits: int | None, settings: Sequence[str]) -> "Format":
    """The format of `--format`, `--bits` and `-s`; raises `UsageError` for what it does not have."""
    from qexport.formats.specs import make_format

    options = {**({} if bits is None else {"bits": bits}), **pairs_of(settings)}
    return make_format(name, format_settings(name, options))
