import io
import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from harness.figures import calibration_figure, limits_figure, panel_grid
from harness.figures.style import MUTED, PALETTE

# Linear RGB as seen without red or green cones (Viénot, Brettel and Mollon, 1999).
SEEN = {
    "protan": [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.0040, -0.0040, 1]],
    "deutan": [[0.2920, 0.7080, 0], [0.2920, 0.7080, 0], [-0.0224, 0.0224, 1]],
}


def linear(color):
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("kind", SEEN)
def test_six_colors_stay_apart_for_color_blind_readers(kind):
    seen = [np.cbrt(np.clip(np.array(SEEN[kind]) @ linear(c), 0, 1)) for c in PALETTE[:6]]
    for one, other in combinations(seen, 2):
        assert np.abs(one - other).max() > 0.1


def test_the_first_colors_stand_out_from_white():
    for color in (*PALETTE[:4], MUTED):
        luminance = linear(color) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 3  # contrast with white for marks


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return buffer.getvalue()


def test_limits_tell_what_is_met(bars, legible):
    figure = limits_figure(bars)
    legible(figure)
    assert len(drawn(figure)) > 8_000
    axes = figure.axes[0]
    assert [round(bar.get_width(), 4) for bar in axes.patches] == [0.38, -0.0471, -1]
    assert "−0.02" in [text.get_text() for text in axes.texts]  # its limit is 0
    colors = [to_rgb(bar.get_facecolor()[:3]) for bar in axes.patches]
    assert [color == colors[0] for color in colors] == [True, False, False]
    words = [text.get_text() for text in axes.texts if "needed" in text.get_text()]
    assert (words[1], words[3]) == ("0.81, needed ≥ 0.85: missed", "−0.02, needed ≤ 0 K a day: met")
    assert words[4] == "–, needed ≤ 1: missed"
    assert "2 of 5 met" in [text.get_text() for text in figure.texts]


def test_calibration_shows_the_bins_that_have_samples(legible):
    figure = calibration_figure(
        [0.1, 0.5, 0.7, 0.9], [0.2, 0.45, np.nan, 0.95], [10, 40, 0, 160], error=0.031
    )
    legible(figure)
    marks = figure.axes[0].collections[-1]
    np.testing.assert_allclose(marks.get_offsets(), [[0.1, 0.2], [0.5, 0.45], [0.9, 0.95]])
    np.testing.assert_allclose(marks.get_sizes(), [20 + 260 / 16, 20 + 260 / 4, 280])
    assert figure.axes[0].texts[0].get_text() == "210 samples, calibration error 0.031"
    low, high = figure.axes[0].get_xlim()
    assert low < 0.1 < 0.95 < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limits_figure([]), "limits are empty"),
        (lambda: panel_grid([]), "names are empty"),
        (lambda: calibration_figure([0.1], [0.1, 0.2], [1]), "expected three (B,)"),
        (lambda: calibration_figure([0.1], [0.1], [0]), "counts are all 0"),
    ],
)
def test_bad_arguments(refuses, call, message):
    refuses(ValueError, (re.escape(message), lambda: call()))
