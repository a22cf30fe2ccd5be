"""Pictures, drawn by matplotlib into PNG files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARKERS = "osD^vP*X<>hp"
_COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange")
_STEP = 1.03  # from one kind to the next, so that points don't hide each other


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


@dataclass(frozen=True)
class Point:
    """A product in a roofline.

    Attributes:
        kind: what is multiplied by, has a marker of its own.
        side: how, has a colour of its own.
        intensity: operations per byte.
        gflops: 1e9 operations per second.
    """

    kind: str
    side: str
    intensity: float
    gflops: float


def roofline(path: Path, points: Sequence[Point], *, read_gbps: float, gflops: Mapping[str, float], title: str) -> None:
    """Draw products under the roofs of their machine, both axes logarithmic; kinds of one side lie side by side.

    Args:
        path: file to write, PNG.
        points: the products.
        read_gbps: bandwidth, 1e9 bytes per second: the slanted roof.
        gflops: rates of products by dtype, 1e9 operations per second: the level roofs.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    top = max(gflops.values())
    least, most = min(p.intensity for p in points) / 2, 2 * max(top / read_gbps, *(p.intensity for p in points))
    for (name, rate), style in zip(gflops.items(), ("-", "--", ":", "-."), strict=False):
        label = f"products in {name}, {rate:.0f} GFLOP/s"
        axes.plot([rate / read_gbps, most], [rate, rate], color="black", linestyle=style, label=label)
    axes.plot([least, top / read_gbps], [least * read_gbps, top], color="grey", label=f"read, {read_gbps:.1f} GB/s")
    kinds, sides = ({getattr(p, key): None for p in points} for key in ("kind", "side"))
    marker = {kind: _MARKERS[i % len(_MARKERS)] for i, kind in enumerate(kinds)}
    colour = {side: _COLOURS[i % len(_COLOURS)] for i, side in enumerate(sides)}
    for p in points:
        x = p.intensity * _STEP ** (list(kinds).index(p.kind) - (len(kinds) - 1) / 2)
        axes.scatter(x, p.gflops, marker=marker[p.kind], color=colour[p.side], alpha=0.75, linewidths=0)
    for side in sides:
        axes.scatter([], [], marker="s", color=colour[side], label=side)
    for kind in kinds:
        axes.scatter([], [], marker=marker[kind], color="black", label=kind)
    axes.set(xscale="log", yscale="log", xlim=(least, most), xlabel="operations per byte", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    axes.set_title(title, fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small")
    FigureCanvasAgg(figure).print_png(path)
