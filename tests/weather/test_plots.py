import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from weather.grid import Grid, gaussian_grid, regular_grid
from weather.plots import (
    analysis_figure,
    cost_figure,
    cycle_figure,
    draw_map,
    equal_earth,
    method_colors,
    outline,
    scorecard_figure,
    symmetric_levels,
)

GRID = regular_grid(31, 60, poles=True)
METHODS = ("background", "inverse distance", "optimal interpolation", "LETKF", "Adas", "ungated")


def wave(amplitude=1.0, grid=GRID, number=3):
    phase = number * grid.longitude.deg2rad()
    return amplitude * grid.latitude.deg2rad().cos()[:, None] * phase.sin()


def panel(**options):
    truth = 54_000 + wave(2000)
    background = truth + wave(400, number=5)
    analysis = truth + wave(100, number=5)
    options = {"variable": "geopotential", "level": 500} | options
    return analysis_figure(truth, background, analysis, GRID, **options)


def cycles():
    generator = np.random.default_rng(0)
    return {name: 300 / (1 + i) * np.exp(generator.normal(size=(3, 200)) / 10)
            for i, name in enumerate(METHODS)}  # fmt: skip


def card(**options):
    values = np.linspace(0.6, 1.5, 24).reshape(6, 4) * np.array([396.0, 280, 2.3, 2.3])
    tasks = ["z500", "z850", "t500", "t850"]
    return scorecard_figure(METHODS, tasks, values, **({"reference": "background"} | options))


COSTS = {name: (10.0**i / 3, 1.1 - i / 100, 1.0 - i / 100, 1.3) for i, name in enumerate(METHODS)}
FIGURES = {
    "equal fields": lambda: analysis_figure(
        *[torch.full(GRID.shape, 280.0)] * 3, GRID, variable="2m_temperature"
    ),
    "panel": lambda: panel(observed=wave() > 0.5, title="ERA5 ensemble: geopotential at 500 hPa"),
    "cycle": lambda: cycle_figure(cycles(), label="RMSE of height", unit="m", spin_up=60),
    "long names": lambda: scorecard_figure(
        ["background of the model with error", "inverse distance of the observations"],
        ["geopotential 500 hPa, 10 %", "temperature 850 hPa, 10 %"],
        np.ones((2, 2)),
        reference="background of the model with error",
        title="Errors",
    ),
    "cost": lambda: cost_figure(COSTS, title="Error and cost", cost="ms", error="over damped_oi"),
    "score card": lambda: card(title="Persistence"),
}


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


@pytest.mark.parametrize("name", FIGURES)
def test_words_do_not_touch_and_lie_inside(name, legible):
    legible(FIGURES[name]())


def filled_contours(axes):
    return next(
        c for c in axes.collections if isinstance(c, mpl.contour.QuadContourSet) and c.filled
    )


def test_panel_shares_scales_and_centers_differences():
    maps = panel().axes[:6]
    fields = [filled_contours(axes) for axes in maps[:3]]
    differences = [filled_contours(axes) for axes in maps[3:]]
    for group in (fields, differences):
        for other in group[1:]:
            np.testing.assert_array_equal(other.levels, group[0].levels)
    levels = differences[0].levels
    np.testing.assert_allclose(levels, -levels[::-1])
    assert 0 not in levels
    middle = np.array(differences[0].cmap(differences[0].norm(0.0))[:3])
    assert middle.min() > 0.9  # neutral, near white
    assert fields[0].levels[0] <= 52_000 < 56_000 <= fields[0].levels[-1]


def test_panel_states_area_weighted_errors_and_the_network():
    figure = panel(observed=wave() > 0.5)
    remarks = [axes.get_title(loc="right") for axes in figure.axes[3:6]]
    expected = GRID.area_mean((wave(400, number=5).double()) ** 2).sqrt().item()
    assert remarks[1] == f"rms {expected:.3g} m² s⁻²"
    assert remarks[2] == f"rms {expected / 4:.3g} m² s⁻²"
    assert remarks[0] == f"rms {expected * 3 / 4:.3g} m² s⁻²"
    words = [text.get_text() for text in figure.texts]
    assert words == [f"{int((wave() > 0.5).sum())} observed points", "Geopotential at 500 hPa"]
    assert len(figure.axes[3].collections[-1].get_offsets()) == int((wave() > 0.5).sum())


@pytest.mark.parametrize("size", [0.013, 1.0, 7.3, 1234.0])
def test_symmetric_levels_cover_the_size(size):
    levels = symmetric_levels(size)
    np.testing.assert_allclose(levels, -levels[::-1])
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0])
    assert 8 <= len(levels) <= 20
    assert size <= levels[-1] * 1.01 + (levels[1] - levels[0])


