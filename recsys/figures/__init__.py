"""Figures of rankers: experts and gates, calibration, lists, fields. They write no files."""

from recsys.figures.gate_maps import (
    activations_figure,
    cosines_figure,
    gates_figure,
    scales_figure,
    sharing_figure,
)
from recsys.figures.reliability import importance_figure, ranked_list_figure, reliability_figure

__all__ = [
    "activations_figure",
    "cosines_figure",
    "gates_figure",
    "importance_figure",
    "ranked_list_figure",
    "reliability_figure",
    "scales_figure",
    "sharing_figure",
]
