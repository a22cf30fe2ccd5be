"""The command line: parse, call one function, draw what it tells. No logic, and nothing heavy until a command runs.

Results go to stdout, as tables or with `--json` as one document; all else goes to stderr. Exit codes: 0 done, 1 a
stated error, 2 usage.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qexport import __version__
from qexport.cli import bench, chat, compare, report, sweep, tables
from qexport.cli import options as o
from qexport.cli.request import Request, folder_of, kv_pairs_of, model_of, pairs_of, run_plan, run_quantize
from qexport.cli.screen import Screen, run
from qexport.devices import device_of
from qexport.errors import UsageError

app = typer.Typer(
    name="qexport",
    help="Quantize Hugging Face language models into packed safetensors; load, measure and publish them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qexport {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: o.Model = None,
    method: o.Method = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="DIR", help="Default: ./<model>-<recipe>-<bits>b.")
    ] = None,
    recipe: o.RecipeFile = None,
    format_name: o.FormatName = None,
    input_name: o.InputName = None,
    transforms: o.Transforms = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    lm_head: o.LmHead = None,
    embeddings: o.Embeddings = None,
    ignore: o.Ignore = None,
    overrides: o.Override = None,
    settings: o.Setting = None,
    kv: o.KvName = None,
    calibration: o.Calibration = None,
    samples: o.Samples = 128,
    seqlen: o.Seqlen = 512,
    bos: o.Bos = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.JobDtype = "float32",
    revision: o.Revision = None,
    token: o.Token = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier job wrote here and begin anew.")
    ] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Quantize a model, one decoder layer in memory at a time. A killed job goes on where it stopped."""
    request = Request(
        model, method, recipe, format_name, input_name, transforms or (), bits, group_size, symmetric, lm_head,
        embeddings, ignore or (), overrides or (), settings or (), calibration, samples, seqlen, bos, seed, device,
        dtype, revision, token, kv,
    )  # fmt: skip
    run(
        lambda screen: run_quantize(request, screen, out=out, restart=restart),
        tables.quantized,
        as_json=as_json,
        debug=debug,
        interrupted="the same command goes on where this one stopped",
    )


@app.command()
def plan(
    model: o.Model = None,
    method: o.Method = None,
    recipe: o.RecipeFile = None,
    format_name: o.FormatName = None,
    input_name: o.InputName = None,
    transforms: o.Transforms = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    lm_head: o.LmHead = None,
    embeddings: o.Embeddings = None,
    ignore: o.Ignore = None,
    overrides: o.Override = None,
    settings: o.Setting = None,
    kv: o.KvName = None,
    calibration: o.Calibration = None,
    samples: o.Samples = 128,
    seqlen: o.Seqlen = 512,
    bos: o.Bos = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.JobDtype = "float32",
    revision: o.Revision = None,
    token: o.Token = None,
    reader: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="Also say whether it can be exported for: vllm, llama.cpp, or a target of `export`.",
            autocompletion=o.complete_reader,
        ),
    ] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Say what `quantize` would do: size, bits of each module, memory, time. Reads configuration and headers only."""
    request = Request(
        model, method, recipe, format_name, input_name, transforms or (), bits, group_size, symmetric, lm_head,
        embeddings, ignore or (), overrides or (), settings or (), calibration, samples, seqlen, bos, seed, device,
        dtype, revision, token, kv,
    )  # fmt: skip
    run(lambda screen: run_plan(request, screen, reader), tables.plan, as_json=as_json, debug=debug)


@app.command(name="eval")
def evaluate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A quantized folder, or a dense one.")],
    text: o.Texts = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a window; default: 2048, or the model's context.", min=2)
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: seqlen.", min=1)] = None,
    windows: Annotated[int | None, typer.Option(help="At most this many windows of each text.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Windows that run together; for GPUs.", min=1)] = 1,
    bos: o.EvalBos = "auto",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, for KL divergence and top-1 agreement.")
    ] = None,
    keep_logits: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Keep the original's logits on disk, up to 8 GB of them."),
    ] = True,
    tasks: o.Tasks = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many examples of each task.", min=1)] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; default: as the task says.", min=0)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what results.jsonl has already.")] = False,
    needle: Annotated[
        bool, typer.Option("--needle", help="Ask for facts hidden at all depths of texts of up to --seqlen tokens.")
    ] = False,
    kv: o.Kv = None,
    settings: Annotated[
        list[str] | None, typer.Option("-s", help="An option of the cache: kv.residual_window=0.", metavar="KEY=VALUE")
    ] = None,
    backend: o.Backend = "auto",
    cache_gb: o.CacheGb = 0.0,
    device: o.EvalDevice = None,
    dtype: o.Dtype = None,
    revision: o.Revision = None,
    token: o.Token = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Measure perplexity, fidelity to the original, and scores on tasks."""
    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.evaluate.run import evaluate as measure

        if not directory.strip():
            raise UsageError("the directory's name is empty.")
        if not names and any(option is not None for option in (tasks, include_path, limit, fewshot)):
            raise UsageError("--include-path, --limit and --fewshot go with --tasks, which needs at least one name.")
        original = None if against is None else model_of(against, screen)
        return measure(
            directory, texts=text or (), seqlen=seqlen, stride=stride, windows=windows, bos=bos, tasks=names,
            include_path=include_path, against=original, limit=limit, fewshot=fewshot, batch=batch, backend=backend,
            cache_gb=cache_gb, reuse=not again, keep_logits=keep_logits, device=device_of(device), dtype=dtype, kv=kv,
            kv_options=kv_pairs_of(settings or ()), needle=needle,
            revision=revision, token=token, observer=screen.observe,
        )  # fmt: skip

    kept = "texts and tasks that were finished are recorded, and are not measured again"
    run(work, tables.evaluation, as_json=as_json, debug=debug, interrupted=kept)