@pytest.mark.fault("46 W figure")
def test_names_of_costs_stand_beside_their_points():
    """Close ones, too: none needs a key, and networks alone have their color."""
    points = {"adas_oi": (50, 0.92, 0.6, 1.5), "ungated_oi": (53, 0.89, 0.6, 1.5),
              "adas_increment": (45, 1.12, 0.9, 1.4), "ungated": (41, 1.04, 0.8, 1.4),
              "oi": (1, 1.5, 0.9, 2.7), "four_d_var": (2600, 0.45, 0.3, 0.8)}  # fmt: skip
    figure = cost_figure(points, title="Error and cost", cost="times oi", error="over damped_oi")
    drawn(figure)
    (axes,) = figure.axes
    names = {text.get_text(): text for text in axes.texts}
    assert set(names) == set(points)
    for name, text in names.items():
        x, y = axes.transData.transform(points[name][:2])
        box = text.get_window_extent()
        assert 0 < box.x0 - x < 40
        assert abs(box.y0 + box.height / 2 - y) < 40
    color = names["adas_oi"].get_color()
    networks = {name for name, text in names.items() if text.get_color() == color}
    assert networks == {"adas_oi", "ungated_oi", "adas_increment", "ungated"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("times oi", "over damped_oi")


def test_cycle_names_every_line_once_in_its_color():
    (axes,) = cycle_figure(cycles(), label="RMSE of height", unit="m").axes
    colors = method_colors(METHODS)
    labels = {text.get_text().rsplit("  ", 1)[0]: text for text in axes.texts}
    assert set(labels) == set(METHODS)
    assert len({to_rgb(color) for color in colors.values()}) == len(METHODS)
    for name, line in zip(METHODS, axes.lines, strict=True):
        assert line.get_color() == labels[name].get_color() == colors[name]
        np.testing.assert_allclose(line.get_ydata(), np.median(cycles()[name], axis=0))
        np.testing.assert_allclose(line.get_xdata()[[0, -1]], [0.25, 50])


def test_cycle_leaves_gaps_where_not_finite(refused):
    errors = np.array([3.0, 2.0, np.inf, np.nan, 1.0])
    figure = cycle_figure({"OI": errors, "lost": errors * np.nan}, label="RMSE", unit="m")
    drawn(figure)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [3, 2, np.nan, np.nan, 1])
    assert [text.get_text() for text in figure.axes[0].texts] == ["OI  1"]
    refused(
        "errors is empty, expected at least one method",
        cycle_figure,
        {},
        label="RMSE",
        unit="m",
        error=ValueError,
    )


def test_score_card_shows_values_and_changes():
    values = np.array([[400.0, 2.0], [300.0, 2.2], [np.nan, 1.996]])
    figure = scorecard_figure(["background", "OI", "Adas"], ["z500", "t500"], values,
                              reference="background")  # fmt: skip
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["400", "2.00", "300", "−25 %", "2.20", "+10 %", "–", "2.00", "±0 %"]
    image = figure.axes[0].images[0]
    better, worse = (image.cmap(image.norm(x)) for x in (-0.25, 0.25))
    assert better[2] > better[0] + 0.2  # blue
    assert worse[0] > worse[2] + 0.2  # red
    np.testing.assert_allclose(image.get_array()[1], [-0.25, 0.1])


def test_score_card_without_an_error_to_compare_with():
    figure = scorecard_figure(["perfect", "OI"], ["z500"], np.array([[0.0], [5.0]]),
                              reference="perfect")  # fmt: skip
    drawn(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00", "5.00"]


def test_score_card_refuses_nonsense(refuses):
    refuses(
        ValueError,
        (
            r"shape \(1, 2\), expected \(2, 2\)",
            lambda: scorecard_figure(["a", "b"], ["x", "y"], np.ones((1, 2)), reference="a"),
        ),
        (
            "reference 'c' is none of a, b",
            lambda: scorecard_figure(["a", "b"], ["x"], np.ones((2, 1)), reference="c"),
        ),
    )


def test_projection_keeps_area():
    x, y = outline().T
    area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    assert area == pytest.approx(4 * np.pi, rel=1e-3)
    for latitude in (0.0, 35.0, -60.0, 85.0):
        lat = np.array([latitude, latitude + 1e-3, latitude])
        x, y = equal_earth(lat, np.array([20.0, 20.0, 20.0 + 1e-3]))
        cell = (x[2] - x[0]) * (y[1] - y[0]) - (x[1] - x[0]) * (y[2] - y[0])
        expected = np.deg2rad(1e-3) ** 2 * np.cos(np.deg2rad(latitude))
        assert cell == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        gaussian_grid(16, 32),
        Grid(torch.linspace(-80, 80, 9), torch.arange(24) * 15.0 - 172.5),
    ],
)
def test_maps_show_places_where_they_are(grid):
    """A field that is 1 over Australia only has its color there, not in the mirror image."""
    field = torch.zeros(grid.shape)
    rows = (grid.latitude < -15) & (grid.latitude > -40)
    columns = (grid.longitude % 360 > 115) & (grid.longitude % 360 < 150)
    field[rows[:, None] & columns] = 1.0
    figure = mpl.figure.Figure(figsize=(4, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_map(axes, field, grid, levels=np.array([-0.5, 0.5, 0.6]), cmap=mpl.colormaps["RdBu_r"])
    pixels = np.asarray(drawn(figure).buffer_rgba())[..., :3].astype(int)
    assert reddish(pixels, axes, -28, 133)
    for latitude, longitude in ((28, 133), (-28, -133), (28, -133), (0, 0), (-28, 90)):
        assert not reddish(pixels, axes, latitude, longitude)


def reddish(pixels, axes, latitude, longitude):
    x, y = axes.transData.transform(equal_earth(np.array(latitude), np.array(longitude)))
    red, _, blue = pixels[pixels.shape[0] - 1 - int(y), int(x)]
    return red > blue + 60


def test_a_color_that_comes_again_is_dashed():
    figure = cycle_figure({f"m{n}": np.ones(8) + n for n in range(10)}, label="RMSE", unit="m")
    drawn = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert (len(set(drawn)), drawn[0][1]) == (10, "-")
