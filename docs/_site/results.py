"""The page of results: every line of benchmarks/results/*.jsonl, with the command that measures it again."""

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
MACHINE = {"versions", "python", "machine", "threads", "cpu", "gpu", "cores", "commit", "date"}
INTRODUCTION = (
    "Every figure that these documents state has a line in `benchmarks/results/`. Here are all lines, as tables that "
    "are made with the site, each with what measures it and how to run that again. They are in the order of writing "
    "and never edited: where two have the same setting, the later one is of later code."
)
LONGEST = 70  # signs in a cell


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the page."""
    files.append(File.generated(config, "results.md", content=page()))


def page() -> str:
    """The page's Markdown."""
    parts = ["---\nsearch: {exclude: true}\n---", "# Results", INTRODUCTION]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        parts += [f"## {path.stem}", _about(path.stem), *_tables(lines)]
    return "\n\n".join(parts) + "\n"


def _about(name: str) -> str:
    """First paragraph and commands of the benchmark of that name."""
    paragraphs = (ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())) or "").split("\n\n")
    return "\n\n".join([paragraphs[0], *(text for text in paragraphs if text.startswith("    "))])


def _tables(lines: list[dict[str, Any]]) -> list[str]:
    """A table for each machine and set of facts that lines state."""
    kinds: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault((_machine(line), tuple(sorted(set(line) - MACHINE))), []).append(line)
    return [f"On {machine}. {_table(facts, group)}" for (machine, facts), group in kinds.items()]


def _table(facts: tuple[str, ...], lines: list[dict[str, Any]]) -> str:
    """One row a line; what is equal in all of several lines, and nothing, has no column but stands above the table."""
    shared = {f: lines[0][f] for f in facts if len(lines) > 1 and all(line[f] == lines[0][f] for line in lines)}
    words = [f"{fact} {_cell(value)}" for fact, value in shared.items() if value not in (None, {}, [])]
    columns = [fact for fact in facts if fact not in shared]
    columns.sort(key=lambda fact: isinstance(lines[0][fact], int | float))  # what was set comes before what was found
    rows = [["date", "commit", *columns], ["---"] * (2 + len(columns))]
    for line in lines:
        found = (line.get("date", ""), line.get("commit") or "", *(line[fact] for fact in columns))
        rows.append([_cell(value) for value in found])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"In all lines: {'; '.join(words)}.\n\n{table}" if words else f"\n\n{table}"


def _machine(line: dict[str, Any]) -> str:
    if "cpu" not in line:
        return "a machine that was not noted"
    return f"{line.get('gpu') or line['cpu']}, {line['threads']} threads, torch {line['versions']['torch']}"


def _cell(value: Any) -> str:
    """A value in few signs; of a long one the beginning."""
    if isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    elif isinstance(value, list):
        text = " ".join(_cell(entry) for entry in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    else:
        text = f"{value}"
    text = text.replace("|", "\\|")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
