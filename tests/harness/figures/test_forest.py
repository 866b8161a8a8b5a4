import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from harness.evidence import Row
from harness.figures import differences_figure
from harness.figures.style import BLUE, GREEN, MUTED, ORANGE


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def marks_of(axes):
    """Return (value, edge color, filled) of every mark from top to bottom."""
    found = []
    for marks in axes.collections:
        ((x, _),) = marks.get_offsets()
        edge = to_rgb(marks.get_edgecolor()[0][:3])
        found.append((float(x), edge, np.allclose(marks.get_facecolor()[0][:3], edge)))
    return found


def test_differences_of_an_evaluation(rows, legible):
    figure = differences_figure(rows, sides={"error (K)": True, "hits": False})
    legible(figure)
    errors, hits = figure.axes
    assert errors.get_xlabel() == "← better    worse →\nerror (K)"
    assert hits.get_xlabel() == "← worse    better →\nhits"
    labels = [label.get_text() for label in errors.get_yticklabels()]
    methods = ["inverse distance", "optimal interpolation", "network, gated"]
    assert labels == ["10 % of the points", *methods, "1 % of the points", *methods]
    for axes, metric in ((errors, "error (K)"), (hits, "hits")):
        chosen = [row for row in rows if row.versus and row.metric == metric]
        good = [(row.value < 0) == (metric == "error (K)") for row in chosen]
        expected = [
            (row.value, to_rgb((GREEN if better else ORANGE) if row.significant else MUTED),
             row.significant)
            for row, better in zip(chosen, good, strict=True)
        ]  # fmt: skip
        assert marks_of(axes) == expected
    assert any("40 independent units" in text for text in texts_of(figure))
    row = next(row for row in rows if row.versus)
    numbers = f"{row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}]".replace("-", "−")
    assert numbers in texts_of(figure)


def test_significant_marks_are_filled_and_others_hollow():
    rows = [
        Row("a", "t", "m", 1.0, 0.5, 1.5, 20, "z", 0.01),
        Row("b", "t", "m", 1.0, 0.5, 1.5, 20, "z", 0.06),
        Row("c", "t", "m", 1.0, -0.5, 1.5, 20, "z", 0.01),
        Row("d", "t", "m", 1.0, math.nan, math.nan, 1, "z", 1.0),
        Row("e", "t", "other", 1.0, 0.5, 1.5, 20, "z", 0.01),
        Row("z", "t", "m", 9.0, 8.0, 10.0, 20),
    ]
    figure = differences_figure(rows, metrics=["m"])
    (axes,) = figure.axes
    filled, hollow = (1.0, to_rgb(BLUE), True), (1.0, to_rgb(MUTED), False)
    assert marks_of(axes) == [filled, hollow, hollow, hollow]
    assert "no interval" in texts_of(figure)
    both = differences_figure(rows)
    assert (len(both.axes), texts_of(both).count("–")) == (2, 5)


def test_references_are_named():
    rows = [Row("a", "t", "m", 1.0, 0.5, 1.5, 9, versus, 0.1) for versus in ("y", "z")]
    assert {"a − y", "a − z"} <= set(texts_of(differences_figure(rows)))
    assert any("minus y;" in text for text in texts_of(differences_figure(rows[:1])))


def test_rows_without_differences_are_refused(rows, refuses):
    refuses(
        ValueError,
        (
            "no row is a difference",
            lambda: differences_figure([row for row in rows if not row.versus]),
        ),
        ("no row is a difference", lambda: differences_figure(rows, metrics=["bias"])),
    )


def test_what_is_far_off_is_an_arrow_and_panels_without_a_figure_are_left_out(legible):
    rows = [
        *(Row(name, "t", "loss", 0.01 * n, 0.01 * n - 0.002, 0.01 * n + 0.002, 78, "home", 0.01)
          for n, name in enumerate("abcd", 1)),
        Row("base rates", "t", "loss", 0.7, 0.6, 0.8, 1697, "home", 0.01),
        Row("a", "t", "nothing", math.nan, versus="home"),
    ]  # fmt: skip
    figure = differences_figure(rows, sides={"loss": True}, units="users", title="A longer title")
    legible(figure)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low <= 0 < 0.042 < high < 0.1
    assert "+0.700 [+0.600, +0.800]" in texts_of(figure)
    assert marks_of(axes)[-1] == (pytest.approx(high), to_rgb(ORANGE), True)
    assert any("78 to 1,697 users" in text and "arrow" in text for text in texts_of(figure))
