"""What a figure draws can be read from it."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from harness.evidence import Bar
from harness.figures import COLUMNS, bar_panels, drawn_numbers, limits_figure


def numbers(figure, kind):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in drawn_numbers(figure)]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture
def axes():
    return Figure().subplots()


def test_lines_have_their_points_and_names(axes):
    axes.plot([1, 2, 3], [4.0, math.nan, 6.0], label="error")
    axes.plot([1, 2], [7, 8])
    axes.set_title("Curves", loc="left")
    found = numbers(axes.figure, "line")
    assert [(r["series"], r["x"], r["y"]) for r in found if r["x"] != 2] == [
        ("error", 1, 4), ("error", 3, 6), ("line 2", 1, 7),
    ]  # fmt: skip
    assert math.isnan(found[1]["y"])
    assert {row["panel"] for row in found} == {"Curves"}


def test_points_segments_bars_and_cells(axes):
    axes.scatter([1.0], [2.0], label="one")
    axes.vlines([3.0], 4.0, 5.0)
    axes.barh([0], [6.0], height=1.0)
    axes.imshow(np.array([[1.0, 2.0], [3.0, 4.0]]))
    axes.imshow(np.zeros((2, 2, 3)))
    figure = axes.figure
    assert [(r["series"], r["x"], r["y"]) for r in numbers(figure, "point")] == [("one", 1, 2)]
    (segment,) = numbers(figure, "segment")
    assert [segment[name] for name in ("x", "y", "x_end", "y_end")] == [3, 4, 3, 5]
    (bar,) = numbers(figure, "bar")
    assert (bar["x_end"] - bar["x"], bar["y_end"] - bar["y"]) == (6, 1)
    cells = {(row["x"], row["y"]): row["value"] for row in numbers(figure, "cell")}
    assert cells == {(0, 0): 1, (1, 0): 2, (0, 1): 3, (1, 1): 4}


def test_the_panels_of_a_figure_are_told_apart():
    figure = bar_panels({"first": [1.0, 2.0], "second": [3.0]})
    heights = [(row["panel"], row["y_end"]) for row in numbers(figure, "bar")]
    assert heights == [("first", 1.0), ("first", 2.0), ("second", 3.0)]
    (bar,) = numbers(limits_figure([Bar("a", 0.5, "<=", 1.0)]), "bar")
    assert bar["x_end"] == 0.5
