"""The figures of one checkpoint. Each is None where there is nothing to draw."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from qexport.reporting.draw import FAINT, INK, PALETTE, Figure, Picture
from qexport.reporting.facts import Checkpoint, decibel, kinds, spread, table
from qexport.reporting.measure import INPUT_RANGE, WEIGHT_RANGE, Measured

_DENSE_KINDS = 6  # that a picture of bytes names; the rest is one bar
_EQUAL_BITS = 0.05  # what padding and shapes make of one setting
_BRIGHTEST = 0.97  # of the cells of a map are within its colours; a few very good ones would hide the others
Values = Mapping[str, float | None]


def noted(checkpoint: Checkpoint) -> dict[str, float | None]:
    """By module, the signal to noise ratio in dB by the errors that the job noted."""
    return {m.name: decibel(m.error) for m in checkpoint.modules}


def ratios(checkpoint: Checkpoint, measured: Measured | None) -> tuple[dict[str, float | None], str]:
    """By module, the signal to noise ratio in dB that is shown, and what it is of."""
    if measured is not None and measured.outputs:
        found = {name: decibel(entry["relative"]) for name, entry in measured.outputs.items()}
        return found, f"outputs on the original's own inputs, {measured.text['name']} text"
    of = "outputs on calibration text, noted by the job" if checkpoint.calibrated else "weights, noted by the job"
    return noted(checkpoint), of


def pictures(checkpoint: Checkpoint, measured: Measured | None) -> list[Picture]:
    """All figures of a checkpoint that there is something for."""
    values, of = ratios(checkpoint, measured)
    found = [sizes(checkpoint), bits(checkpoint), heat(checkpoint, values, of), by_kind(checkpoint, values, of)]
    if measured is not None:
        found += [states(measured), weights(measured), inputs(measured), outliers(measured)]
    return [picture for picture in found if picture is not None]


# ---- what is stored ----------------------------------------------------------------------------


def sizes(checkpoint: Checkpoint) -> Picture:
    """Bytes by kind of module, packed and not."""
    rows: list[tuple[str, float, str]] = []
    for kind in kinds(checkpoint.modules):
        own = [m for m in checkpoint.modules if m.kind == kind]
        nbytes = sum(m.nbytes for m in own)
        rows.append((kind, nbytes / 1e6, f"{8 * nbytes / sum(m.weights for m in own):.2f} bits"))
    dense = sorted(checkpoint.dense.items(), key=lambda item: -item[1])
    rest = sum(nbytes for _, nbytes in dense[_DENSE_KINDS:])
    tail = [("all other tensors", rest)] if rest else []
    rows += [(kind, nbytes / 1e6, "dense") for kind, nbytes in dense[:_DENSE_KINDS] + tail]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        colours = [FAINT if text == "dense" else PALETTE[0] for _, _, text in rows]
        bars = axes.barh(range(len(rows)), [size for _, size, _ in rows], color=colours)
        axes.bar_label(bars, [f"{size:.3g} MB, {text}" for _, size, text in rows], color=INK, padding=4)
        axes.set_yticks(range(len(rows)), [kind for kind, _, _ in rows])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("stored bytes of all layers, MB")

    return Picture(
        "bytes",
        "Where the bytes are",
        "Blue is packed, with its stored bits a weight; grey stays as it was. What is long and grey is where packing "
        "more would save most.",
        (8.5, 0.9 + 0.32 * len(rows)),
        draw,
    )


def bits(checkpoint: Checkpoint) -> Picture | None:
    """Stored bits by layer and kind, where they are not the same everywhere."""
    names, layers, cells = table(checkpoint.modules, {m.name: m.bits for m in checkpoint.modules})
    flat = [cell for row in cells for cell in row if cell is not None]
    if not flat or max(flat) - min(flat) < _EQUAL_BITS:
        return None
    return _map(
        "bits",
        "Bits by module",
        "Stored bits a weight, everything counted: where the budget went.",
        (names, layers, cells),
        "bits a weight",
    )


# ---- errors ------------------------------------------------------------------------------------


def heat(checkpoint: Checkpoint, values: Values, of: str) -> Picture | None:
    """Signal to noise ratio by layer and kind."""
    names, layers, cells = table(checkpoint.modules, values)
    if not names:
        return None
    return _map(
        "errors",
        "Error by layer and kind of module",
        f"Signal to quantization noise ratio (SQNR), {of}. Dark is worse; 10 dB more is a tenth of the squared error. "
        "Dark rows are kinds, dark columns layers that deserve more bits.",
        (names, layers, cells),
        "SQNR, dB",
    )


def _map(name: str, title: str, reading: str, data: tuple[Sequence[str], Sequence[int], Any], unit: str) -> Picture:
    names, layers, cells = data

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        numbers = [[nan if cell is None else cell for cell in row] for row in cells]
        known = sorted(cell for row in cells for cell in row if cell is not None)
        top = known[int(_BRIGHTEST * (len(known) - 1))]
        image = axes.imshow(numbers, vmax=top, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(names)), names)
        step = -(-len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), layers[::step])
        axes.grid(visible=False)
        axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes, pad=0.01, extend="max" if top < known[-1] else "neither")
        bar.set_label(unit, labelpad=8)

    return Picture(name, title, reading, (8.5, 1.0 + 0.32 * len(names)), draw)


def by_kind(checkpoint: Checkpoint, values: Values, of: str) -> Picture | None:
    """Range of the ratio by kind."""
    found = spread(checkpoint.modules, values)
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, (low, mean, high) in enumerate(found.values()):
            axes.plot([low, high], [y, y], color=PALETTE[0], linewidth=4, alpha=0.4, solid_capstyle="round")
            axes.plot([mean], [y], "o", color=PALETTE[0])
            axes.annotate(f"{mean:.1f}", (mean, y), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.7)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("SQNR, dB (more is better)")

    return Picture(
        "kinds",
        "Error by kind of module",
        f"Mean over layers, and from the worst layer to the best; SQNR, {of}. A long bar is a kind that differs much "
        "from layer to layer.",
        (8.5, 0.9 + 0.38 * len(found)),
        draw,
    )


def states(measured: Measured) -> Picture | None:
    """How far the hidden states drift apart."""
    if not measured.states:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        layers = [s["layer"] for s in measured.states]
        axes.plot(
            layers, [decibel(s["relative"]) or nan for s in measured.states], "o-", color=PALETTE[0], markersize=4
        )
        axes.set(xlabel="after layer", ylabel="SQNR, dB")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Picture(
        "states",
        "What the errors add up to",
        "Hidden states of the checkpoint against the original's, each on its own way through the model. Where the line "
        "falls, a layer added much; a rise means that the states themselves grew.",
        (8.5, 3.0),
        draw,
    )


# ---- distributions -----------------------------------------------------------------------------


def weights(measured: Measured) -> Picture | None:
    """Histograms of weights by kind."""
    return _distributions(
        "weights",
        "Weights before and after",
        "Share of weights by their size, in multiples of the root mean square of their own module, all layers "
        "together. Orange is what is stored, after any scaling or rotation: where it leaves the blue area, a transform "
        "or clipping did that; teeth are the codes themselves. The outermost bins hold all that lies beyond.",
        measured.weights,
        (-WEIGHT_RANGE, WEIGHT_RANGE),
        "weight / root mean square",
    )


def inputs(measured: Measured) -> Picture | None:
    """Histograms of inputs by what reads them."""
    return _distributions(
        "inputs",
        "Activations before and after",
        "Inputs of linears by their size, both axes logarithmic. Orange is what the packed linear multiplies: scaled, "
        "rotated and rounded if the recipe says so. The further a curve reaches to the right, the worse its outliers. "
        "The outermost bins hold all that lies beyond.",
        measured.inputs,
        INPUT_RANGE,
        "|input| / root mean square",
        logarithmic=True,
    )


def _distributions(
    name: str,
    title: str,
    reading: str,
    data: Mapping[str, Mapping[str, Sequence[float]]],
    limits: tuple[float, float],
    unit: str,
    *,
    logarithmic: bool = False,
) -> Picture | None:
    if not data:
        return None
    across = 4 if len(data) > 4 else min(2, len(data))  # few may have long names
    down = -(-len(data) // across)
    lowest = min(share for sides in data.values() for shares in sides.values() for share in shares if share)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (kind, sides) in zip(grid, data.items(), strict=False):
            x = _middles(limits, len(sides["before"]), logarithmic)
            before, after = ([share or nan for share in sides[side]] for side in ("before", "after"))
            axes.fill_between(x, before, lowest / 2, color=PALETTE[0], alpha=0.35, linewidth=0, label="before")
            axes.plot(x, after, color=PALETTE[1], linewidth=1.2, label="after")
            axes.set(
                yscale="log", ylim=(lowest / 2, 1), title=_short(kind), **({"xscale": "log"} if logarithmic else {})
            )
        for axes in grid[len(data) :]:
            axes.set_visible(False)
        figure.supxlabel(unit, fontsize=10)
        figure.supylabel("share", fontsize=10)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)

    return Picture(name, title, reading, (8.5, 0.9 + 1.9 * down), draw)


def _middles(limits: tuple[float, float], bins: int, logarithmic: bool) -> list[float]:
    """Middles of equal bins, or the powers of ten that they are exponents of."""
    step = (limits[1] - limits[0]) / bins
    middles = [limits[0] + (i + 0.5) * step for i in range(bins)]
    return [10**m for m in middles] if logarithmic else middles


def _short(kind: str, most: int = 34) -> str:
    return kind if len(kind) <= most else kind[: most - 1] + "…"


def outliers(measured: Measured) -> Picture | None:
    """Largest inputs by layer and feature."""
    data = measured.outliers
    if not data:
        return None

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        grid = figure.subplots(len(data), 2, sharex=False, sharey=True, squeeze=False)
        highest = max(max(map(max, rows)) for sides in data.values() for rows in sides.values())
        norm = LogNorm(1, max(highest, 10))
        image = None
        for line, (kind, sides) in zip(grid, data.items(), strict=True):
            for axes, side in zip(line, ("before", "after"), strict=True):
                rows = sides.get(side, [])
                if rows:
                    clipped = [[max(v, 1.0) for v in row] for row in rows]
                    image = axes.imshow(clipped, norm=norm, cmap="cividis", aspect="auto", interpolation="nearest")
                axes.set_title(f"{_short(kind)}, {side}")
                axes.set_xticks([])
                axes.grid(visible=False)
        figure.supxlabel("feature (each column the largest of its neighbours)", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        figure.colorbar(image, ax=grid, pad=0.01).set_label("largest |input| / root mean square", labelpad=8)

    return Picture(
        "outliers",
        "Where the outliers are",
        "Largest input of each feature over the text. Bright vertical lines are features that are large in every "
        "layer: they decide the scale of inputs that are rounded. A recipe that scales or rotates should make the "
        "right side even.",
        (8.5, 0.8 + 1.7 * len(data)),
        draw,
    )
