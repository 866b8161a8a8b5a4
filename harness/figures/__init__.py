"""Figures: the style of all plots and those that domains share. They write no files."""

from harness.figures.bars import bar_panels, calibration_figure, limits_figure, panel_grid
from harness.figures.curves import Curve, Tried, learning_figure, read_metrics, trials_figure
from harness.figures.forest import Estimate, Panel, differences_figure, forest_figure
from harness.figures.style import COLUMNS, drawn_numbers

__all__ = [
    "COLUMNS",
    "Curve",
    "Estimate",
    "Panel",
    "Tried",
    "bar_panels",
    "calibration_figure",
    "differences_figure",
    "drawn_numbers",
    "forest_figure",
    "learning_figure",
    "limits_figure",
    "panel_grid",
    "read_metrics",
    "trials_figure",
]
