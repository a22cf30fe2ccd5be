"""Reference pages, from the code itself: options from dataclasses and their docstrings, stored tensors from layouts."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import resources
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qexport import plugins, report, schema
from qexport.cli import app
from qexport.formats.base import bits_per_weight
from qexport.formats.kv.base import make_kv
from qexport.recipe import recipe_names

EXAMPLE = (4096, 4096)
HEADS = (8, 128)
HEADINGS = {"caches": "Calibration of caches", "export": "What `export --to` writes"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))


def pages() -> dict[str, str]:
    """Markdown of each page, by name."""
    made = {
        "commands": _commands(),
        "recipes": _recipes(),
        "methods": _kinds("Methods, transforms, blocks", "methods", "transforms", "blocks", "caches"),
        "formats": _formats(),
        "inputs-and-caches": _inputs_and_caches(),
        "exports": _kinds("Exports", "export"),
    }
    return {name: "\n\n".join(parts) + "\n" for name, parts in made.items()}


# ---- what plugins say of themselves ------------------------------------------------------------


def _kinds(title: str, *kinds: str) -> Iterator[str]:
    yield f"# {title}"
    yield "Options are set with `-s KEY=VALUE`, or in a recipe's table."
    for kind in kinds:
        yield f"## {HEADINGS.get(kind, kind.capitalize())}"
        for name in plugins.names(kind):
            yield from _plugin(name, plugins.get(kind, name))


def _plugin(name: str, made: Any) -> Iterator[str]:
    yield f"### {name}"
    text, _ = _docstring(made)
    yield text
    if source := getattr(made, "source", ""):
        yield f"Source: {source}."
    yield _options(made)


def _options(made: Any, given: Any = None) -> str:
    """Table of a dataclass's options; `given` holds other defaults."""
    _, said = _docstring(made)
    rows = [
        (f"`{f.name}`", inspect.formatannotation(f.type), f"`{_default(f, given)!r}`", said.get(f.name, ""))
        for f in fields(made)
    ]
    return _table(("option", "type", "default", "meaning"), rows) if rows else "No options."


def _default(option: Any, given: Any) -> Any:
    if given is not None:
        return getattr(given, option.name)
    return option.default_factory() if option.default is MISSING else option.default


def _docstring(made: Any) -> tuple[str, dict[str, str]]:
    """What a class says before its attributes, and of each attribute."""
    text, _, attributes = (inspect.getdoc(made) or "").partition("\nAttributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", attributes, re.MULTILINE)
    return text.strip(), {name: " ".join(words.split()) for name, words in found}


# ---- formats, inputs, caches -------------------------------------------------------------------


def _formats() -> Iterator[str]:
    n, k = EXAMPLE
    yield "# Formats"
    yield f"Tensors and bits are those of an [n, k] = [{n}, {k}] matrix with default options, every tensor counted."
    for name in plugins.names("formats"):
        made = plugins.get("formats", name)
        yield from _plugin(name, made)
        yield f"Version {made.version}, {bits_per_weight(made(), n, k):.4g} bits a weight:"
        yield schema.markdown_table(made().layout(n, k))


def _inputs_and_caches() -> Iterator[str]:
    yield "# Inputs and caches"
    yield "## Inputs"
    yield "What `--input NAME` rounds the inputs of linears to."
    for name in plugins.names("inputs"):
        yield from _plugin(name, plugins.get("inputs", name))
    yield "## Caches"
    yield f"What `--kv NAME` stores keys and values as. Bits are those of layers with {HEADS[0]} heads of {HEADS[1]}."
    for name, entry in report.formats()["caches"].items():
        made = make_kv(name)
        bits = ", ".join(f"{length} tokens: {value:.3g}" for length, value in entry["bits"].items())
        yield f"### {name}"
        yield f"Format `{made.name}`, version {made.version}. Source: {made.source}. Bits a number: {bits}."
        yield _options(type(made), made)
        for side in ("keys", "values"):
            coder = getattr(made, side)
            yield f"A group of {coder.group} tokens of {side}:"
            yield schema.markdown_table(coder.layout(*HEADS))


# ---- recipes and commands ----------------------------------------------------------------------


def _recipes() -> Iterator[str]:
    yield "# Recipes"
    yield "What `--method NAME` means; `--recipe FILE` takes one of your own, written the same way."
    found = report.methods()["recipes"]
    yield _table(
        ("recipe", "bits", "tier", "summary"),
        [(f"[{n}](#{n})", f"{r['bits_per_weight']:.2f}", r["tier"], r["summary"]) for n, r in found.items()],
    )
    for name in recipe_names():
        text = (resources.files("qexport") / "recipes" / f"{name}.toml").read_text().strip()
        yield f"## {name}"
        yield f"```toml\n{text}\n```"


def _commands() -> Iterator[str]:
    yield "# Commands"
    yield "What `qexport COMMAND -h` prints."
    group: Any = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):
        context = command.make_context(f"qexport {name}", [], resilient_parsing=True)
        records = [record for p in command.params if (record := p.get_help_record(context))]
        yield f"## {name}"
        yield command.help
        yield f"    {' '.join([context.command_path, *command.collect_usage_pieces(context)])}"
        yield _table(("argument or option", "meaning"), [(f"`{names}`", text) for names, text in records])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
