"""Names of points that lie close together can all be read."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qexport.reporting.labels import name_points


def _named(points: list[tuple[float, float, str, str]]) -> tuple[Any, list[Any]]:
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([x for x, *_ in points], [y for _, y, *_ in points], "o")
    axes.margins(x=0.2, y=0.15)
    name_points(axes, points)
    figure.draw_without_rendering()
    return axes, axes.texts


def test_names_of_a_crowd_hide_neither_each_other_nor_points_and_stay_inside() -> None:
    rng = torch.Generator().manual_seed(0)
    crowd = [(float(x), float(y)) for x, y in torch.rand(12, 2, generator=rng) * 0.2 + 5]
    points = [(x, y, f"method-{i}-4b-g{2**i}", "black") for i, (x, y) in enumerate([*crowd, (0.0, 9.0), (10.0, 0.0)])]
    axes, texts = _named(points)
    assert [text.get_text() for text in texts] == [name for _, _, name, _ in points]
    boxes = [type(text).__mro__[1].get_window_extent(text) for text in texts]  # without the lines that lead to them
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform((x, y))) for box in boxes for x, y, *_ in points)
    assert all(axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1) for box in boxes)


def test_a_name_with_room_is_beside_its_point_without_a_line() -> None:
    _, texts = _named([(0.0, 0.0, "first", "black"), (1.0, 1.0, "second", "black")])
    assert [text.arrow_patch for text in texts] == [None, None]
    assert all(text.xyann == (7, 5) for text in texts)