app.command()(bench.bench)
app.command()(compare.compare)
app.command()(report.report)
app.command()(sweep.sweep)
app.command()(chat.chat)


@app.command()
def inspect(
    directory: o.Checkpoint,
    backend: o.Backend = "auto",
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show what a checkpoint holds: bits by kind of module, formats, calibration, sizes, and how it would run here."""

    def work(_screen: Screen) -> dict[str, Any]:
        from qexport.report import inspect as describe

        return describe(folder_of(directory), backend=backend, device=device_of(device))

    run(work, tables.inspection, as_json=as_json, debug=debug)


@app.command()
def verify(directory: o.Checkpoint, as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """Check every byte of a checkpoint against its manifest, and every packed tensor against its format."""

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.verify import verify as check

        return check(folder_of(directory), observer=screen.observe)

    run(work, tables.verification, as_json=as_json, debug=debug)


@app.command(name="export")
def export_to(
    directory: o.Checkpoint,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="What for: compressed-tensors (or vllm), gptq, bitsandbytes, gguf (or llama.cpp), dense.",
            autocompletion=o.complete_target,
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="A folder that does not exist yet.")],
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the result with the other library and compare logits.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Of dense exports: float32 (exact, the default), bfloat16, float16.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", help="An option of the format: gptq version=v1, gguf others=Q8_0 ...", metavar="KEY=VALUE"),
    ] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write a checkpoint in another library's format, and prove it with that library."""

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.export import export

        options = pairs_of(settings or ()) | ({} if dtype is None else {"dtype": dtype})
        return export(folder_of(directory), to, folder_of(out), check=check, options=options, observer=screen.observe)

    run(work, tables.exported, as_json=as_json, debug=debug)


@app.command(name="import")
def import_from(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A compressed-tensors or GPTQ checkpoint, whoever made it.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="A folder that does not exist yet.")],
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Turn a checkpoint that another library packed into ours, number by number; nothing is rounded."""

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.export import adopt

        return adopt(folder_of(directory), folder_of(out), observer=screen.observe)

    run(work, tables.imported, as_json=as_json, debug=debug)


@app.command()
def push(
    directory: o.Checkpoint,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show everything that would be sent, and send nothing.")
    ] = False,
    token: o.Token = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Verify a checkpoint, write its model card and upload it. Safe to repeat."""

    def work(screen: Screen) -> dict[str, Any]:
        from qexport.hub import push as upload

        result: dict[str, Any] = upload(
            directory, repo, private=private, revision=revision, dry_run=dry_run, token=token, observer=screen.observe
        )
        return result

    run(work, tables.upload, as_json=as_json, debug=debug)


@app.command()
def methods(as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """List methods and recipes, and which formats each method works with."""

    def work(_screen: Screen) -> dict[str, Any]:
        from qexport.report import methods as table

        return table()

    run(work, tables.methods, as_json=as_json, debug=debug)


@app.command()
def formats(as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """List formats with their options and true bits, and which methods each works with."""

    def work(_screen: Screen) -> dict[str, Any]:
        from qexport.report import formats as table

        return table()

    run(work, tables.formats, as_json=as_json, debug=debug)


def main() -> None:
    """Entry point of `qexport` and `python -m qexport`."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
