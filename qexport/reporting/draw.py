"""How figures look: one style, as SVG whose text and colours belong to the page, or as PNG on white.

Colours of text and lines are written into the SVG as CSS variables, so that a page decides whether it is dark. The
palette is that of Okabe and Ito, which people who see few colours can tell apart; lines differ by dashes too.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

Figure: TypeAlias = Any  # matplotlib is imported when something is drawn
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP*X"
INK, GRID, FAINT = "#14181f", "#d3d8df", "#6b7480"
_VARIABLES = {
    INK: "currentColor",
    GRID: "var(--line)",
    FAINT: "var(--faint)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "qexport", "font.size": 10, "axes.titlesize": 10,
    "axes.titleweight": "bold", "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "lines.linewidth": 1.6,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure with what is said about it.

    Attributes:
        name: short, for files and anchors.
        title: above it.
        reading: what to read from it, a sentence or two.
        size: width and height in inches.
        draw: fills an empty matplotlib figure of that size.
    """

    name: str
    title: str
    reading: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def svg(picture: Picture, prefix: str) -> str:
    """An `<svg>` element for a page: no ids that another figure has, no colour that a dark page could not show."""
    data = io.StringIO()
    _print(picture, data, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = data.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"(font: (?:[a-z]+ )?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}{picture.name}-", text)
    head = f'<svg role="img" aria-label="{escape(picture.title)}" '
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'{head}viewBox="\1" xmlns:xlink="{_XLINK}">', text, count=1)


_XLINK = "http://www.w3.org/1999/xlink"


def png(picture: Picture, path: Path) -> None:
    """A file of the figure on white."""
    with path.open("wb") as file:
        _print(picture, file, "png", facecolor="white", dpi=150)


def _print(picture: Picture, target: Any, kind: str, **options: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    with rc_context(_STYLE):
        figure = MplFigure(figsize=picture.size, layout="constrained")
        FigureCanvasAgg(figure)
        picture.draw(figure)
        figure.savefig(target, format=kind, **options)
