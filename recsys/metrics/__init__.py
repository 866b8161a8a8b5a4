"""Metrics of ranking, calibration and off-policy evaluation, on arrays.

What an evaluation scores is `task_scores`, task by task, and `summed_log_loss`; their
figures become rows in `recsys.experiments.predictions`.
"""

from recsys.metrics.off_policy import (
    OffPolicy,
    importance_weights,
    off_policy,
)
from recsys.metrics.play_time import gxauc, mean_absolute_error, user_xauc, xauc
from recsys.metrics.probabilities import (
    Gains,
    GroupedAUC,
    Measured,
    Reliability,
    UserAUC,
    auc,
    expected_calibration_error,
    gains_over_single,
    gauc,
    log_loss,
    normalized_entropy,
    predicted_over_observed,
    reliability,
    user_auc,
)
from recsys.metrics.resampled import (
    auc_scores,
    combined,
    counts_of,
    per_user_sums,
    quantile_slices,
    standard_slices,
    summed_log_loss,
    task_scores,
    user_resamples,
)

__all__ = [
    "Gains",
    "GroupedAUC",
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
    "gauc",
    "gxauc",
    "importance_weights",
    "log_loss",
    "mean_absolute_error",
    "normalized_entropy",
    "off_policy",
    "per_user_sums",
    "predicted_over_observed",
    "quantile_slices",
    "reliability",
    "standard_slices",
    "summed_log_loss",
    "task_scores",
    "user_auc",
    "user_resamples",
    "user_xauc",
    "xauc",
]
