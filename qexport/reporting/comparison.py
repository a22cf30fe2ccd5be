"""The figures of several checkpoints side by side, and which of them no other beats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

from qexport.reporting.draw import DASHES, FAINT, INK, MARKERS, PALETTE, Figure, Picture
from qexport.reporting.facts import Checkpoint, decibel, table
from qexport.reporting.figures import Values, ratios
from qexport.reporting.labels import name_points
from qexport.reporting.measure import Measured
from qexport.reporting.results import shared

_MOST_LINES = len(PALETTE)
_TITLES = {"fidelity": "KL to the original in nats", "perplexity": "perplexity"}  # of both less is better


@dataclass(frozen=True)
class Quality:
    """A figure by which checkpoints are compared.

    Attributes:
        what: its kind, as in results.jsonl.
        title: what it is, for an axis.
        how: the protocol.
        values: one for each checkpoint; None where it was not measured so.
        errors: their standard errors.
    """

    what: str
    title: str
    how: str
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]


def qualities(checkpoints: Sequence[Checkpoint]) -> list[Quality]:
    """All figures that two or more checkpoints have by one protocol; KL to the original first, then perplexity."""
    found = []
    for results in shared([c.results for c in checkpoints]):
        known = next(r for r in results if r is not None)
        title = f"{_TITLES.get(known.what, known.what)}, {known.name}"
        values = tuple(None if r is None else r.figure for r in results)
        errors = tuple(None if r is None else r.se for r in results)
        found.append(Quality(known.what, title, known.how, values, errors))
    return found


def judge(checkpoints: Sequence[Checkpoint]) -> Quality | None:
    """The figure that decides, of which less is better; None where none is shared."""
    return next((q for q in qualities(checkpoints) if q.what in _TITLES), None)


def dominated(sizes: Sequence[int], values: Sequence[float | None]) -> list[bool]:
    """Whether another checkpoint is at most as large and at least as good, and better in one of both."""
    found = []
    for i, (size, value) in enumerate(zip(sizes, values, strict=True)):
        others = [(s, v) for j, (s, v) in enumerate(zip(sizes, values, strict=True)) if j != i and v is not None]
        found.append(value is not None and any(s <= size and v <= value and (s < size or v < value) for s, v in others))
    return found


def pareto(checkpoints: Sequence[Checkpoint], measure: Quality | None) -> Picture | None:
    """Quality against bytes, and the ones that no other beats joined by a line."""
    if measure is None:
        return None
    sizes = [c.about["bytes"] for c in checkpoints]
    beaten = dominated(sizes, measure.values)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        points = [
            (size / 1e6, value, measure.errors[i] or 0.0, checkpoints[i].label, beaten[i])
            for i, (size, value) in enumerate(zip(sizes, measure.values, strict=True))
            if value is not None
        ]
        best = sorted((x, y) for x, y, _, _, worse in points if not worse)
        axes.plot(*zip(*best, strict=True), color=PALETTE[0], linewidth=1, linestyle="--")
        for x, y, error, _, worse in points:
            colour = FAINT if worse else PALETTE[0]
            axes.errorbar(x, y, yerr=1.96 * error or None, fmt="o", color=colour, capsize=3)
        values = [y for _, y, _, _, _ in points]
        if min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.set(xlabel="size of the weight files, MB", ylabel=measure.title)
        ordered = sorted(points, key=lambda p: (p[4], p[0]))  # those that no other beats choose their places first
        name_points(axes, [(x, y, label, FAINT if worse else INK) for x, y, _, label, worse in ordered])

    return Picture(
        "pareto",
        "Quality against bytes",
        "Less is better on both axes. Blue: no other checkpoint is both smaller and better; grey: another one is at "
        "most as large and at least as good. Bars are 95 % intervals where a standard error is known. "
        f"Protocol: {measure.how}.",
        (8.5, 4.4),
        draw,
    )


def layers(checkpoints: Sequence[Checkpoint], measured: Sequence[Measured | None]) -> Picture | None:
    """Error by layer, a line for each checkpoint: of hidden states, else of linears; None if of different things."""
    names = [c.label for c in checkpoints]
    known = [own.states for own in measured if own is not None and own.states]
    if len(known) == len(checkpoints):
        means = [{s["layer"]: decibel(s["relative"]) for s in found} for found in known]
        of = "hidden states after each layer against the original's: what the errors so far have added up to"
        return _lines(dict(zip(names, means, strict=True)), of, "SQNR of hidden states, dB")
    values, kinds = zip(*(ratios(c, own) for c, own in zip(checkpoints, measured, strict=True)), strict=True)
    if len(set(kinds)) > 1:
        return None
    means = [_means(c, own) for c, own in zip(checkpoints, values, strict=True)]
    return _lines(dict(zip(names, means, strict=True)), f"{kinds[0]}, mean over linears", "SQNR of linears, dB")


def _means(checkpoint: Checkpoint, values: Values) -> dict[int, float | None]:
    _, numbers, cells = table(checkpoint.modules, values)
    columns = ([cell for cell in column if cell is not None] for column in zip(*cells, strict=True))
    return {n: sum(known) / len(known) if known else None for n, known in zip(numbers, columns, strict=True)}


def _lines(lines: Mapping[str, Mapping[int, float | None]], of: str, unit: str) -> Picture | None:
    if not all(lines.values()) or len(lines) > _MOST_LINES:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (label, means) in enumerate(lines.items()):
            style = {"color": PALETTE[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 4}
            axes.plot(list(means), [nan if v is None else v for v in means.values()], label=label, **style)
        axes.set(xlabel="layer", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper right", ncols=min(len(lines), 3))

    return Picture("layers", "Error by layer", f"Higher is better. Of {of}.", (8.5, 3.6), draw)
