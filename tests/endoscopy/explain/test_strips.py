"""Bars and strips show the numbers that they were given."""

import io

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from endoscopy.explain.saliency import gate_figure
from endoscopy.explain.strips import Track, strip_figure
from endoscopy.models.sizer import tiny_vit
from endoscopy.models.trunks import gates_of


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
    return found


def fits(figure):
    """Draw it, and return whether all texts lie inside."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.savefig(io.BytesIO())
    width, height = figure.bbox.size
    every = figure.texts + [text for axes in figure.axes for text in axes.texts]
    boxes = [text.get_window_extent(renderer) for text in every if text.get_text()]
    return all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)


def test_bars_are_the_sorted_scores():
    scores = {
        "branches.rgb.layer1.gate": torch.tensor([0.2, 0.9, 0.05, 0.5]),
        "head.gate1": torch.tensor([0.4, 0.6]),
    }
    figure = gate_figure(scores, title="Gates of seed 0")
    heights = [sorted((bar.get_height() for bar in axes.patches), reverse=True)
               for axes in figure.axes]  # fmt: skip
    np.testing.assert_allclose(heights[0], [0.9, 0.5, 0.2, 0.05], rtol=1e-6)
    np.testing.assert_allclose(heights[1], [0.6, 0.4], rtol=1e-6)
    found = texts(figure)
    assert "4 features, mean 0.41, 1 closed" in found
    assert "2 features, mean 0.50" in found
    assert {"Gates of seed 0", "rgb.layer1", "head.gate1"} <= set(found)
    assert fits(figure)


def test_all_gates_of_a_network_fit(refused):
    gates = gates_of(tiny_vit())
    figure = gate_figure({name: gate.scores() for name, gate in gates.items()})
    assert len(figure.axes) == len(gates) == 8
    assert fits(figure)
    refused("at least one gate", gate_figure, {}, error=ValueError)


def track(count=12, **changes):
    generator = np.random.default_rng(0)
    options = {
        "images": list(generator.integers(0, 255, (count, 30, 40, 3)).astype(np.uint8)),
        "boxes": np.tile([5.0, 25.0, 8.0, 20.0], (count, 1)),
        "sizes": generator.uniform(5, 7, count),
        "reasons": ["blurred; too near"] + [""] * (count - 1),
        "size": 6.0,
        "low": 4.5,
        "high": 8.0,
        "calibrated": True,
        "name": "object 003-001_2",
    }
    return Track(**(options | changes))


def test_a_strip_shows_size_interval_and_reasons():
    figure = strip_figure(track(truth=6.6))
    found = texts(figure)
    assert "true 6.6 mm, predicted 6.0 mm (4.5 to 8)" in found
    assert "1: blurred" in found
    assert "mm" in found
    assert "true size" in found
    assert len(figure.axes) == 8 + 1
    sizes = figure.axes[-1]
    drawn = np.concatenate([line.get_ydata() for line in sizes.lines if line.get_marker() in "ox"])
    assert sorted(drawn) == sorted(track().sizes)
    band = sizes.patches[0].get_extents().transformed(sizes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((4.5, 8.0))
    assert fits(figure)
