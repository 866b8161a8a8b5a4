"""Evaluation of polyp sizing: intervals, baselines, audits, the ladder and the honest table.

Audits are in :mod:`endoscopy.evaluation.audits`,
frames of the renderer in :mod:`endoscopy.evaluation.rendered_frames`.
"""

from endoscopy.evaluation.baselines import (
    baseline_predictions,
    cue_baselines,
    ladder,
    ladder_order,
    ladder_predictions,
)
from endoscopy.evaluation.conformal import (
    SplitConformal,
    abstention_table,
    calibrate,
    coverage_interval,
    coverage_table,
)
from endoscopy.evaluation.honest_table import HonestComparison, honest_headline, honest_table
from endoscopy.evaluation.rendered_frames import (
    FrameStack,
    Predictor,
    frame_features,
    predictions_of,
)
from endoscopy.evaluation.size_evaluation import (
    Bars,
    SizeEvaluation,
    cut_off_note,
    headline,
    verdict,
)
from endoscopy.evaluation.size_scores import (
    score_differences,
    score_intervals,
    size_scores,
    subgroup_table,
)

__all__ = [
    "Bars",
    "FrameStack",
    "HonestComparison",
    "Predictor",
    "SizeEvaluation",
    "SplitConformal",
    "abstention_table",
    "baseline_predictions",
    "calibrate",
    "coverage_interval",
    "coverage_table",
    "cue_baselines",
    "cut_off_note",
    "frame_features",
    "headline",
    "honest_headline",
    "honest_table",
    "ladder",
    "ladder_order",
    "ladder_predictions",
    "predictions_of",
    "score_differences",
    "score_intervals",
    "size_scores",
    "subgroup_table",
    "verdict",
]
