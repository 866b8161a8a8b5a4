import numpy as np
import pytest

from harness.figures import Curve, learning_figure, read_metrics
from harness.figures.curves import draw_seeds
from harness.figures.style import PALETTE, new_figure, place

CSV = """epoch,step,train/loss,val/loss
0,0,2.0,
0,1,nan,
0,1,,1.5
1,2,1.0,
"""


@pytest.fixture
def axes():
    return place(new_figure(6, 3), 0.5, 0.5, 3, 2)


def test_a_log_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    curves = read_metrics(path)
    assert list(curves) == ["train/loss", "val/loss"]
    np.testing.assert_array_equal(curves["train/loss"], [[0, 1, 2], [2, np.nan, 1]])
    np.testing.assert_array_equal(curves["val/loss"], [[1], [1.5]])
    path.write_text("epoch,step,train/loss\n")
    assert read_metrics(path) == {}


def test_a_panel_a_metric_and_a_line_a_training(runs, legible):
    figure = learning_figure(runs)
    legible(figure)
    loss, accuracy = figure.axes
    assert [a.get_title(loc="left") for a in figure.axes] == ["loss", "accuracy"]
    assert [len(a.lines) for a in figure.axes] == [8, 4]
    expected = [PALETTE[0]] * 4 + [PALETTE[1]] * 4
    assert [line.get_color() for line in loss.lines] == expected
    assert [line.is_dashed() for line in loss.lines] == [True, False] * 4
    names = {text.get_text().rsplit("  ")[0]: text.get_color() for text in accuracy.texts}
    assert names == {"switch val": PALETTE[0], "top2 val": PALETTE[1]}


def test_thinned_lines_keep_their_mean(runs):
    curve = runs["switch"][0]["train/loss"]
    (axes,) = learning_figure({"": [{"train/loss": curve}]}).axes
    steps, values = axes.lines[0].get_data()
    assert len(steps) <= 200
    assert (values[0], steps[0]) == (pytest.approx(curve.values[:8].mean()), pytest.approx(3.5))
    assert values[-1] == pytest.approx(curve.values[1496:].mean())
    assert axes.texts[0].get_text().startswith("train  ")


def test_a_wide_range_is_drawn_logarithmically():
    steps = np.arange(100)
    for values, scale in ((np.exp(-steps / 10), "log"), (1 + steps / 50, "linear")):
        (axes,) = learning_figure({"": [{"loss": Curve(steps, values)}]}).axes
        assert axes.get_yscale() == scale


def test_seeds_are_drawn_as_median_and_range(axes):
    values = np.array([[1.0, 2, 3], [2, 4, 6], [9, 9, np.inf]])
    end = draw_seeds(axes, np.arange(3), values, PALETTE[0])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2, 4, np.nan])
    assert (end, len(axes.collections)) == (4, 1)
    assert np.isnan(draw_seeds(axes, np.arange(3), np.full(3, np.nan), PALETTE[1]))
    assert len(axes.collections) == 1  # one seed has no range
