"""Small pieces of HTML; whatever comes from a file is escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qexport.reporting.draw import Picture, svg


@dataclass(frozen=True)
class Code:
    """Text that is shown as code."""

    text: str


def text(value: Any) -> str:
    """A cell: numbers with four digits, a dash for nothing."""
    if value is None or value == "":
        return "&ndash;"
    if isinstance(value, Code):
        return f"<code>{escape(value.text)}</code>"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, worse: Sequence[bool] = ()) -> str:
    """A table; columns whose name ends with `>` are numbers. Rows that are `worse` are grey."""
    numbers = [' class="n"' if name.endswith(">") else "" for name in columns]
    head = "".join(f"<th{n}>{escape(name.rstrip('>'))}</th>" for name, n in zip(columns, numbers, strict=True))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{n}>{text(cell)}</td>" for cell, n in zip(row, numbers, strict=True))
        body.append(f'<tr class="worse">{cells}</tr>' if i < len(worse) and worse[i] else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def facts(rows: Mapping[str, Any]) -> str:
    """A table of names and values."""
    lines = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{text(value)}</td></tr>' for key, value in rows.items())
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def tiles(rows: Sequence[tuple[str, str | None, str]]) -> str:
    """Large figures: what, the figure or None, and a line on it."""
    found = []
    for what, figure, note in rows:
        shown, empty = (figure, "") if figure is not None else ("not measured", ' class="none"')
        found.append(f"<li{empty}><span>{escape(what)}</span><b>{escape(shown)}</b><span>{escape(note)}</span></li>")
    return f'<ul class="tiles">{"".join(found)}</ul>'


def figure(picture: Picture, prefix: str) -> str:
    """A picture with its title and what to read from it."""
    caption = f"<figcaption><b>{escape(picture.title)}</b>{escape(picture.reading)}</figcaption>"
    return f'<figure id="{prefix}{picture.name}">{caption}{svg(picture, prefix)}</figure>'


def details(summary: str, content: str) -> str:
    """What is folded away."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def missing(title: str, why: str) -> str:
    """What would be here, and what to do for it."""
    return f'<div class="missing"><b>{escape(title)}</b>: {escape(why)}</div>'


def page(title: str, style: str, content: str) -> str:
    """A whole document that needs no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{content}\n</main></body></html>\n"
    )
