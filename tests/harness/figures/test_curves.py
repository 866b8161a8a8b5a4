import numpy as np
import pytest
from matplotlib.colors import to_rgb

from harness.figures import Curve, learning_figure, read_metrics
from harness.figures.curves import draw_seeds, name_lines
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
    assert values[0] == pytest.approx(curve.values[:8].mean())
    assert steps[0] == pytest.approx(3.5)
    assert values[-1] == pytest.approx(curve.values[1496:].mean())
    assert axes.texts[0].get_text().startswith("train  ")


def test_panels_can_be_chosen_and_others_are_counted(legible, refuses):
    logged = {f"val/figure {i}": Curve(np.arange(5), np.arange(5.0) + i) for i in range(8)}
    logged |= {"val/loss": Curve(np.arange(5), np.arange(5.0))}
    figure = learning_figure({"a": [logged]})
    legible(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", *(f"figure {i}" for i in range(5))]
    assert "3 more in metrics.csv" in [text.get_text() for text in figure.texts]
    (axes,) = learning_figure({"a": [logged]}, metrics=["figure 7"]).axes
    assert axes.get_title(loc="left") == "figure 7"
    refuses(
        ValueError,
        ("no training logged speed", lambda: learning_figure({"a": [logged]}, metrics=["speed"])),
        ("no training logged a metric", lambda: learning_figure({})),
    )


def test_many_lines_have_room_for_their_names(legible):
    steps = np.arange(10)
    curve = Curve(steps, 1.0 / (1 + steps))
    run = {"train/loss": curve, "val/loss": curve}
    legible(learning_figure({f"method {i}": [run] for i in range(9)}))


def test_a_wide_range_is_drawn_logarithmically():
    steps = np.arange(100)
    for values, scale in ((np.exp(-steps / 10), "log"), (1 + steps / 50, "linear")):
        (axes,) = learning_figure({"": [{"loss": Curve(steps, values)}]}).axes
        assert axes.get_yscale() == scale


def test_seeds_are_drawn_as_median_and_range(axes):
    values = np.array([[1.0, 2, 3], [2, 4, 6], [9, 9, np.inf]])
    end = draw_seeds(axes, np.arange(3), values, PALETTE[0])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2, 4, np.nan])
    assert end == 4
    assert len(axes.collections) == 1
    assert np.isnan(draw_seeds(axes, np.arange(3), np.full(3, np.nan), PALETTE[1]))
    assert len(axes.collections) == 1  # one seed has no range


def test_names_keep_the_order_of_their_lines_and_do_not_touch(axes):
    axes.set_ylim(0, 1)
    ends = {"low": 0.500, "high": 0.502, "middle": 0.501, "top": 5.0, "none": float("nan")}
    colors = dict(zip(ends, PALETTE, strict=False))
    name_lines(axes, ends, colors)
    places = {text.get_text().split("  ")[0]: text.xyann[1] for text in axes.texts}
    assert sorted(places, key=places.__getitem__) == ["low", "middle", "high", "top"]
    heights = sorted(places.values())
    assert min(np.diff(heights)) >= 0.2 / 2 - 1e-9  # inches of a line over those of the axes
    assert heights[-1] == 1
    assert {to_rgb(text.get_color()) for text in axes.texts} == {
        to_rgb(colors[name]) for name in places
    }
