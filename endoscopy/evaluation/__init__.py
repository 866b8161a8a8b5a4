"""Evaluation of polyp sizing: intervals, baselines, audits, the ladder and the honest table.

Audits are in :mod:`endoscopy.evaluation.audits`,
frames of the renderer in :mod:`endoscopy.evaluation.rendered`.
"""

from endoscopy.evaluation.abstention import abstention_table
from endoscopy.evaluation.baselines import baseline_predictions
from endoscopy.evaluation.conformal import SplitConformal, calibrate
from endoscopy.evaluation.coverage import coverage_interval, coverage_table
from endoscopy.evaluation.cue_baselines import cue_baselines
from endoscopy.evaluation.features import frame_features
from endoscopy.evaluation.frames import FrameStack, Predictor, predictions_of
from endoscopy.evaluation.headline import cut_off_note, headline, verdict
from endoscopy.evaluation.honest_table import HonestComparison, honest_headline, honest_table
from endoscopy.evaluation.ladder import ladder, ladder_order, ladder_predictions
from endoscopy.evaluation.scores import score_differences, score_intervals, size_scores
from endoscopy.evaluation.size_evaluation import Bars, SizeEvaluation
from endoscopy.evaluation.subgroups import subgroup_table

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
