"""Metrics of polyp sizing: classes, errors in millimeters, ranking, calibration, aggregation."""

from endoscopy.metrics.aggregation import object_table, patient_table
from endoscopy.metrics.calibration import expected_calibration_error, reliability
from endoscopy.metrics.classification import (
    accuracy,
    balanced_accuracy,
    f1,
    macro_f1,
    negative_predictive_value,
    positive_predictive_value,
    quadratic_kappa,
    sensitivity,
    specificity,
    weighted_f1,
)
from endoscopy.metrics.columns import PROBABILITIES, clusters_of, flags_of, patients_of
from endoscopy.metrics.confusion import at_cut_off, confusion_matrix
from endoscopy.metrics.ranking import auroc, size_auroc
from endoscopy.metrics.size_classes import (
    CLASS_NAMES,
    CONTINUOUS,
    PUBLISHED,
    TRUTH,
    CutOffs,
    count_on_cut_offs,
    has_known_class,
)
from endoscopy.metrics.size_errors import (
    LimitsOfAgreement,
    bias,
    limits_of_agreement,
    mean_absolute_error,
    mean_relative_error,
    ratio_limits,
    root_mean_square_error,
)

__all__ = [
    "CLASS_NAMES",
    "CONTINUOUS",
    "PROBABILITIES",
    "PUBLISHED",
    "TRUTH",
    "CutOffs",
    "LimitsOfAgreement",
    "accuracy",
    "at_cut_off",
    "auroc",
    "balanced_accuracy",
    "bias",
    "clusters_of",
    "confusion_matrix",
    "count_on_cut_offs",
    "expected_calibration_error",
    "f1",
    "flags_of",
    "has_known_class",
    "limits_of_agreement",
    "macro_f1",
    "mean_absolute_error",
    "mean_relative_error",
    "negative_predictive_value",
    "object_table",
    "patient_table",
    "patients_of",
    "positive_predictive_value",
    "quadratic_kappa",
    "ratio_limits",
    "reliability",
    "root_mean_square_error",
    "sensitivity",
    "size_auroc",
    "specificity",
    "weighted_f1",
]
