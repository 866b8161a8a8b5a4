"""Figures of the evaluation of polyp sizing."""

from endoscopy.plots.agreement import bland_altman_figure, size_figure
from endoscopy.plots.classes import confusion_figure, reliability_figure
from endoscopy.plots.tables import ladder_figure, subgroup_figure

__all__ = [
    "bland_altman_figure",
    "confusion_figure",
    "ladder_figure",
    "reliability_figure",
    "size_figure",
    "subgroup_figure",
]
