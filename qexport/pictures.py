"""Pictures, drawn by matplotlib into PNG files."""

from collections.abc import Sequence
from pathlib import Path


def heat_map(
    path: Path,
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Draw numbers from 0 to 1 as a map of colours with the numbers in it.

    Args:
        path: file to write, PNG.
        values: a row for each of `rows`, a number for each of `columns`.
        rows: their names, drawn from the top.
        columns: their names.
        title: above the map.
        row_label: what the rows are.
        column_label: what the columns are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 0.9 * len(columns), 1.6 + 0.6 * len(rows)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_label, ylabel=row_label)
    axes.set_title(title, fontsize="medium")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    figure.colorbar(image, ax=axes, label="score")
    FigureCanvasAgg(figure).print_png(path)
