"""Figures of retrieval and fusion: sheets of images, gates, scores. They write no files."""

from diffusion.evaluation.figures.gate_maps import gate_map_figure, gate_table
from diffusion.evaluation.figures.pair_differences import pair_differences_figure
from diffusion.evaluation.figures.retrieval_matrix import retrieval_figure, retrieval_table
from diffusion.evaluation.figures.sheets import sheet_figure

__all__ = [
    "gate_map_figure",
    "gate_table",
    "pair_differences_figure",
    "retrieval_figure",
    "retrieval_table",
    "sheet_figure",
]
