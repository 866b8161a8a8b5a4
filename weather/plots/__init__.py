"""Figures of reports: maps, cycles, score cards. They return Figures and write no files."""

from weather.plots.cycle import cycle_figure
from weather.plots.panel import analysis_figure
from weather.plots.scorecard import scorecard_figure

__all__ = ["analysis_figure", "cycle_figure", "scorecard_figure"]
