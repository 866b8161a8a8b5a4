"""Metrics of ranking, calibration and off-policy evaluation, on arrays.

What an evaluation scores is :func:`task_scores`, task by task, and :func:`summed_log_loss`; their
figures become rows in :mod:`recsys.experiments.predictions`.
"""

from recsys.metrics.auc import auc
from recsys.metrics.calibration import (
    Reliability,
    expected_calibration_error,
    predicted_over_observed,
    reliability,
)
from recsys.metrics.gains import Gains, gains_over_single
from recsys.metrics.grouped_auc import GroupedAUC, UserAUC, gauc, user_auc
from recsys.metrics.histogram_auc import BoundedAUC, HistogramAUC
from recsys.metrics.inputs import Measured
from recsys.metrics.log_loss import log_loss, normalized_entropy
from recsys.metrics.off_policy import (
    OffPolicy,
    importance_weights,
    off_policy,
)
from recsys.metrics.play_time import gxauc, mean_absolute_error, user_xauc, xauc
from recsys.metrics.ranked_lists import ListScore, ndcg_at, recall_at
from recsys.metrics.resampled import (
    auc_scores,
    combined,
    per_user_sums,
    summed_log_loss,
    task_scores,
    user_resamples,
)
from recsys.metrics.sharded import gathered_auc, gathered_rows, routed_by_user, sharded_gauc
from recsys.metrics.slices import counts_of, quantile_slices, standard_slices
from recsys.metrics.task_table import task_table

__all__ = [
    "BoundedAUC",
    "Gains",
    "GroupedAUC",
    "HistogramAUC",
    "ListScore",
    "Measured",
    "OffPolicy",
    "Reliability",
    "UserAUC",
    "auc",
    "auc_scores",
    "combined",
    "counts_of",
    "expected_calibration_error",
    "gains_over_single",
    "gathered_auc",
    "gathered_rows",
    "gauc",
    "gxauc",
    "importance_weights",
    "log_loss",
    "mean_absolute_error",
    "ndcg_at",
    "normalized_entropy",
    "off_policy",
    "per_user_sums",
    "predicted_over_observed",
    "quantile_slices",
    "recall_at",
    "reliability",
    "routed_by_user",
    "sharded_gauc",
    "standard_slices",
    "summed_log_loss",
    "task_scores",
    "task_table",
    "user_auc",
    "user_resamples",
    "user_xauc",
    "xauc",
]
