"""Names beside points of a figure, put where they hide nothing: near their point, or farther off on a thin line."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import cos, pi, sin
from typing import Any

from qexport.reporting.draw import GRID, Figure

_NEAR = ((7, 5), (7, -12), (-7, 5), (-7, -12))  # points to the right and left of a point, above and below
_RADII, _ANGLES = (26, 44, 64, 88, 116, 148), 16
_MARKER = 5  # half the side of what a point covers

Box = tuple[float, float, float, float]  # left, bottom, right, top in points


def name_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names on finished axes, whose scales and limits are what they stay.

    Args:
        axes: matplotlib's.
        points: x, y, the name and its colour; earlier ones choose their places first.
    """
    figure: Figure = axes.figure
    figure.draw_without_rendering()
    unit = 72 / figure.dpi
    frame: Box = tuple(v * unit for v in axes.bbox.extents)
    places = [tuple(v * unit for v in axes.transData.transform((x, y))) for x, y, _, _ in points]
    taken: list[Box] = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in places]
    for (x, y, name, colour), (at_x, at_y) in zip(points, places, strict=True):
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", color=colour)
        extent = text.get_window_extent()
        width, height = extent.width * unit, extent.height * unit
        own = [(dx if dx > 0 else dx - width, dy) for dx, dy in _candidates()]
        boxes = [(at_x + dx, at_y + dy, at_x + dx + width, at_y + dy + height) for dx, dy in own]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box, frame) for box in boxes]
        best = min(range(len(own)), key=costs.__getitem__)  # of equal ones the nearest
        text.remove()
        line = {"arrowstyle": "-", "color": GRID, "shrinkA": 0, "shrinkB": 4} if best >= len(_NEAR) else None
        axes.annotate(name, (x, y), own[best], textcoords="offset points", color=colour, arrowprops=line)
        taken.append(boxes[best])


def _candidates() -> Iterable[tuple[float, float]]:
    """Offsets of a name's left or, to the left of its point, right end; the nearest first."""
    yield from _NEAR
    for radius, i in product(_RADII, range(_ANGLES)):
        angle = 2 * pi * (i + 0.5) / _ANGLES
        yield radius * cos(angle), radius * sin(angle) - 4


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    """Area of a box that lies outside a frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
