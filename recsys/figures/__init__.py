"""Figures of rankers: experts and gates, calibration, lists, fields. They write no files."""

from recsys.figures.activations import activations_figure, scales_figure
from recsys.figures.gate_maps import cosines_figure, gates_figure, sharing_figure
from recsys.figures.importance import importance_figure
from recsys.figures.ranked_list import ranked_list_figure
from recsys.figures.reliability import reliability_figure

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
